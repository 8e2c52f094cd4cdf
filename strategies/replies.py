"""What a client's reply must be: arrays of the right names and shapes, finite, and one MetricRecord with the weight."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedmom.flower.wire import array_bytes, bundle, from_npy, is_bundle, to_npy, unbundle
from fedmom.method.state import ClientState, Tree, unflatten
from fedmom.rounds.round import Job

ARRAYS, CONFIG, ABOUT = "arrays", "config", "clients"  # names of the records in a message
OWN = "own"  # likewise, of what the clients have of their own, as `flatten` names it
STATES = "states"  # likewise, of the clients' own states of a correction
WEIGHT = "num-examples"  # the metric by which updates are weighed, here and in Flower's own strategies

# (a round's number, the result so far) -> whether it was the last: as Flower 1.43 asks after every round.
ShouldStop = Callable[[int, Result], bool]


def pack(tensors: Tree, *, bundled: bool = False) -> ArrayRecord:
    """Tensors as Flower's ArrayRecord, under their names or one array per dtype (`fedmom.flower.wire.bundle`)."""
    arrays = {}
    for name, value in (bundle(tensors) if bundled else tensors).items():
        dtype = str(value.dtype).removeprefix("torch.")
        arrays[name] = Array(dtype=dtype, shape=tuple(value.shape), stype="numpy.ndarray", data=to_npy(value))
    return ArrayRecord(arrays)


def unpack(record: Mapping[str, Array]) -> Tree:
    """Flower's arrays as tensors that share their memory, bundled or not: for reading only."""
    return unbundle({name: from_npy(array_bytes(array)) for name, array in record.items()})


def is_bundled(record: Mapping[str, Array]) -> bool:
    return any(map(is_bundle, record))


def shares_memory(grid: Grid) -> bool:
    """Whether arrays pass this Grid without being sent: then they travel under their own names, one by one."""
    return bool(getattr(grid, "shares_memory", False))


def span_of(job: Job | None) -> dict[str, int]:
    """What a message says of the round's steps, which clients know by themselves but where I changes in the run."""
    span = None if job is None else job.span
    return {} if span is None else {"first-step": span.first, "num-steps": span.steps}


class Update(NamedTuple):
    """What one node answered, checked."""

    state: ClientState  # the mean of its clients
    weight: float
    metrics: dict[str, float]
    about: dict[str, Any]  # lists of the clients' own: ids, losses
    own: Tree | None  # [k, ...] what its clients go on with by themselves, as `flatten` names it
    states: Tree | None  # [k, ...] its clients' own states of a correction
    reply: Message


def accept(
    reply: Message,
    expected: Tree,
    weighted_by_key: str = WEIGHT,
    *,
    clients: Sequence[int] = (),
    own: Tree | None = None,
    states: Tree | None = None,
    losses: bool = False,
) -> Update:
    """A reply's content, checked against the tensors that were sent ({} checks no shapes).

    clients: those asked for, if the reply must be theirs; own, states: what of theirs [k, ...] must come back; losses:
    whether each client's training loss must be told.
    Raises ValueError naming the tensor that is missing, misshapen or not finite.
    """
    content = reply.content
    if len(content.metric_records) != 1 or ARRAYS not in content.array_records:
        raise ValueError(f"its reply must have one MetricRecord and an ArrayRecord {ARRAYS!r}")
    metrics = dict(next(iter(content.metric_records.values())))
    weight = metrics.pop(weighted_by_key, None)
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"its weight {weighted_by_key!r} is {weight}, must be > 0")
    tensors = unpack(content.array_records[ARRAYS])
    expected = expected or tensors
    _check("update", tensors, expected)
    about: dict[str, Any] = dict(content.config_records.get(ABOUT, ConfigRecord()))
    if clients:
        about.setdefault("clients", list(clients))
    for name in ("clients", "train-loss", "path"):
        if not isinstance(about.get(name, []), list):
            raise ValueError(f"its record {ABOUT!r} has {name} = {about[name]!r}, must be a list")
    if clients and about["clients"] != list(clients):
        raise ValueError(f"its reply is of clients {about['clients'][:5]}, which it was not asked for")
    if losses and len(about.get("train-loss", ())) != len(about.get("clients", ())):
        raise ValueError(f"its record {ABOUT!r} must have train-loss, one number for each of its clients")
    records, found = content.array_records, dict[str, Tree | None]()
    called = {OWN: "clients' own tensors", STATES: "clients' own states"}
    for name, right in ((OWN, own), (STATES, states)):
        found[name] = unpack(records[name]) if name in records else None
        if right is not None:
            _check(called[name], found[name] or {}, right)
    scalars = {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}
    # In the order of what was sent, which a message need not keep: sums over tensors must not depend on it.
    state = unflatten({name: tensors[name] for name in expected})
    return Update(state, float(weight), scalars, about, found[OWN], found[STATES], reply)


def accept_metrics(
    clients: Sequence[int], reply: Message, weighted_by_key: str = WEIGHT
) -> tuple[float, dict[str, float]]:
    """(weight, metrics) of a reply to an evaluation. Raises ValueError where it has no such record."""
    if len(reply.content.metric_records) != 1:
        raise ValueError("its reply must have one MetricRecord")
    metrics = dict(next(iter(reply.content.metric_records.values())))
    weight = metrics.pop(weighted_by_key, None)
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"its weight {weighted_by_key!r} is {weight}, must be >= 0")
    return float(weight), {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}


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
    """The metrics' means by their weights; None where nobody has any."""
    total, sums = 0.0, dict[str, float]()
    for weight, metrics in measured:
        total += weight
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + weight * value
    return {name: value / total for name, value in sums.items()} if total else None


def _check(what: str, tensors: Tree, expected: Tree) -> None:
    """Raises ValueError for a tensor that is missing, unknown, misshapen, of another dtype or not finite."""
    for name in {**expected, **tensors}:
        if name not in tensors or name not in expected:
            raise ValueError(f"its {what} {'lacks' if name in expected else 'has an unknown'} {name}")
        value, right = tensors[name], expected[name]
        if value.shape != right.shape or value.dtype != right.dtype:
            got, wanted = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (value, right))
            raise ValueError(f"its {what} has {name} as {got}, must be {wanted}")
        # The sum of finite numbers is finite but for overflow, and costs a quarter of looking at each.
        if value.is_floating_point() and not (value.sum().isfinite() or value.isfinite().all()):
            raise ValueError(f"its {what} has NaN or infinite numbers in {name} (does a smaller lr help?)")
