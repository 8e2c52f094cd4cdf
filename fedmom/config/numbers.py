"""Text -> values, as people type them; and lists inside strings, for a configuration holds scalars only.

A list is written as "80,120", one list per client as "1;3"; on the command line also as [80,120] and [[1],[3]].
"""

import inspect
import math
import os
import re
import tomllib
from typing import Any, NamedTuple

import numpy as np

from fedmom.errors import InputError

# TOML has neither ".1" nor "5."; "05" stays out here too: it may be the rest of a decimal comma.
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][\d_]*)(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d+)?", re.ASCII)
_CLOSING = {"[": "]", '"': '"', "'": "'"}
Number = int | float


def as_number(text: str) -> Number | None:
    """The number that somebody typed (".1", "5.", "+1", "1e-3", "1_000"), or None if it is none."""
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return int(text) if text.lstrip("+-").replace("_", "").isdigit() else float(text)
    except ValueError:  # two underscores side by side; more digits than Python reads
        return None


def typed(text: str, kind: type[Any] | None = None) -> Any:
    """A value from the command line, read as `kind` where it can be, else as it stands; None: a kind nobody knows."""
    text = text.strip()
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), _toml(text))
    if kind is str:
        found = _toml(text) if text[:1] in ('"', "'") else text
        return found if isinstance(found, str) else text
    found = as_number(text)
    found = _toml(text) if found is None else found
    whole = kind is int and isinstance(found, float) and found.is_integer()
    return int(found) if whole else found  # 1e3 rounds


def _toml(text: str) -> Any:
    """What TOML reads, else the text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, 4,300 digits, or brackets without end
        return text


def read_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML file. ValueError, with a remedy for a number such as .1 or 5."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("brackets without end") from None
    except ValueError as error:
        for number, line in enumerate(text.splitlines(), 1):
            found = re.search(r"=\s*([+-]?(?:\.\d+|\d+\.(?!\d))(?:[eE][+-]?\d+)?)\s*(?:#.*)?$", line)
            if found and f"at line {number}," in str(error):
                raise ValueError(f"{error}; in a file, {found[1]} is written {float(found[1])}") from None
        raise


def pieces(text: str) -> list[str]:
    """ "0.1, [1,2],'a,b'" -> ["0.1", "[1,2]", "'a,b'"]: split at commas outside of brackets and quotes.

    ValueError, in words, for a bracket or a quote without its end, and for a piece that is empty.
    """
    found, begin, closing, fresh = list[str](), 0, list[str](), True
    for place, letter in enumerate(f"{text},"):
        if closing and letter == closing[-1]:
            closing.pop()
        elif closing[-1:] in (['"'], ["'"]):
            continue
        elif fresh and letter in _CLOSING:  # brackets and quotes inside a name are letters
            closing.append(_CLOSING[letter])
        elif letter == "," and not closing:
            found.append(text[begin:place].strip())
            begin = place + 1
        fresh = letter in ",[" or (fresh and letter.isspace())
    if closing:
        raise ValueError(f"a closing {closing[-1]} is missing")
    if not all(found):
        raise ValueError('a value is missing (an empty one is written "")')
    return found


def without_brackets(text: str) -> str:
    """ "[0.5, 0.75]" -> "0.5,0.75" and "[[1,2],[3]]" -> "1,2;3"; other text as it is."""
    if not (text.startswith("[") and text.endswith("]")):
        return text
    parts = pieces(text[1:-1])
    if all(part.startswith("[") for part in parts):
        return ";".join(map(without_brackets, parts))
    return ",".join(str(typed(part, str)) for part in parts)


def as_list(value: Any, separator: str) -> Any:
    """A list as a configuration holds it, from TOML's or Python's: [80, 120] -> "80,120", with ";" [[1], [3]] -> "1;3".

    Other values as they are, for whoever checks them.
    """
    if not isinstance(value, list | tuple):
        return value
    if separator == ";":
        rows = [as_list(row, ",") for row in value]
        return ";".join(rows) if rows and all(isinstance(row, list | tuple) for row in value) else value
    plain = all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in value)
    return ",".join(map(str, value)) if plain else value


def parse_numbers(key: str, text: str) -> tuple[float, ...]:
    """ "80, 120" -> (80.0, 120.0). Raises InputError naming `key` unless all are finite numbers."""
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise InputError(f'{key} = {text!r}: must be numbers separated by commas, as in "80,120"')
    return numbers


def parse_table(key: str, text: str) -> tuple[tuple[float, ...], ...]:
    """ "1,2;3,4" -> ((1.0, 2.0), (3.0, 4.0)): clients separated by ; and coordinates by ,"""
    try:
        return tuple(parse_numbers(key, row) for row in text.split(";"))
    except InputError:
        raise InputError(
            f'{key} = {text!r}: must be numbers, clients separated by ; and coordinates by , as in "1,2;3,4"'
        ) from None


def counted(number: int, one: str, several: str = "") -> str:
    """A number of things in words: `several` ("replies") where it is not `one` ("reply"), whose plural takes an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


PERCENT = ".1f"  # how every accuracy is written, in tables, pictures, pages, bars and views: 100 times the share


def percent(share: float) -> str:
    """0.973 as "97.3 %"."""
    return f"{100 * share:{PERCENT}} %"


class Range(NamedTuple):
    """The numbers that a key may take; called with one it says what would be right, or None where it is."""

    low: float
    high: float = math.inf
    with_low: bool = True
    with_high: bool = False

    def __call__(self, value: float) -> str | None:
        above = self.low <= value if self.with_low else self.low < value
        below = value <= self.high if self.with_high else value < self.high
        return None if above and below else f"must be {self}"

    def __str__(self) -> str:
        if self.high == math.inf:
            return f">= {self.low:g}" if self.with_low else f"a number > {self.low:g}"
        left, right = "[" if self.with_low else "(", "]" if self.with_high else ")"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


def above(low: float) -> Range:
    return Range(low, with_low=False)


def at_least(low: float) -> Range:
    return Range(low)


def within(low: float, high: float) -> Range:
    return Range(low, high)


def summary_of(entry: object) -> str:
    """What a table of choices says of one: its sentence, its entry's, or of a function its docstring's first line."""
    if isinstance(entry, str):
        return entry
    if callable(entry) and not hasattr(entry, "summary"):
        return (inspect.getdoc(entry) or "").partition("\n")[0].rstrip(".")
    return str(getattr(entry, "summary", ""))


def shown(value: Any) -> str:
    """A wrong value as a message shows it: its repr, whatever its length."""
    try:
        return repr(value)
    except ValueError:  # Python writes out no whole number of more than 4,300 digits
        return "(thousands of digits)"


def as_plain(value: Any, kind: type[Any], holds: str = "") -> Any:
    """What a caller from Python may pass as well: numpy's numbers, paths, whole numbers for floats, lists."""
    value = value.item() if isinstance(value, np.generic) else value
    value = as_list(value, holds) if holds else value
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 2**1000 else math.inf * (1 if value > 0 else -1)
    return value
