"""Groups of runs -> sheets: at the end, where all can be compared, on the way to a target, and the speedup over N."""

from collections.abc import Callable, Sequence
from math import ceil, floor, isfinite, log10
from statistics import median
from typing import NamedTuple

from fedmom.errors import InputError, unknown
from fedmom.results.groups import Group, check_counted, names_of, said
from fedmom.results.reading import Run
from fedmom.results.sheets import Cell, Column, Sheet, Stat, stat
from fedmom.results.tables import MEASURES, Measure, byte_unit, finite, last_evaluated, measures_of, number
from fedmom.rounds.loop import Record

AXES = {"round": "rounds", "joint_epochs": "joint epochs", "bytes_sent": "bytes", "wall_seconds": "seconds"}
_ALIASES = {"accuracy": "test_accuracy", "loss": "test_loss"}
_BY_KEY = {measure.key: measure for measure in MEASURES}
N = "data.num-clients"


class Target(NamedTuple):
    """A value that a run reaches sooner or later."""

    measure: Measure
    value: float

    @property
    def rises(self) -> bool:
        return "accuracy" in self.measure.key

    @property
    def title(self) -> str:
        name, digits = self.measure.title.replace(" (%)", ""), ".4g"
        unit = " %" if self.measure.factor == 100 else ""
        return f"{name} {'≥' if self.rises else '≤'} {format(self.measure.factor * self.value, digits)}{unit}"

    def reached(self, rounds: Sequence[Record]) -> Record | None:
        """The first evaluation at which it was reached."""
        for record in rounds:
            value = number(record, self.measure.key)
            if value is not None and (value >= self.value if self.rises else value <= self.value):
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
        error = unknown("--target", name, measured or list(_BY_KEY))
        raise InputError(f"{error} (no run has another)")
    if not isfinite(value):
        raise InputError(f"--target {text!r}: {number_text} is reached by no run, or by every one; write a number")
    target = Target(_BY_KEY[name], value)
    if target.rises and not 0 < value <= 1:
        raise InputError(f"--target {text!r}: an accuracy is in (0, 1]; write accuracy=0.8 or accuracy=80%")
    return target


def usual_targets(runs: Sequence[Run]) -> list[Target]:
    """Of the first measure, the hardest value that every run reached, rounded to the easier side.

    Runs that never came near it (half as good as the best) do not hold the others back.
    """
    measure = next((m for m in MEASURES if any(finite(run.rounds, m.key) for run in runs)), None)
    accuracy = _BY_KEY["test_accuracy"]
    if any(finite(run.rounds, accuracy.key) for run in runs):
        measure = accuracy
    if measure is None:
        return []
    rises = "accuracy" in measure.key
    best = [max(found) if rises else min(found) for run in runs if (found := finite(run.rounds, measure.key))]
    if rises:
        worst = min(value for value in best if value >= 0.5 * max(best))
        value = floor(1000 * worst + 1e-9) / 1000
    else:
        worst = max(best)
        digits = 2 - floor(log10(worst)) if worst > 0 else 0
        value = ceil(worst * 10.0**digits - 1e-9) / 10.0**digits
    return [Target(measure, value)] if value > 0 else []


def all_sheets(groups: Sequence[Group], targets: Sequence[Target]) -> list[Sheet]:
    """Every table, each with what it leaves out. InputError where no run counts."""
    check_counted(groups)
    sheets = [end_sheet(groups)]
    if len(groups) > 1:
        sheets += [sheet for axis in AXES if (sheet := equal_sheet(groups, axis)).rows]
    sheets += [target_sheet(groups, target) for target in targets]
    sheets += [speedup for target in targets if (speedup := speedup_sheet(groups, target)) is not None]
    left = {group.label: group.note for group in groups}
    return [sheet._replace(left=left) for sheet in sheets] if any(left.values()) else sheets


def _of(group: Group, value: Callable[[Run], float | None]) -> Stat | None:
    return stat([value(run) for run in group.runs])


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def end_sheet(groups: Sequence[Group]) -> Sheet:
    """Where each group ended: counts of the last round, values of the last evaluation."""
    histories = [run.history for group in groups for run in group.runs]
    measures = measures_of(histories)
    columns = [Column("run"), Column("seeds"), Column("rounds"), Column("joint epochs")]
    for measure in measures:
        columns.append(Column(measure.title, measure.digits))
        if measure.key == "test_accuracy":
            columns.append(Column("best (%)", ".2f"))
    largest = max((end for h in histories for end in finite(h.rounds[-1:], "bytes_sent")), default=0.0)
    divisor, unit = byte_unit(largest)
    columns += [Column(f"{unit} sent"), Column("seconds"), Column("client-steps/s")]
    rows = []
    for group in groups:
        row: list[Cell] = [group.label, group.seeds]
        row += [stat([number(run.rounds[-1], key) for run in group.runs]) for key in ("round", "joint_epochs")]
        last = [last_evaluated(run.rounds) for run in group.runs]
        for measure in measures:
            row.append(stat([_scaled(number(record, measure.key), measure.factor) for record in last]))
            if measure.key == "test_accuracy":
                row.append(_of(group, lambda run: 100 * max(finite(run.rounds, "test_accuracy"), default=float("nan"))))
        row.append(_of(group, lambda run: _scaled(number(run.rounds[-1], "bytes_sent"), 1 / divisor)))
        row.append(_of(group, lambda run: number(run.rounds[-1], "wall_seconds")))
        row.append(_of(group, lambda run: median(finite(run.rounds, "client_steps_per_second") or [float("nan")])))
        rows.append(row)
    note = "Of the last evaluation, mean ± standard deviation over seeds; client-steps/s: median over the rounds."
    return Sheet("at-the-end", "At the end", columns, rows, note)


def equal_sheet(groups: Sequence[Group], axis: str) -> Sheet:
    """Every group at the largest value of `axis` that all runs reached, and before it at half of that value."""
    runs = [run for group in groups for run in group.runs]
    measures = measures_of([run.history for run in runs])
    ends = [max(finite(run.rounds, axis), default=0.0) for run in runs]
    end = min((end for end in ends if end > 0), default=0.0)
    half = float(floor(end / 2)) if axis == "round" else end / 2
    divisor, unit = byte_unit(end) if axis == "bytes_sent" else (1.0, AXES[axis])
    columns = [Column("run"), Column("seeds"), Column(f"at {unit}"), Column("evaluated at")]
    columns += [Column(measure.title, measure.digits) for measure in measures]
    rows = list[list[Cell]]()
    for limit in (half, end):
        for group in groups if limit > 0 else ():
            found = [_evaluated_by(run.rounds, axis, limit) for run in group.runs]
            row: list[Cell] = [group.label, group.seeds, Stat(limit / divisor, None, 1, 1)]
            row.append(stat([_scaled(number(record, axis), 1 / divisor) for record in found]))
            row += [stat([_scaled(number(record, m.key), m.factor) for record in found]) for m in measures]
            rows.append(row)
    name = AXES[axis].replace(" ", "-")
    note = "The last evaluation at or before the largest value that all runs reached, and at or before half of it."
    return Sheet(f"equal-{name}", f"At equal {AXES[axis]}", columns, rows, note)


def _evaluated_by(rounds: Sequence[Record], axis: str, limit: float) -> Record:
    ceiling = limit * (1 + 1e-9)  # joint epochs are sums of fractions
    return last_evaluated([r for r in rounds if (at := number(r, axis)) is not None and at <= ceiling])


def target_sheet(groups: Sequence[Group], target: Target) -> Sheet:
    """What it took each group to get there."""
    histories = [run.history for group in groups for run in group.runs]
    largest = max((end for h in histories for end in finite(h.rounds[-1:], "bytes_sent")), default=0.0)
    divisor, unit = byte_unit(largest)
    columns = [Column("run"), Column("seeds"), Column("reached by")]
    columns += [Column("rounds"), Column("steps"), Column("joint epochs"), Column(f"{unit} sent"), Column("seconds")]
    rows = list[list[Cell]]()
    for group in groups:
        found = [record for run in group.runs if (record := target.reached(run.rounds)) is not None]
        row: list[Cell] = [group.label, group.seeds, f"{len(found)} of {len(group.runs)}"]
        for key in ("round", "steps", "joint_epochs", "bytes_sent", "wall_seconds"):
            row.append(stat([_scaled(number(r, key), 1 / divisor if key == "bytes_sent" else 1.0) for r in found]))
        rows.append(row)
    note = (
        "The first evaluation at which it was reached, of the seeds that reached it; steps: local ones, of one client."
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
    rows = list[list[Cell]]()
    for family in found:
        for n, seeds, *columns_of_n in zip(*family[1:], strict=True):
            ideal = Stat(n / family.num_clients[0], None, 1, 1)
            rows.append([family.label, str(n), seeds, ideal, *columns_of_n])
    note = (
        "How many times sooner than the fewest clients; by steps: local steps of one client, which is time where all "
        "clients work at once; by seconds: on this machine's clock. Ideal is linear in N."
    )
    return Sheet(f"speedup-{_slug(target)}", f"Speedup over N, to {target.title}", columns, rows, note)
