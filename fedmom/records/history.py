"""rounds.jsonl: a line per round, read, cut back and looked at without holding all of it."""

import contextlib
import json
import math
import os
from array import array
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import overload

from fedmom.errors import InputError
from fedmom.machine.files import whole_file
from fedmom.records.files import ROUNDS
from fedmom.rounds.loop import Record

MOST_KEPT = 10_000  # records of a run that are held in memory, 1.4 kB each; of a longer one its folder is read


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


def cut_back(folder: Path, round_number: int, eval_every: int, measures: Collection[str]) -> tuple[History, int]:
    """Cut rounds.jsonl back to the checkpoint's round; what stays, and how many lines there were.

    The last round of a run that is now longer loses its evaluation where the long run would not have made it.
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
            if number == round_number and number % eval_every:
                record = {key: value for key, value in record.items() if key not in measures}
                line = json.dumps(record) + "\n"
            file.write(line if line.endswith("\n") else line + "\n")
            kept.append(record)
        if len(kept) != round_number:
            raise InputError(f"{folder / ROUNDS}: lacks rounds before the checkpoint's, {round_number}")
    return kept, count


def thinned(rounds: Sequence[Record], most: int = 2 * MOST_KEPT) -> list[Record]:
    """For a picture and a table: all records or, of a long run, about `most`.

    Every k-th round and every k-th evaluated one are kept, the one of the best accuracy, and the last.
    """
    step = math.ceil(len(rounds) / most)
    if step <= 1:
        return list(rounds)
    kept, evaluated = dict[int, Record](), 0
    best: tuple[float, int, Record] | None = None
    for place, record in enumerate(rounds):
        judged = "test_loss" in record or "loss" in record
        if place % step == 0 or place == len(rounds) - 1 or (judged and evaluated % step == 0):
            kept[place] = record
        evaluated += judged
        if (value := record.get("test_accuracy", -math.inf)) > (best[0] if best else -math.inf):
            best = value, place, record
    if best:
        kept[best[1]] = best[2]
    return [kept[place] for place in sorted(kept)]
