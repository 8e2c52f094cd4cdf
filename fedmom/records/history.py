"""rounds.jsonl: a line per round, read, cut back and looked at without holding all of it."""

import contextlib
import json
import math
import os
from array import array
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from fedmom.errors import InputError
from fedmom.machine.files import whole_file
from fedmom.records.files import RESULTS, ROUNDS
from fedmom.rounds.loop import Record
from fedmom.rounds.results import COUNT, ClientResults
from fedmom.tasks.problem import Problem
from fedmom.tasks.supervised import Supervised

MOST_KEPT = 10_000  # records of a run that are held in memory, 1.4 kB each; of a longer one its folder is read
LOOKED = COUNT  # in the record of every round that looked at the clients' own results


def iterate_rounds(path: Path) -> Iterator[tuple[str, Record]]:
    """The lines of a run folder and what they say; a last line that a kill cut short is left out."""
    file = path / ROUNDS
    if not file.is_file():
        return
    broken = 0
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if broken:
                break
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("round"), int):
                    raise ValueError("not a round's record")
            except ValueError:
                broken = number
                continue
            yield line, record
        else:
            return  # if there was one, it was the last line
    raise InputError(f"{file}:{broken}: is not a round's record")


def read_rounds(path: Path) -> list[Record]:
    """The records of a run folder; a last line that a kill cut short is left out."""
    return [record for _, record in iterate_rounds(path)]


def from_the_end(path: Path) -> Iterator[Record]:
    """The records of a run folder, the last whole line first; of a long file no more is read than is asked for."""
    try:
        with open(path / ROUNDS, "rb") as file:
            size, length, seen = file.seek(0, os.SEEK_END), 4096, 0
            while True:
                file.seek(max(0, size - length))
                lines = file.read().split(b"\n")
                # Without the first, which may lack its beginning, and the last, which may lack its end.
                whole = lines[:-1] if length >= size else lines[1:-1]
                for line in reversed(whole[: len(whole) - seen]):
                    with contextlib.suppress(ValueError):
                        record = json.loads(line)
                        if isinstance(record, dict) and isinstance(record.get("round"), int):
                            yield record
                if length >= size:
                    return
                length, seen = 8 * length, len(whole)
    except OSError:
        return


def last_round(path: Path) -> int:
    """The number of a run folder's last whole line; 0 where there is none. It reads the file's end alone."""
    return next((int(record["round"]) for record in from_the_end(path)), 0)


class History(Sequence[Record]):
    """The rounds of a run that is under way: in memory, or from some thousands on in its folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.last: Record | None = None
        self._count, self._kept = 0, list[Record]()
        self._starts: array[int] | None = None  # where the lines begin

    def append(self, record: Record) -> None:
        """One more; its line is in the folder already."""
        self.last, self._starts = record, None
        self._count += 1
        if self.folder is None or self._count <= MOST_KEPT:
            self._kept.append(record)
        else:
            self._kept.clear()

    def settled(self) -> Sequence[Record]:
        """What a Result holds: a list, or of a long run this, which reads on demand."""
        return self._kept if self._is_kept else self

    @property
    def _is_kept(self) -> bool:
        return self.folder is None or self._count <= MOST_KEPT

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        if self._is_kept:
            yield from self._kept
            return
        assert self.folder is not None
        for place, (_, record) in enumerate(iterate_rounds(self.folder)):
            if place == self._count:
                return
            yield record

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if self._is_kept:
            return self._kept[place]
        places = range(self._count)[place]
        if isinstance(places, int) and places == self._count - 1 and self.last is not None:
            return self.last
        with open(self.folder / ROUNDS, "rb") as file:  # type: ignore[operator]
            if self._starts is None:
                self._starts, at = array("q"), 0
                for line in file:
                    self._starts.append(at)
                    at += len(line)

            def one(number: int) -> Record:
                file.seek(self._starts[number])  # type: ignore[index]
                found: Record = json.loads(file.readline())
                return found

            return one(places) if isinstance(places, int) else [one(number) for number in places]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._count:,} rounds of {self.folder}>"


def cut_back(folder: Path, round_number: int, lost: Collection[str]) -> tuple[History, int]:
    """Cut rounds.jsonl back to the checkpoint's round; what stays, and how many lines there were.

    lost: what the last round of a run that is now longer loses, where the long run would not have measured it.
    """
    kept, count = History(folder), 0
    with whole_file(folder / ROUNDS) as aside, open(aside, "w", encoding="utf-8", newline="\n") as file:
        for line, record in iterate_rounds(folder):
            count += 1
            number = record["round"]
            if number > round_number:
                continue
            if number != len(kept) + 1:
                break
            if number == round_number and lost:
                record = {key: value for key, value in record.items() if key not in lost}
                line = json.dumps(record) + "\n"
            file.write(line if line.endswith("\n") else line + "\n")
            kept.append(record)
        if len(kept) != round_number:
            raise InputError(f"{folder / ROUNDS}: lacks rounds before the checkpoint's, {round_number}")
        # Before the file is changed: this may be refused.
        results = _results_of(folder, {record["round"] for record in kept if has_clients(record)})
    _write_results(folder, results)
    return kept, count


def thinned(rounds: Sequence[Record], most: int = 2 * MOST_KEPT) -> list[Record]:
    """For a picture and a table: all records or, of a long run, about `most`.

    Every k-th round is kept, every k-th evaluated one, every k-th that looked at the clients' own results, the one of
    the best accuracy, and the last.
    """
    step = math.ceil(len(rounds) / most)
    if step <= 1:
        return list(rounds)
    kept, evaluated, looked = dict[int, Record](), 0, 0
    best: tuple[float, int, Record] | None = None
    for place, record in enumerate(rounds):
        judged = "test_loss" in record or "loss" in record
        own = LOOKED in record
        nth = place % step == 0 or (judged and evaluated % step == 0) or (own and looked % step == 0)
        if nth or place == len(rounds) - 1:
            kept[place] = record
        evaluated, looked = evaluated + judged, looked + own
        if (value := record.get("test_accuracy", -math.inf)) > (best[0] if best else -math.inf):
            best = value, place, record
    if best:
        kept[best[1]] = best[2]
    return [kept[place] for place in sorted(kept)]


class ClientHistory(NamedTuple):
    """clients.jsonl: who the clients are, and what each of them got in the rounds that looked at it."""

    examples: np.ndarray  # [N] int64, of training
    test_examples: np.ndarray  # [N] int64, its own
    names: list[str] | None  # [N] of natural clients, as the data call them
    results: list[ClientResults]  # by round

    def records(self) -> list[Record]:
        """Of each round that looked its number and its statistics; own models that diverged have no number here."""
        return [{"round": results.round, **results.record()} for results in self.results]

    def about(self) -> str:
        """The first line of the file."""
        said: dict[str, Any] = {"examples": self.examples.tolist(), "test_examples": self.test_examples.tolist()}
        return json.dumps(said | ({} if self.names is None else {"names": self.names})) + "\n"


def line_of(results: ClientResults) -> str:
    """One evaluation in clients.jsonl; null for a client that has no number: without test examples, or diverged."""
    values = {name: [v if math.isfinite(v) else None for v in one.tolist()] for name, one in results.values.items()}
    return json.dumps({"round": results.round, **values}) + "\n"


def has_clients(record: Record) -> bool:
    """Whether a round looked at every client: clients.jsonl then has a line of it."""
    return LOOKED in record


def clients_of(problem: Problem) -> ClientHistory:
    """Who the clients of a run are, of which nobody got anything yet."""
    own = problem.own if isinstance(problem, Supervised) else None
    tests = np.zeros_like(problem.sizes) if problem.own_sizes is None else problem.own_sizes
    names = None if own is None or own.names is None else [str(one) for one in own.names.tolist()]
    return ClientHistory(problem.sizes, tests, names, [])


def read_clients(folder: Path) -> ClientHistory | None:
    """The clients' own results of a run folder, up to a last line that a kill cut short; None where it has none yet.

    None also where that line is the first one. Raises InputError for a file that is none of ours.
    """
    file = folder / RESULTS
    if not file.is_file():
        return None
    with open(file, encoding="utf-8", errors="replace") as lines:
        first = next(lines, "")
        try:
            said = json.loads(first)
            train, test = (np.array(said[name], dtype=np.int64) for name in ("examples", "test_examples"))
            found = ClientHistory(train, test, said.get("names"), [])
        except (ValueError, KeyError, TypeError, AttributeError):
            if not first.endswith("\n"):
                return None
            raise InputError(f"{file}:1: does not say who the clients are") from None
        for line in lines:
            try:
                values = json.loads(line)
                number = int(values.pop("round"))
                of_all = {name: np.array(one, dtype=np.float64) for name, one in values.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            found.results.append(ClientResults(number, of_all))
    return found


def _results_of(folder: Path, rounds: Collection[int]) -> ClientHistory | None:
    """What clients.jsonl says of these rounds alone. Raises InputError where it lacks one of them."""
    found = read_clients(folder)
    there = set[int]() if found is None else {results.round for results in found.results}
    if missing := set(rounds) - there:
        said = f"lacks round {min(missing)}, in which the clients were looked at (says {ROUNDS})"
        raise InputError(f"{folder / RESULTS}: {said}; put the file back as it was")
    return found and found._replace(results=[results for results in found.results if results.round in rounds])


def _write_results(folder: Path, clients: ClientHistory | None) -> None:
    if clients is None:
        (folder / RESULTS).unlink(missing_ok=True)  # a kill cut its first line short
        return
    with whole_file(folder / RESULTS) as aside, open(aside, "w", encoding="utf-8", newline="\n") as file:
        file.write(clients.about())
        file.writelines(map(line_of, clients.results))
