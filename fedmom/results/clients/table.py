"""The clients of a run in one evaluation: how their results are spread, and who got what, the worst first."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedmom.config.numbers import counted
from fedmom.errors import InputError, unknown
from fedmom.records.files import CONFIG, RESULTS
from fedmom.records.history import ClientHistory, read_clients
from fedmom.results.reading import is_run, sweep_runs
from fedmom.results.sheets import Stat, written
from fedmom.results.tables import MISSING, Measure, client_measure, measure_of
from fedmom.rounds.results import ClientResults, summary, summary_names
from fedmom.tasks.metrics import is_share, rises

_MOST_ROUNDS = 8  # that an error names


class Looked(NamedTuple):
    """One evaluation of all clients, with who they are."""

    clients: ClientHistory
    results: ClientResults

    @property
    def measures(self) -> list[Measure]:
        """What every client has a number of: what rises first, the own one beside the personal one."""
        names = list(self.results.values)
        metrics = list(dict.fromkeys(name.partition("_")[2] for name in names))
        names.sort(key=lambda name: (not rises(name), metrics.index(name.partition("_")[2])))
        return [client_measure(name) for name in names]

    @property
    def about(self) -> str:
        """In a line: the round, how many clients there are, and how many have nothing to be tested on."""
        without = int((self.clients.test_examples == 0).sum())
        said = f", {without:,} without test examples" if without else ""
        values = next(iter(self.results.values.values()))
        silent = int((np.isnan(values) & (self.clients.test_examples > 0)).sum())
        said += f", {silent:,} without a number (nothing to measure, or no answer)" if silent else ""
        return f"round {self.results.round}: {counted(len(self.clients.examples), 'client')}{said}"

    def judged_by(self, name: str | None = None) -> Measure:
        """The measure of that name; of None the first share, else the first loss. InputError for an unknown one."""
        names = list(self.results.values)
        if name is None:
            name = next(filter(is_share, names), names[0])
        elif name not in names:
            raise unknown("--by", name, names)
        return client_measure(name)

    def worst_first(self, measure: Measure) -> np.ndarray:
        """[N] client numbers; equal ones by number, those without test examples last."""
        values = self.results.values[measure.key]
        return np.argsort(values if measure.rises else -values, kind="stable")  # NaN is sorted to the end


def clients_of(folder: Path) -> ClientHistory:
    """The clients' own results of a run folder, of one evaluation at least.

    Raises InputError for what is no run folder, and where its clients were not looked at.
    """
    if not is_run(folder):
        runs = sweep_runs(folder)  # raises where it is no sweep's either
        raise InputError(f"{folder}: is the folder of a sweep; name one of its {counted(len(runs), 'run')}: {runs[0]}")
    found = read_clients(folder)
    if found is None:
        raise InputError(
            f"{folder}: has no {RESULTS}; run.client-eval-every, in {CONFIG}, asks for the clients' own results, and "
            "data.client-test-share holds out test examples where the clients have none of their own"
        )
    if not found.results:
        raise InputError(f"{folder / RESULTS}: has no evaluation yet; run.client-eval-every says which rounds have one")
    check_clients(found, folder)
    return found


def check_clients(found: ClientHistory, folder: Path) -> None:
    """InputError where the file of a run folder does not have one number for each client."""
    file, number = folder / RESULTS, len(found.examples)
    told = {"test_examples": len(found.test_examples)} | ({} if found.names is None else {"names": len(found.names)})
    lengths = [(1, told)]
    for line, results in enumerate(found.results, 2):
        lengths.append((line, {name: values.size for name, values in results.values.items()}))
        if not results.values:
            raise InputError(f"{file}:{line}: measures nothing of round {results.round}")
    for line, sizes in lengths:
        for name, size in sizes.items():
            if size != number:
                raise InputError(f"{file}:{line}: {name} has {size} numbers; there are {counted(number, 'client')}")


def looked_at(clients: ClientHistory, round_number: int | None = None) -> Looked:
    """The evaluation of a round, of None the last one. InputError for a round without one."""
    by_round = {results.round: results for results in clients.results}
    if round_number is None:
        return Looked(clients, clients.results[-1])
    if round_number not in by_round:
        rounds = [str(one) for one in by_round]
        if len(rounds) > _MOST_ROUNDS:
            rounds = [*rounds[: _MOST_ROUNDS - 2], "…", rounds[-1]]
        raise InputError(f"--round {round_number}: the clients were looked at in {', '.join(rounds)}; choose one")
    return Looked(clients, by_round[round_number])


def spread_table(looked: Looked) -> tuple[list[str], list[list[str]]]:
    """(header, a row for each measure): the statistics over the clients that have test examples."""
    header, rows = ["measure"], list[list[str]]()
    for of in looked.measures:
        values = looked.results.values[of.key]
        found = summary(of.key, values[~np.isnan(values)])
        measures = [one for key in summary_names(of.key) if (one := measure_of(key)) is not None]
        titles = [one.title.removeprefix(f"{of.title}, ") for one in measures]
        header = max(header, ["measure", *titles], key=len)  # Jain's index is of shares alone
        rows.append([of.title, *(_cell(one, found.get(one.key)) for one in measures)])
    return header, [[*row, *[MISSING] * (len(header) - len(row))] for row in rows]


def clients_table(looked: Looked, by: Measure, most: int | None) -> tuple[list[str], list[list[str]]]:
    """(header, a row for each of the `most` worst clients by a measure; of None for all)."""
    return clients_header(looked), [[text for text, _ in row] for row in clients_rows(looked, by, most)]


def clients_header(looked: Looked) -> list[str]:
    """The titles of `clients_table`."""
    return [*_head(looked), *(one.title for one in looked.measures)]


def clients_rows(looked: Looked, by: Measure, most: int | None) -> list[list[tuple[str, str]]]:
    """The rows of `clients_table`: of every cell what it shows, and what it is sorted by ("" comes last)."""
    rows = []
    for client in looked.worst_first(by)[:most].tolist():
        row = [(text, text) for text in _who(looked.clients, client)]
        row += [(f"{of[client]:,}", str(of[client])) for of in (looked.clients.examples, looked.clients.test_examples)]
        for one in looked.measures:
            value = float(looked.results.values[one.key][client])
            row.append((_cell(one, value), "" if np.isnan(value) else f"{value:.10g}"))
        rows.append(row)
    return rows


def clients_csv(looked: Looked) -> str:
    """All clients by number, with numbers in full and in the units of clients.jsonl; nothing where one has none."""
    names = list(looked.results.values)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_head(looked, of_file=True), *names])
    for client, (train, test) in enumerate(zip(looked.clients.examples, looked.clients.test_examples, strict=True)):
        numbers = [float(looked.results.values[name][client]) for name in names]
        cells = ["" if np.isnan(value) else repr(value) for value in numbers]
        writer.writerow([*_who(looked.clients, client), train, test, *cells])
    return file.getvalue()


def _head(looked: Looked, *, of_file: bool = False) -> list[str]:
    test = "test_examples" if of_file else "test examples"
    return ["client", *([] if looked.clients.names is None else ["id"]), "examples", test]


def _who(clients: ClientHistory, client: int) -> list[str]:
    """The number of a client and, if it is a natural one, its id."""
    return [str(client), *([] if clients.names is None else [" ".join(str(clients.names[client]).split())])]


def _cell(measure: Measure, value: float | None) -> str:
    if value is None or np.isnan(value):
        return MISSING
    return written(Stat(measure.factor * value, None, 1, 1), measure.digits, measure.unit)
