"""Runs that differ in nothing but the seed are one group; groups are labelled by what differs between them."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedmom.config.keys import KEYS, Scalar
from fedmom.config.load import toml_scalar
from fedmom.errors import InputError
from fedmom.results.reading import Run
from fedmom.results.tables import measures_in, number
from fedmom.tasks.problem import data_kind

# The symbols of docs/method.md.
SYMBOLS = {
    "data.num-clients": "N",
    "algorithm.num-local-steps": "I",
    "algorithm.local-epochs": "E",
    "algorithm.lr": "γ",
    "algorithm.beta": "β",
    "algorithm.weight-decay": "λ",
    "data.batch-size": "B",
    "run.num-steps": "T",
    "run.num-rounds": "R",
    "data.alpha": "Dirichlet α",
    "algorithm.slow-momentum": "slow α",
    "algorithm.slow-lr": "slow η",
}
# Values that say by themselves what they are of.
_PLAIN = ("algorithm.name", "algorithm.topology", "model.name", "data.dataset", "data.partition", "engine.device")
_SAID: dict[str, Callable[[Scalar], str]] = {
    "algorithm.momentum-policy": lambda value: f"momentum {value}",
    "algorithm.nesterov": lambda value: f"option {'II' if value else 'I'}",
    **dict.fromkeys(_PLAIN, str),
}
# What does not make another experiment: the seed, what `auto` chose by timing, and where and how safely it ran.
_SAME = {
    "run.seed",
    "run.out",
    "run.resume",
    "run.checkpoint-every",
    "run.keep-best",
    "data.data-dir",
    *(f"engine.{name}" for name in ("path", "chunk-size", "threads", "remember")),
    *(name for name, key in KEYS.items() if key.section in ("simulation", "server") and name != "server.strategy"),
}

# What the quadratic does not look at: it has no examples and no model.
_OF_EXAMPLES = {
    *(name for name, key in KEYS.items() if key.section == "model"),
    *(f"data.{name}" for name in ("partition", "alpha", "min-size", "shards-per-client", "quantity-law", "sigma")),
    *(f"data.{name}" for name in ("classes", "sampling", "augment")),
}


# Of the keys of data: how a client uses its examples. The others say what the examples are, and who has them.
_OF_TRAINING = ("data.batch-size", "data.sampling", "data.augment", "data.data-dir")
POOLED = "pooled (one client with all data)"


class LeftOut(NamedTuple):
    """A run that is not counted: it is not finished, or it is another one once more."""

    run: Run
    same_as: str = ""

    @property
    def text(self) -> str:
        return f"{self.run.name} ({f'the same run as {self.same_as}' if self.same_as else self.run.standing})"


class Group(NamedTuple):
    """Runs of one configuration with different seeds."""

    label: str
    runs: list[Run]  # those that count, a seed each; [] where none does
    differs: dict[str, Scalar]  # the keys in which groups differ, and this group's values
    left: list[LeftOut] = []  # noqa: RUF012 - never changed
    pooled: bool = False  # one client has all data: what the others are measured by, and none of them

    @property
    def settings(self) -> dict[str, Scalar]:
        return self.members[0].settings

    @property
    def members(self) -> list[Run]:
        return [*self.runs, *(left.run for left in self.left)]

    @property
    def seeds(self) -> str:
        """Of seeds: "3", "2 of 3", "3, 1 unfinished"."""
        of = len(self.runs) + sum(not left.same_as for left in self.left)
        unfinished = sum(not run.is_finished for run in self.runs)
        text = f"{len(self.runs)} of {of}" if of > len(self.runs) else f"{of}"
        return f"{text}, {unfinished} unfinished" if unfinished else text

    @property
    def note(self) -> str:
        """What a reader of its numbers must know; "" where every run of it is finished and counted."""
        counted = [f"{run.name} ({run.standing})" for run in self.runs if not run.is_finished]
        parts = {"left out": [left.text for left in self.left], "counted though not finished": counted}
        return "; ".join(f"{what}: {_several(names)}" for what, names in parts.items() if names)

    @property
    def title(self) -> str:
        """Its label, with the seeds where not all of them are finished and counted."""
        return f"{self.label} ({self.seeds} seeds)" if self.note else self.label

    @property
    def rounds(self) -> list[int]:
        """The rounds that all of its runs have: seeds that ended earlier cut the others there."""
        return sorted(set.intersection(*({record["round"] for record in run.rounds} for run in self.runs)))

    def numbers(self, key: str, rounds: Container[int]) -> np.ndarray:
        """[seeds, P] what the runs have under `key` in rounds that all of them have; NaN where there is no number."""
        found = [[number(record, key) for record in run.rounds if record["round"] in rounds] for run in self.runs]
        return np.array([[np.nan if value is None else value for value in row] for row in found], dtype=np.float64)


def counted_of(groups: Sequence[Group]) -> list[Run]:
    """The runs that count."""
    return [run for group in groups for run in group.runs]


def rivals(groups: Sequence[Group]) -> list[Group]:
    """The groups that are compared with one another: all but a pooled model's."""
    return [group for group in groups if not group.pooled]


def _is_pooled(runs: Sequence[Run]) -> list[bool]:
    """Which runs are of a pooled (centralised) model: N = 1, the data set and the model of the runs of many clients.

    Where N itself varies, over two values above 1 or more, N = 1 is the smallest of them, as in the paper's speedup. A
    quadratic's one client has another objective, and where clients bring their own data one has
    a part of them.
    """

    def problem(run: Run) -> list[Scalar]:
        return [run.settings[key] for key in KEYS if key == "data.dataset" or KEYS[key].section == "model"]

    many = [run for run in runs if run.settings["data.num-clients"] != 1]
    if len({run.settings["data.num-clients"] for run in many}) != 1:
        return [False] * len(runs)
    tasks = [problem(run) for run in many]
    return [
        run.settings["data.num-clients"] == 1
        and problem(run) in tasks
        and (kind := data_kind(run.settings["data.dataset"])).has_examples
        and not kind.own_data
        for run in runs
    ]


def data_setting(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The keys that say what the examples are and who has them: results under other ones answer another question."""
    return {key: value for key, value in settings.items() if key.startswith("data.") and key not in _OF_TRAINING}


def alone(runs: Sequence[Run]) -> list[Group]:
    """Each run as a group of one, called by its name. InputError where there is nothing to show."""
    if not runs:
        raise InputError("no runs to report: name at least one run folder")
    for run in runs:
        if not run.rounds:
            raise InputError(f"run {run.name!r} has no rounds: its rounds.jsonl must hold at least one")
    return [Group(run.name, [run], {}) for run in runs]


def _several(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def group_runs(runs: Sequence[Run], *, unfinished: bool = False) -> list[Group]:
    """Groups in the order of what differs between them (numbers by size, names as they come).

    unfinished: count runs that are not finished too, as far as they got. A run that is alone counts as it is.
    Groups of a pooled model come last; the labels of the others say nothing of what it has otherwise.
    """
    unfinished = unfinished or len(runs) == 1
    pooled = _is_pooled(runs)
    groups = _grouped([run for run, apart in zip(runs, pooled, strict=True) if not apart], unfinished)
    baselines = _grouped([run for run, apart in zip(runs, pooled, strict=True) if apart], unfinished)
    for group in baselines:
        label = f"pooled, {group.label}" if len(baselines) > 1 else POOLED
        groups.append(group._replace(label=label, differs={}, pooled=True))
    return groups


def _grouped(runs: Sequence[Run], unfinished: bool) -> list[Group]:
    keys = differing(runs)
    members: dict[tuple[Scalar, ...], list[Run]] = {}
    for run in runs:
        members.setdefault(tuple(run.settings[key] for key in keys), []).append(run)
    places = [
        {value: place for place, value in enumerate(_in_order(run.settings[key] for run in runs))} for key in keys
    ]
    ordered = sorted(members, key=lambda values: [place[value] for place, value in zip(places, values, strict=True)])
    groups = []
    for values in ordered:
        differs = dict(zip(keys, values, strict=True))
        own = sorted(members[values], key=lambda run: int(run.settings["run.seed"]))
        label = ", ".join(said(key, value) for key, value in differs.items())
        if not label:
            seeds = {run.settings["run.seed"] for run in own}
            label = own[0].name if len(seeds) == 1 else f"{own[0].settings['algorithm.name']}, {len(seeds)} seeds"
        counted, left = _counted(own, unfinished)
        groups.append(Group(label, counted, differs, left))
    return groups


def _counted(runs: Sequence[Run], unfinished: bool) -> tuple[list[Run], list[LeftOut]]:
    """(runs that count, one of each seed; the others)."""
    counted, left = list[Run](), list[LeftOut]()
    for seed in dict.fromkeys(run.settings["run.seed"] for run in runs):
        same = [run for run in runs if run.settings["run.seed"] == seed]
        best = max(same, key=lambda run: (run.is_finished, len(run.rounds)))
        if best.is_finished or (unfinished and best.rounds):
            counted.append(best)
        else:
            left.append(LeftOut(best))
        left += [LeftOut(run, best.name) for run in same if run is not best]
    return counted, left


def of_groups(groups: Sequence[Group]) -> list[str]:
    """The notes of all groups, a line each."""
    return [f"{group.label}: {group.note}" for group in groups if group.note]


def check_counted(groups: Sequence[Group]) -> None:
    """InputError where no run counts."""
    left = [left.text for group in groups for left in group.left]
    if not any(group.runs for group in groups):
        raise InputError(f"no run is finished: {_several(left)}; --unfinished shows how far they got")


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys in which runs differ, without the seed, and without what follows from other keys."""
    keys = [key for key in KEYS if key not in _SAME and len({run.settings[key] for run in runs}) > 1]
    settings = [run.settings for run in runs]
    if not any(data_kind(s["data.dataset"]).has_examples for s in settings):
        keys = [key for key in keys if key not in _OF_EXAMPLES]
    if "algorithm.cohort-size" in keys and all(s["algorithm.cohort-size"] == s["data.num-clients"] for s in settings):
        keys.remove("algorithm.cohort-size")
    if "run.num-rounds" in keys and all(s["run.num-steps"] for s in settings):
        keys.remove("run.num-rounds")  # R = ⌈T / I⌉
    # The order of a sentence: who, how, what with.
    first = ("data.num-clients", "algorithm.name", "algorithm.num-local-steps", "algorithm.momentum-policy")
    return sorted(keys, key=lambda key: (first.index(key) if key in first else len(first), list(KEYS).index(key)))


def said(key: str, value: Scalar) -> str:
    """One setting in words: "I = 4", "momentum reset", "hidden = 100"."""
    if key in _SAID:
        return _SAID[key](value)
    shown = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else toml_scalar(value)
    return f"{SYMBOLS.get(key, KEYS[key].name.replace('_', '-'))} = {shown}"


def _in_order(values: Iterable[Scalar]) -> list[Scalar]:
    unique = list(dict.fromkeys(values))
    numbers = [value for value in unique if isinstance(value, int | float)]
    return [*sorted(numbers)] if len(numbers) == len(unique) else unique


def check_fit(groups: Sequence[Group]) -> None:
    """InputError where results cannot stand in one table: other data, or nothing measured that all runs have."""
    # The data of those that are left out too: the next time they may be finished, and count.
    every = [run for group in groups for run in group.members]
    first = every[0]
    objective = data_kind(first.settings["data.dataset"]).objective
    for run in every:
        for key in ("data.dataset", *objective):
            here, there = first.settings[key], run.settings[key]
            if here != there:
                raise InputError(
                    f"the runs do not fit together: {key} is {here!r} in {first.name} and {there!r} in {run.name}; "
                    "compare runs on the same data"
                )
    common, before = set[str](), first
    for run in counted_of(groups):
        measured = names_of(run)
        if common and measured and not common & measured:
            raise InputError(
                f"the runs do not fit together: {before.name} measured {', '.join(sorted(common))}, "
                f"{run.name} {', '.join(sorted(measured))}; compare runs that share a measure"
            )
        if measured:
            common, before = common & measured or measured, run


def names_of(run: Run) -> set[str]:
    """The measures that some round of a run has."""
    return {measure.key for measure in measures_in([run.rounds], every=True)}


def shared(runs: Sequence[Run]) -> dict[str, Scalar]:
    """The settings that all runs have alike."""
    return {key: runs[0].settings[key] for key in KEYS if len({run.settings[key] for run in runs}) == 1}
