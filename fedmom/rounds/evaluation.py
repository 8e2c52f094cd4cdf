"""How the clients' own models do: of some of them, the mean one and the worst one."""

from typing import Any

from fedmom.method.state import ClientState, row_of, to_device
from fedmom.tasks.problem import Problem

# What `evaluate_rows` gives, of a problem that measures a loss (and an accuracy).
CLIENT_MEASURES = ("mean_client_loss", "worst_client_loss", "mean_client_accuracy", "worst_client_accuracy")


def chosen_clients(num_clients: int, wanted: int) -> list[int]:
    """Evenly spaced client ids whose own models are measured; 0 or more than there are: all."""
    count = min(wanted or num_clients, num_clients)
    return [place * num_clients // count for place in range(count)]


def summarised(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The clients' measurements: the mean one and the worst one."""
    record: dict[str, Any] = {}
    for name, worst in (("loss", max), ("accuracy", min)):
        values = [m[key] for m in measured for key in (name, f"test_{name}") if key in m]
        if values:
            record[f"mean_client_{name}"] = sum(values) / len(values)
            record[f"worst_client_{name}"] = worst(values)
    return record


def evaluate_rows(problem: Problem, rows: ClientState, places: list[int]) -> dict[str, Any]:
    """Mean and worst loss and accuracy of the clients' own models, those at `places` of rows [N, ...]."""
    return summarised([problem.evaluate(to_device(row_of(rows, place), problem.device)) for place in places])
