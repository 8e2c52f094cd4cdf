"""How the clients' own models do: of some of them, the mean one and the worst one."""

from collections.abc import Sequence
from typing import Any

from fedmom.method.state import ClientState, row_of, to_device
from fedmom.tasks.metrics import rises
from fedmom.tasks.problem import Problem

_OF_THE_MEAN = ("optimal_loss", "optimum", "distance")  # of the quadratic: they are said of x̄ alone


def client_measures(measures: Sequence[str]) -> tuple[str, ...]:
    """What `evaluate_rows` gives of a problem with these measures."""
    names = [name.removeprefix("test_") for name in measures if name == "loss" or name.startswith("test_")]
    return tuple(f"{which}_client_{name}" for name in names for which in ("mean", "worst"))


def chosen_clients(num_clients: int, wanted: int) -> list[int]:
    """Evenly spaced client ids whose own models are measured; 0 or more than there are: all."""
    count = min(wanted or num_clients, num_clients)
    return [place * num_clients // count for place in range(count)]


def summarised(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The clients' measurements: the mean one and the worst one."""
    record: dict[str, Any] = {}
    for key in measured[0] if measured else ():
        if key in _OF_THE_MEAN:
            continue
        name = key.removeprefix("test_")
        values = [m[key] for m in measured]
        record[f"mean_client_{name}"] = sum(values) / len(values)
        record[f"worst_client_{name}"] = (min if rises(name) else max)(values)
    return record


def evaluate_rows(problem: Problem, rows: ClientState, places: list[int]) -> dict[str, Any]:
    """Mean and worst loss and accuracy of the clients' own models, those at `places` of rows [N, ...]."""
    return summarised([problem.evaluate(to_device(row_of(rows, place), problem.device)) for place in places])
