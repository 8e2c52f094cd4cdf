"""What a client's reply must be: arrays of the right names and shapes, finite, and one MetricRecord with the weight."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flwr.app import Array, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedmom.flower.wire import is_bundle, unpack
from fedmom.method.averaging import VAR
from fedmom.method.state import ClientState, Tree, is_clock, state_of, unflatten
from fedmom.rounds.round import Job
from fedmom.tasks.problem import Problem

ARRAYS, CONFIG, ABOUT = "arrays", "config", "clients"  # names of the records in a message
OWN = "own"  # likewise, of what the clients have of their own, as `flatten` names it
STATES = "states"  # likewise, of the clients' own states of a correction
WEIGHT = "num-examples"  # the metric by which updates are weighed, here and in Flower's own strategies
MEASURES = ("train_loss", "consensus_distance", "momentum_spread")  # the metrics that fedmom's clients tell of a round

_HEAVIEST = 2**53  # up to here float64 has every whole number
_ROUNDING = 1e-3  # by which a clock, averaged or clipped on its way, may pass 1

# (a round's number, the result so far) -> whether it was the last: as Flower 1.43 asks after every round.
ShouldStop = Callable[[int, Result], bool]


def is_bundled(record: Mapping[str, Array]) -> bool:
    return any(map(is_bundle, record))


def shares_memory(grid: Grid) -> bool:
    """Whether arrays pass this Grid without being sent: then they travel under their own names, one by one."""
    return bool(getattr(grid, "shares_memory", False))


def span_of(job: Job | None) -> dict[str, int]:
    """What a message says of the round's steps, which clients know by themselves but where I changes in the run."""
    span = None if job is None else job.span
    return {} if span is None else {"first-step": span.first, "num-steps": span.steps}


def wanted_by(problem: Problem, job: Job) -> dict[str, Any]:
    """What the round loop needs of a reply beside its tensors, as `accept` takes it; x after every step if small."""
    path = len(job.lrs) * sum(x.numel() for x in problem.start().params.values()) if problem.small else None
    return {"losses": True, "measures": MEASURES, "path": path}


class Update(NamedTuple):
    """What one node answered, checked."""

    state: ClientState  # the mean of its clients
    weight: float
    metrics: dict[str, float]
    about: dict[str, Any]  # lists of the clients' own: ids, losses
    own: Tree | None  # [k, ...] what its clients go on with by themselves, as `flatten` names it
    states: Tree | None  # [k, ...] its clients' own states of a correction
    reply: Message


class Contribution(NamedTuple):
    """What remains of an update once it has been added up."""

    weight: float
    about: dict[str, Any]
    own: Tree | None
    states: Tree | None = None


def accept(
    reply: Message,
    expected: Tree,
    weighted_by_key: str = WEIGHT,
    *,
    clients: Sequence[int] = (),
    own: Tree | None = None,
    states: Tree | None = None,
    losses: bool = False,
    measures: Sequence[str] = (),
    path: int | None = None,
    read: Callable[[Tree], Tree] = lambda arrays: arrays,
) -> Update:
    """A reply's content, checked against the tensors that were sent ({} checks no shapes).

    clients: those asked for, if the reply must be theirs; own, states: what of theirs [k, ...] must come back; losses:
    whether each client's training loss must be told; measures: the metrics that must be; path: how many numbers the
    record's `path` must have, None for whatever it has; read: makes of the arrays the tensors that they stand for.
    Raises ValueError naming the tensor that is missing, misshapen or not finite, or the number that is no such number.
    """
    content = reply.content
    if len(content.metric_records) != 1 or ARRAYS not in content.array_records:
        raise ValueError(f"its reply must have one MetricRecord and an ArrayRecord {ARRAYS!r}")
    metrics = dict(next(iter(content.metric_records.values())))
    weight = _weight(metrics.pop(weighted_by_key, None), weighted_by_key, may_be_zero=False)
    tensors = read(unpack(content.array_records[ARRAYS]))
    expected = expected or tensors
    check("update", tensors, expected)
    about = _about(content.config_records.get(ABOUT, ConfigRecord()), clients, losses, path)
    records, found = content.array_records, dict[str, Tree | None]()
    called = {OWN: "clients' own tensors", STATES: "clients' own states"}
    for name, right in ((OWN, own), (STATES, states)):
        found[name] = unpack(records[name]) if name in records else None
        if right is not None:
            check(called[name], found[name] or {}, right)
    for name in measures:
        if name not in metrics or isinstance(metrics[name], list):
            raise ValueError(f"its metrics lack {name}, which must be one number")
    # In the order of what was sent, which a message need not keep: sums over tensors must not depend on it.
    state = unflatten({name: tensors[name] for name in expected})
    return Update(state, weight, _finite(metrics), about, found[OWN], found[STATES], reply)


def _weight(weight: Any, weighted_by_key: str, *, may_be_zero: bool) -> float:
    """ValueError for a weight that is none, or so large that sums of it are no longer exact."""
    if not _is_number(weight) or weight < 0 or not (weight or may_be_zero):
        least = ">= 0" if may_be_zero else "> 0"
        raise ValueError(f"its weight {weighted_by_key!r} is {_short(weight)}, must be {least}")
    if weight > _HEAVIEST:
        raise ValueError(f"its weight {weighted_by_key!r} is {_short(weight)}, must be at most 2**53")
    return float(weight)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # not: NaN, infinity, 10**400


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are numbers. ValueError names one that is not finite."""
    scalars = {name: value for name, value in metrics.items() if not isinstance(value, list)}
    for name, value in scalars.items():
        if not _is_number(value):
            raise ValueError(f"its metric {name} is {_short(value)}, must be finite (does a smaller lr help?)")
    return {name: float(value) for name, value in scalars.items()}


def _about(record: Mapping[str, Any], clients: Sequence[int], losses: bool, path: int | None) -> dict[str, Any]:
    """What a reply says of its clients. ValueError names what is not as it must be."""
    about, said = dict(record), f"its record {ABOUT!r}"
    if clients:
        about.setdefault("clients", list(clients))
    for name in ("clients", "train-loss", "path"):
        value = about.get(name, [])
        if not isinstance(value, list):
            raise ValueError(f"{said} has {name} = {_short(value)}, must be a list")
        if wrong := [one for one in value if not _is_number(one)][:1]:
            raise ValueError(f"{said} has {_short(wrong[0])} in {name}, must be finite numbers")
    if clients and about["clients"] != list(clients):
        raise ValueError(f"its reply is of clients {about['clients'][:5]}, which it was not asked for")
    if clients:
        about["clients"] = list(clients)  # 3.0 is equal to 3, and no place
    if losses and len(about.get("train-loss", ())) != len(about.get("clients", ())):
        raise ValueError(f"{said} must have train-loss, one number for each of its clients")
    if path is not None and len(about.get("path", ())) != path:
        raise ValueError(f"{said} has a path of {len(about.get('path', ()))} numbers, must be {path}")
    steps = about.get("client-steps", 0)
    if not _is_number(steps) or steps < 0:
        raise ValueError(f"{said} has client-steps = {_short(steps)}, must be a number of steps")
    return about


def _short(value: Any) -> str:
    """One line of it, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "too large"
    return text if len(text) <= 40 else f"{text[:40]}…"


def accept_metrics(
    clients: Sequence[int], reply: Message, weighted_by_key: str = WEIGHT
) -> tuple[float, dict[str, float]]:
    """(weight, metrics) of a reply to an evaluation. Raises ValueError where it has no such record."""
    if len(reply.content.metric_records) != 1:
        raise ValueError("its reply must have one MetricRecord")
    metrics = dict(next(iter(reply.content.metric_records.values())))
    weight = _weight(metrics.pop(weighted_by_key, None), weighted_by_key, may_be_zero=True)
    return weight, {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}


def accept_sums(clients: Sequence[int], reply: Message, *, names: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """(weight, {measure: sums}) of a reply to an evaluation. Raises ValueError where it has not those of `names`."""
    weight, _ = accept_metrics(clients, reply)
    metrics = dict(next(iter(reply.content.metric_records.values())))
    found = {name.removeprefix("sums-"): value for name, value in metrics.items() if name.startswith("sums-")}
    for name in names if weight else ():
        sums = found.get(name)
        if not isinstance(sums, list) or not all(map(math.isfinite, sums)):
            raise ValueError(f"its reply has no finite sums of {name!r}")
    return weight, found


def mean_metrics(measured: Iterable[tuple[float, dict[str, float]]]) -> dict[str, float] | None:
    """Each metric's mean by the weights of those who tell it; None where nobody has any weight."""
    total, sums, weights = 0.0, dict[str, float](), dict[str, float]()
    for weight, metrics in measured:
        total += weight
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + weight * value
            weights[name] = weights.get(name, 0.0) + weight
    return {name: value / weights[name] for name, value in sums.items() if weights[name]} if total else None


def check(what: str, tensors: Tree, expected: Tree) -> None:
    """Raises ValueError for a tensor that is missing, unknown, misshapen, of another dtype or not finite."""
    for name in {**expected, **tensors}:
        if name not in tensors or name not in expected:
            raise ValueError(f"its {what} {'lacks' if name in expected else 'has an unknown'} {name}")
        value, right = tensors[name], expected[name]
        if value.shape != right.shape or value.dtype != right.dtype:
            got, wanted = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (value, right))
            raise ValueError(f"its {what} has {name} as {got}, must be {wanted}")
        if not value.is_floating_point():
            continue
        # The sum of finite numbers is finite but for overflow, and costs a quarter of looking at each.
        if not (value.sum().isfinite() or value.isfinite().all()):
            raise ValueError(f"its {what} has NaN or infinite numbers in {name} (does a smaller lr help?)")
        low, high = _bounds(name)
        if low is not None and value.numel() and value.min() < low:
            raise ValueError(f"its {what} has numbers below {low:g} in {name}, must be at least {low:g}")
        if high is not None and value.numel() and value.max() > high + _ROUNDING:
            raise ValueError(f"its {what} has numbers above {high:g} in {name}, must be at most {high:g}")


def _bounds(name: str) -> tuple[float | None, float | None]:
    """(the least, the largest) that the numbers of a tensor can be: of what is a mean of squares, and of a clock."""
    part, _, tensor = name.partition("/")
    if part == "momentum" and is_clock(tensor):
        return 0.0, 1.0
    squares = part == "momentum" and state_of(tensor) == "v"
    return (0.0, None) if squares or (part == "buffers" and tensor.endswith(VAR)) else (None, None)
