"""An Optuna study by ask and tell: its trials are a sweep's ordinary run folders, and there is no other record of it.

Trial i is asked of a sampler with the seed (run.seed + i) that was told all earlier trials, so what it tries depends on
nothing but the configuration and them: the same command again finds the folders that are there, and goes on.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from fedmom.config.goals import monitored
from fedmom.config.keys import KEYS, Scalar, checked
from fedmom.config.load import flat, load, typed_value
from fedmom.config.numbers import as_number
from fedmom.errors import InputError, missing_package
from fedmom.experiments.grid import cells_of, parse_grid, seeds_of
from fedmom.experiments.ray_crew import runs_at_a_time
from fedmom.experiments.sweep import check, sweep
from fedmom.records.files import CONFIG
from fedmom.records.history import read_rounds
from fedmom.records.status import Cell, CellEnded
from fedmom.tasks.metrics import rises

_DIGITS = 4  # of a number that is tried: a folder's name and a paper show as many
MOST_TRIALS = 9999


class Span(NamedTuple):
    """The numbers of a key from low to high; drawn by their logarithm where high is tenfold low or more."""

    low: float
    high: float
    whole: bool

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high >= 10 * self.low


Values = Mapping[str, Span | Sequence[Scalar]]


def parse_search(words: Sequence[str]) -> dict[str, Span | list[Scalar]]:
    """["algorithm.lr=0.01..1", "algorithm.beta=0,0.9"]: ranges, and lists as of a grid. InputError names the word."""
    found: dict[str, Span | list[Scalar]] = {}
    for word in words:
        name, _, text = (part.strip() for part in word.partition("="))
        if name in found:
            raise InputError(f"--grid {word!r}: {name} is given twice")
        if ".." in text and name in KEYS:
            found[name] = _span(name, text)
        else:  # in the form in which a configuration holds them, and a folder is read back
            found[name] = [checked(name, value) for value in parse_grid([word])[name]]
    return found


def _span(name: str, text: str) -> Span:
    low, high = (as_number(part) for part in text.partition("..")[::2])
    kind, said = KEYS[name].type, f"{name}={text}"
    if kind not in (int, float):
        raise InputError(f"--grid {said!r}: {name} is no number, and has no range; write its values, V,V,…")
    if low is None or high is None or not low < high < math.inf:
        raise InputError(f"--grid {said!r}: write a range as LOW..HIGH, such as algorithm.lr=0.01..1")
    for bound in (low, high):
        checked(name, bound)
    return Span(low, high, kind is int)


def search_of(grid: Mapping[str, Any]) -> dict[str, Span | list[Scalar]]:
    """The same from Python: {"algorithm.lr": "0.01..1", "algorithm.beta": [0, 0.9]}."""
    found: dict[str, Span | list[Scalar]] = {}
    for name, values in grid.items():
        if isinstance(values, str):
            found |= parse_search([f"{name}={values}"])
        else:
            found[name] = [checked(name, typed_value(name, v) if isinstance(v, str) else v) for v in values]
    return found


def study(
    config: Path,
    search: Values,
    number: int,
    out: Path,
    *,
    sets: Sequence[str] = (),
    seeds: int | None = None,
    metric: str = "",
    workers: int | None = None,
    ray: str = "",
    track: Sequence[str] = (),
) -> Iterator[CellEnded]:
    """Run `number` trials, each with all seeds, and give every run as it ends, those of earlier calls too.

    A trial is told its metric's last value, the mean over the seeds; a run that diverged is the worst there is. Trials
    go in groups of so many that `workers` have a run each, and those of a group do not know of one another's values.
    Raises InputError before any run begins, where Optuna is missing too.
    """
    _optuna()
    if "run.seed" in search:
        raise InputError("run.seed: is what a trial's value is the mean over; give --seeds")
    if not 1 <= number <= MOST_TRIALS or not search:
        raise InputError(f"--optuna {number}: give 1 to {MOST_TRIALS} trials, and --grid SECTION.KEY=LOW..HIGH")
    own = load(config, sets).config
    runs = seeds_of(seeds, config, sets, [])
    metric = metric or monitored(own, own.run.monitor)
    workers = runs_at_a_time(workers, ray)
    side = max(1, workers // len(runs))
    told: list[Any] = []
    # What can be known before the first run: the ends of every range, and the first value of every list.
    ends = [{name: _end(values, high) for name, values in search.items()} for high in (False, True)]
    for sample in ends[: 1 + any(isinstance(values, Span) for values in search.values())]:
        check(config, cells_of([sample], runs), out, sets, here=not ray, metric=metric)
    for first in range(0, number, side):
        trials = range(first, min(first + side, number))
        tried: list[dict[str, Scalar]] = []
        for i in trials:
            tried.append(_recorded(out, i, search) or _ask(search, own.run.seed + i, metric, told, tried))
        cells = [_named(i, one) for i, sets_of in zip(trials, tried, strict=True) for one in cells_of([sets_of], runs)]
        check(config, cells, out, sets, here=not ray, metric=metric)
        ended = list[CellEnded]()
        for one in sweep(config, cells, out, sets=sets, workers=workers, ray=ray, track=track):
            ended.append(one)
            yield one
        if len(ended) < len(cells) or any(one.status == "interrupted" for one in ended):
            return
        for i, values in zip(trials, tried, strict=True):
            told.append(_trial(search, values, _value_of([e for e in ended if _is(e.cell, i)], out, metric)))


def _end(values: Span | Sequence[Scalar], high: bool) -> Scalar:
    if not isinstance(values, Span):
        return values[0]
    return values.high if high else values.low


def _named(number: int, cell: Cell) -> Cell:
    return cell._replace(name=f"{number:04d},{cell.name}", group=f"{number:04d},{cell.group}")


def _is(cell: Cell, number: int) -> bool:
    return cell.name.startswith(f"{number:04d},")


def _recorded(out: Path, number: int, search: Values) -> dict[str, Scalar] | None:
    """What trial 0, 1, … tried, where it has a folder. InputError where that is another search's."""
    for folder in sorted(out.glob(f"{number:04d},*")):
        if (folder / CONFIG).is_file():
            settings = flat(load(folder / CONFIG).config)
            found = {name: settings[name] for name in search}
            for name, values in search.items():
                value: Any = found[name]
                if not (values.low <= value <= values.high if isinstance(values, Span) else value in values):
                    raise InputError(f"{folder}: has {name} = {value!r}, which --grid does not; take another --out")
            return found
    return None


def _ask(search: Values, seed: int, metric: str, told: Sequence[Any], beside: Sequence[Mapping[str, Scalar]]) -> Any:
    """What a trial tries, by the seed, the trials so far, and those that run beside it."""
    optuna = _optuna()
    spaces = _spaces(search)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's, of what is new in it
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
    asked = optuna.create_study(sampler=sampler, direction="maximize" if rises(metric) else "minimize")
    state = optuna.trial.TrialState.RUNNING
    running = [optuna.trial.create_trial(state=state, params=dict(one), distributions=spaces) for one in beside]
    asked.add_trials([*told, *running])
    found = asked.ask(spaces).params
    return {name: _rounded(search[name], found[name]) for name in search}


def _rounded(values: Span | Sequence[Scalar], value: Any) -> Scalar:
    if not isinstance(values, Span) or values.whole:
        return value
    return min(max(float(f"{value:.{_DIGITS}g}"), float(values.low)), float(values.high))


def _spaces(search: Values) -> dict[str, Any]:
    """The search as Optuna has it."""
    kinds = _optuna().distributions
    return {
        name: (
            (kinds.IntDistribution if values.whole else kinds.FloatDistribution)(
                values.low, values.high, log=values.log
            )
            if isinstance(values, Span)
            else kinds.CategoricalDistribution(list(values))
        )
        for name, values in search.items()
    }


def _trial(search: Values, values: Mapping[str, Scalar], value: float | None) -> Any:
    """A trial that has ended; None: it diverged or failed, which a sampler takes for the worst."""
    optuna = _optuna()
    state = optuna.trial.TrialState.PRUNED if value is None else optuna.trial.TrialState.COMPLETE
    return optuna.trial.create_trial(state=state, value=value, params=dict(values), distributions=_spaces(search))


def _value_of(ended: Sequence[CellEnded], out: Path, metric: str) -> float | None:
    """The metric's last value, the mean over the seeds; None where one has none."""
    found = list[float]()
    for one in ended:
        rounds = read_rounds(out / one.cell.name) if one.status == "done" else []
        last = next((r[metric] for r in reversed(rounds) if isinstance(r.get(metric), int | float)), math.nan)
        found.append(float(last))
    return mean(found) if found and all(map(math.isfinite, found)) else None


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise missing_package("--optuna", "optuna", "optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
