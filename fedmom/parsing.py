"""Numbers inside strings: a configuration holds scalars only, so lists are written as "80,120" and "1;3"."""

import math

from fedmom.errors import InputError


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
