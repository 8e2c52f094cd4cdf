"""Groups of runs -> sheets: at the end, where all can be compared, on the way to a target, and the speedup over N."""

from collections.abc import Callable, Sequence
from math import ceil, floor, isfinite, log10
from statistics import median
from typing import NamedTuple

from fedmom.config.goals import ALIASES
from fedmom.errors import InputError, unknown
from fedmom.results.groups import Group, alone, check_counted, counted_of, names_of, rivals, said
from fedmom.results.reading import Run
from fedmom.results.sheets import Column, Sheet, Stat, Value, stat, written
from fedmom.results.tables import MEASURES, Measure, byte_unit, finite, last_evaluated, measure_of, measures_in, number
from fedmom.rounds.loop import Record
from fedmom.tasks.metrics import is_share

AXES = {"round": "rounds", "joint_epochs": "joint epochs", "bytes_sent": "bytes", "wall_seconds": "seconds"}
COSTS = ("round", "joint_epochs", "bytes_sent")  # seconds are the machine's too
_ALIASES = {"loss": "test_loss"} | ALIASES
N = "data.num-clients"


class Target(NamedTuple):
    """A value that a run reaches sooner or later."""

    measure: Measure
    value: float

    @property
    def title(self) -> str:
        sign = "≥" if self.measure.rises else "≤"
        return f"{self.measure.title} {sign} {self.measure.factor * self.value:.4g}{self.measure.unit}"

    def reached(self, rounds: Sequence[Record]) -> Record | None:
        """The first evaluation at which it was reached."""
        for record in rounds:
            value = number(record, self.measure.key)
            if value is not None and (value >= self.value if self.measure.rises else value <= self.value):
                return record
        return None


def parse_target(text: str, runs: Sequence[Run]) -> Target:
    """ "accuracy=0.8", "accuracy=80%", "test_loss=0.5". InputError for another form, or a metric that no run has."""
    name, equals, number_text = (part.strip() for part in text.partition("="))
    percent = number_text.endswith("%")
    try:
        value = float(number_text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        equals = ""
    if not equals:
        raise InputError(f"--target {text!r}: write METRIC=NUMBER, such as accuracy=0.8 or loss=0.5")
    measured = sorted(set[str]().union(*(names_of(run) for run in runs)))
    name = name if name in measured else _ALIASES.get(name, name)
    if name not in measured:
        error = unknown("--target", name, measured or [measure.key for measure in MEASURES])
        raise InputError(f"{error} (no run has another)")
    if not isfinite(value):
        raise InputError(f"--target {text!r}: {number_text} is reached by no run, or by every one; write a number")
    measure = measure_of(name)
    assert measure is not None  # it was measured
    if is_share(name) and not 0 < value <= 1:
        raise InputError(f"--target {text!r}: an accuracy is in (0, 1]; write accuracy=0.8 or accuracy=80%")
    return Target(measure, value)


def usual_targets(runs: Sequence[Run]) -> list[Target]:
    """Of the first measure, the hardest value that every run reached, rounded to the easier side.

    Runs that never came near it (half as good as the best) do not hold the others back.
    """
    # Accuracy before all others.
    measures = sorted(measures_in(run.rounds for run in runs), key=lambda measure: measure.key != "test_accuracy")
    measure = next((m for m in measures if any(finite(run.rounds, m.key) for run in runs)), None)
    if measure is None:
        return []
    best = [max(found) if measure.rises else min(found) for run in runs if (found := finite(run.rounds, measure.key))]
    if measure.rises:
        worst = min(value for value in best if value >= 0.5 * max(best))
        value = floor(1000 * worst + 1e-9) / 1000
    else:
        worst = max(best)
        digits = 2 - floor(log10(worst)) if worst > 0 else 0
        value = ceil(worst * 10.0**digits - 1e-9) / 10.0**digits
    return [Target(measure, value)] if value > 0 else []


def all_sheets(groups: Sequence[Group], targets: Sequence[Target]) -> list[Sheet]:
    """Every table, each with what it leaves out: at the end and to the targets first, then the others.

    A pooled model has a row in the first ones alone: its rounds, epochs and bytes are none that others could equal.
    Raises InputError where no run counts.
    """
    check_counted(groups)
    sheets = [end_sheet(groups), *(target_sheet(groups, target) for target in targets)]
    ours = rivals(groups)
    if len(ours) > 1:
        sheets += [sheet for axis in AXES if (sheet := equal_sheet(ours, axis)).rows]
    sheets += [speedup for target in targets if (speedup := speedup_sheet(ours, target)) is not None]
    left = {group.label: group.note for group in groups}
    return [sheet._replace(left=left) for sheet in sheets] if any(left.values()) else sheets


def run_sheets(runs: Sequence[Run]) -> list[Sheet]:
    """What a report says of runs, a row each: where they ended, and where all of them can be compared."""
    groups = alone(runs)
    return [end_sheet(groups, of_runs=True), *(equal_sheet(groups, axis, of_runs=True) for axis in COSTS)]


def measures_of(runs: Sequence[Run]) -> Sequence[Measure]:
    """The measures that at least one of the runs has; the classifier's where none was ever evaluated."""
    return measures_in(run.rounds for run in runs) or MEASURES[:2]


def _column(measure: Measure) -> Column:
    return Column(measure.title, measure.digits, measure.unit)


def _divided(value: float | None, divisor: float) -> float | None:
    return None if value is None else value / divisor


def _measured(record: Record, measure: Measure) -> float | None:
    value = number(record, measure.key)
    return None if value is None else measure.factor * value


def _last(key: str, divisor: float = 1.0) -> Callable[[Run], float | None]:
    return lambda run: _divided(number(run.rounds[-1], key), divisor)


def _evaluated(measure: Measure) -> Callable[[Run], float | None]:
    return lambda run: _measured(last_evaluated(run.rounds), measure)


def _best(measure: Measure) -> Callable[[Run], float | None]:
    return lambda run: max((measure.factor * value for value in finite(run.rounds, measure.key)), default=None)


def _speed(run: Run) -> float | None:
    """The median: a slow first round (compilation, caches) does not count."""
    speeds = finite(run.rounds, "client_steps_per_second")
    return median(speeds) if speeds else None


def _named(group: Group, of_runs: bool) -> list[Value]:
    """What a row begins with; of single runs there are no seeds to tell of."""
    return [group.label] if of_runs else [group.label, group.seeds]


def _naming(of_runs: bool) -> list[Column]:
    return [Column("run")] if of_runs else [Column("run"), Column("seeds")]


def _sent_unit(runs: Sequence[Run]) -> tuple[float, str]:
    return byte_unit(max((end for run in runs for end in finite(run.rounds[-1:], "bytes_sent")), default=0.0))


def end_sheet(groups: Sequence[Group], *, of_runs: bool = False) -> Sheet:
    """Where each group ended: counts of the last round, values of the last evaluation.

    of_runs: the groups are of one run each, which is told with its steps, and without what is said of seeds.
    """
    runs = counted_of(groups)
    divisor, unit = (1e6, "MB") if of_runs else _sent_unit(runs)
    columns = list[tuple[Column, Callable[[Run], float | None]]]()
    # What was reached stands first, accuracies before losses, then what it cost.
    for measure in sorted(measures_of(runs), key=lambda one: not one.rises):
        columns.append((_column(measure), _evaluated(measure)))
        if measure.key == "test_accuracy":
            columns.append((_column(measure)._replace(title="best accuracy"), _best(measure)))
    columns.append((Column("rounds"), _last("round")))
    columns += [(Column("local steps"), _last("steps"))] * of_runs
    columns += [(Column("joint epochs"), _last("joint_epochs")), (Column(f"{unit} sent"), _last("bytes_sent", divisor))]
    columns += [(Column("seconds"), _last("wall_seconds")), (Column("client-steps/s"), _speed)]
    rows = [
        [*_named(group, of_runs), *(stat([value(run) for run in group.runs]) for _, value in columns)]
        for group in groups
    ]
    of_seeds = "" if of_runs else ", mean ± standard deviation over seeds"
    note = (
        f"At the last evaluation{of_seeds}. Joint epochs: examples that all clients used, over the number of examples. "
    )
    note += "client-steps/s: the median over the rounds."
    return Sheet("at-the-end", "At the end", [*_naming(of_runs), *(column for column, _ in columns)], rows, note)


def equal_sheet(groups: Sequence[Group], axis: str, *, of_runs: bool = False) -> Sheet:
    """Every group at the largest value of `axis` that all runs reached, and before it at half of that value.

    A run that never moves along the axis (one client sends nothing) does not hold the others back; no rows where no
    run moves. of_runs: the groups are of one run each, whose bytes are each in a unit of their own.
    """
    if axis not in AXES:
        raise unknown("axis", axis, AXES)
    runs = counted_of(groups)
    measures = measures_of(runs)
    ends = [max(finite(run.rounds, axis), default=0.0) for run in runs]
    end = min((end for end in ends if end > 0), default=0.0)
    half = float(floor(end / 2)) if axis == "round" else end / 2
    own_unit = of_runs and axis == "bytes_sent"
    divisor, unit = byte_unit(end) if axis == "bytes_sent" else (1.0, AXES[axis])

    def place(values: Sequence[float | None]) -> Value:
        if own_unit and values[0] is not None:
            by, own = byte_unit(values[0])
            return f"{written(stat([values[0] / by]), '')} {own}"
        return stat([_divided(value, divisor) for value in values])

    at = {"round": "round", "bytes_sent": "bytes sent"}.get(axis, unit) if of_runs else unit
    columns = [*_naming(of_runs), Column(f"at {at}"), Column("evaluated at")]
    columns += map(_column, measures)
    rows = list[list[Value]]()
    for limit in (half, end):
        for group in groups if limit > 0 else ():
            found = [_evaluated_by(run.rounds, axis, limit) for run in group.runs]
            places = [place([limit]), place([number(record, axis) for record in found])]
            measured = [stat([_measured(record, measure) for record in found]) for measure in measures]
            rows.append([*_named(group, of_runs), *places, *measured])
    name = AXES[axis].replace(" ", "-")
    note = "The last evaluation at or before the largest value that all runs reached, and at or before half of it."
    return Sheet(f"equal-{name}", f"At equal {AXES[axis]}", columns, rows, "" if of_runs else note)


def _evaluated_by(rounds: Sequence[Record], axis: str, limit: float) -> Record:
    ceiling = limit * (1 + 1e-9)  # joint epochs are sums of fractions
    return last_evaluated([r for r in rounds if (at := number(r, axis)) is not None and at <= ceiling])


def target_sheet(groups: Sequence[Group], target: Target) -> Sheet:
    """What it took each group to get there."""
    divisor, unit = _sent_unit(counted_of(groups))
    columns = [Column("run"), Column("seeds"), Column("reached by")]
    columns += [
        Column("rounds"),
        Column("local steps"),
        Column("joint epochs"),
        Column(f"{unit} sent"),
        Column("seconds"),
    ]
    rows = list[list[Value]]()
    for group in groups:
        found = [record for run in group.runs if (record := target.reached(run.rounds)) is not None]
        row: list[Value] = [group.label, group.seeds, f"{len(found)} of {len(group.runs)}"]
        for key in ("round", "steps", "joint_epochs", "bytes_sent", "wall_seconds"):
            row.append(stat([_divided(number(r, key), divisor if key == "bytes_sent" else 1.0) for r in found]))
        rows.append(row)
    note = (
        "What it took until the first evaluation that reached it, over the seeds that did; local steps: of one client."
    )
    return Sheet(f"to-{_slug(target)}", f"To {target.title}", columns, rows, note)


def _slug(target: Target) -> str:
    return f"{target.measure.key.replace('_', '-')}-{target.measure.factor * target.value:g}"


class Speedup(NamedTuple):
    """How much sooner N clients reach a target than the fewest of the same settings."""

    label: str  # what the runs have in common
    num_clients: list[int]
    seeds: list[str]  # how many, of each N
    by_steps: list[Stat | None]  # in local steps of one client: time, if all clients work at once
    by_seconds: list[Stat | None]  # on the clock of these runs


def speedups(groups: Sequence[Group], target: Target) -> list[Speedup]:
    """One for all groups that differ in N alone; [] where N does not vary, or too few reached the target."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        others = {key: value for key, value in group.differs.items() if key != N}
        families.setdefault(", ".join(said(*item) for item in others.items()), []).append(group)
    found = []
    for label, members in families.items():
        members = sorted((group for group in members if group.runs), key=lambda group: int(group.settings[N]))
        if len(members) < 2:
            continue
        columns = []
        for key in ("steps", "wall_seconds"):
            taken = [[_taken(run, target, key) for run in group.runs] for group in members]
            first = stat(taken[0])
            columns.append([stat([first.mean / t if first and t else None for t in times]) for times in taken])
        if sum(cell is not None for cell in columns[0]) > 1:
            sizes = [int(group.settings[N]) for group in members]
            seeds = [group.seeds for group in members]
            found.append(Speedup(label or "all clients together", sizes, seeds, *columns))
    return found


def _taken(run: Run, target: Target, key: str) -> float | None:
    record = target.reached(run.rounds)
    return None if record is None else number(record, key)


def speedup_sheet(groups: Sequence[Group], target: Target) -> Sheet | None:
    found = speedups(groups, target)
    if not found:
        return None
    columns = [Column("run"), Column("N"), Column("seeds"), Column("ideal"), Column("by steps"), Column("by seconds")]
    rows = list[list[Value]]()
    for family in found:
        for n, seeds, *columns_of_n in zip(*family[1:], strict=True):
            ideal = Stat(n / family.num_clients[0], None, 1, 1)
            rows.append([family.label, str(n), seeds, ideal, *columns_of_n])
    note = (
        "How many times sooner than the fewest clients; by steps: local steps of one client, which is time where all "
        "clients work at once; by seconds: on this machine's clock. Ideal is linear in N."
    )
    return Sheet(f"speedup-{_slug(target)}", f"Speedup over N, to {target.title}", columns, rows, note)
