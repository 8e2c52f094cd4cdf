"""Which runs a sweep has: combinations of keys' values, each with its seeds, and a folder name for every run."""

import hashlib
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fedmom.config.keys import KEYS, Scalar
from fedmom.config.load import as_held, load, parse_sets, read_tables, typed_value
from fedmom.config.numbers import as_list, pieces
from fedmom.errors import InputError
from fedmom.records.status import Cell

MOST_RUNS = 100_000
LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255, and some what they add to it


def parse_grid(words: Sequence[str]) -> dict[str, list[Scalar]]:
    """["algorithm.lr=0.1,0.3"] -> {"algorithm.lr": [0.1, 0.3]}. InputError for a wrong key, value or form.

    A value with commas stands in brackets or quotes: "algorithm.lr-milestones=[0.5,0.75],[0.3]".
    """
    grid: dict[str, list[Scalar]] = {}
    for word in words:
        name, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not text:
            raise InputError(f"--grid {word!r}: write SECTION.KEY=VALUE,VALUE,…")
        if name in grid:
            raise InputError(f"--grid {word!r}: {name} is given twice")
        try:
            parts = pieces(text)
        except ValueError as error:
            raise InputError(f"--grid {word!r}: {error}") from None
        known = KEYS.get(name)
        bare = [part for part in parts if part[0] not in "[\"'"]
        if known and known.holds and bare and len(parts) > 1:
            raise InputError(
                f"--grid {word!r}: {name} holds commas itself: write each of its values in brackets, {name}=[{text}] "
                f"for one, {name}={','.join(f'[{part}]' for part in parts)} for {len(parts)}"
            )
        if known and not known.holds and len(bare) < len(parts) and any(part.startswith("[") for part in parts):
            raise InputError(f"--grid {word!r}: {name} holds no list: write its values without brackets")
        grid[name] = [typed_value(name, part) for part in parts]
        doubled = [value for value in grid[name] if grid[name].count(value) > 1]
        if doubled:
            raise InputError(f"--grid {word!r}: {doubled[0]!r} is given twice")
    return grid


def full(grid: Mapping[str, Sequence[Scalar]]) -> list[dict[str, Scalar]]:
    """Every combination, the last key varying fastest. InputError for more than anybody runs."""
    total = math.prod(map(len, grid.values()))
    if total > MOST_RUNS:
        raise InputError(f"--grid: has {total:,} combinations, at most {MOST_RUNS:,} can be run; --random N takes some")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def drawn(grid: Mapping[str, Sequence[Scalar]], number: int, seed: int) -> list[dict[str, Scalar]]:
    """`number` different combinations at random, by the seed alone. InputError for more than there are."""
    total = math.prod(map(len, grid.values()))
    if number > total:
        raise InputError(f"--random {number}: the grid has {total} combinations")
    found = []
    draw, places = random.Random(seed), dict[int, None]()  # places: the grid may be too large to write out
    if total <= sys.maxsize:
        places = dict.fromkeys(draw.sample(range(total), number))
    while len(places) < number:
        places[draw.randrange(total)] = None
    for place in places:
        one = dict[str, Scalar]()
        for key, values in reversed([*grid.items()]):
            place, at = divmod(place, len(values))
            one[key] = values[at]
        found.append({key: one[key] for key in grid})
    return found


def listed(path: Path) -> list[dict[str, Scalar]]:
    """Combinations from a TOML file with a table [[run]] for each: "section.key" = value. InputError by name."""
    try:
        tables = read_tables(path)
    except InputError as error:
        raise InputError(f"--list {error}") from None
    runs = tables.get("run")
    if not isinstance(runs, list) or not all(isinstance(one, dict) for one in runs) or set(tables) != {"run"}:
        raise InputError(f'--list {path}: write a table [[run]] for each run, with lines such as "algorithm.lr" = 0.1')
    return [
        {
            key: as_list(value, KEYS[key].holds) if key in KEYS and KEYS[key].holds else value
            for key, value in one.items()
        }
        for one in map(parse_sets, runs)
    ]


def seeds_of(
    number: int | None, config: Path, sets: Sequence[str], combinations: Sequence[Mapping[str, Scalar]]
) -> Sequence[int]:
    """The seeds of combinations that name none: 0 … number − 1, else the configuration's own (--set included)."""
    where = "--set" if "run.seed" in parse_sets(sets) else ""
    own = any("run.seed" in one for one in combinations)
    if own and (where or number is not None):
        raise InputError(f"run.seed: is given by {where or '--seeds'} and by --grid or --list; leave one of them out")
    if where and number is not None:
        raise InputError(f"--seeds {number}: --set gives run.seed too; for other seeds write --grid run.seed=7,8,9")
    return range(number) if number is not None else [load(config, sets).config.run.seed]


def cells_of(combinations: Sequence[Mapping[str, Scalar]], seeds: Sequence[int]) -> list[Cell]:
    """Every combination with every seed, or with its own. Folder names say what differs."""
    for key in ("run.out", "run.resume"):
        if any(key in one for one in combinations):
            raise InputError(f"{key}: every run of a sweep has a folder of its own, in --out; leave it out")
    keys = list(dict.fromkeys(key for one in combinations for key in one))
    short = {key: key.rpartition(".")[2] for key in keys}
    for key in keys:  # two sections may have a key of one name
        if [*short.values()].count(short[key]) > 1:
            short[key] = key
    cells, seen = list[Cell](), dict[str, str]()
    for one in combinations:
        others = {key: value for key, value in one.items() if key != "run.seed"}
        group = ",".join(f"{short[key]}={_word(value)}" for key, value in others.items()) or "base"
        for seed in [one["run.seed"]] if "run.seed" in one else seeds:
            # In the form that counts: 1 and 1.0 are one lr. Wrong values are for `check` to name.
            sets = {**others, "run.seed": seed}
            same = json.dumps({key: as_held(key, value) for key, value in sets.items()}, sort_keys=True)
            name = _folder_name(group, seed, same, taken={cell.name for cell in cells} if same not in seen else set())
            if same in seen:
                raise InputError(f"two runs of the sweep are the same: {seen[same]} and {name}")
            seen[same] = name
            cells.append(Cell(name, sets, group))
    return cells


def _word(value: Scalar) -> str:
    """A value as part of a folder's name."""
    return str(value).replace(os.sep, "_").replace(" ", "")


def _folder_name(group: str, seed: Scalar, same: str, taken: Collection[str]) -> str:
    """What a run's folder is called; with a hash where that is too long, or another run's already."""
    name = f"{group},seed={seed}"
    if len(name.encode()) <= LONGEST_NAME and name not in taken:
        return name
    start = group.encode()[: LONGEST_NAME - 40].decode(errors="ignore")
    return f"{start},{hashlib.sha256(same.encode()).hexdigest()[:8]},seed={seed}"
