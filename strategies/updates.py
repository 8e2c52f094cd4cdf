"""What a client's reply must be: arrays of the right names and shapes, finite, and one MetricRecord with the weight."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, Message

from fedmom.state import ClientState, Tree, unflatten
from fedmom.wire import array_bytes, from_npy, to_npy

ARRAYS, CONFIG, ROWS, ABOUT = "arrays", "config", "rows", "clients"  # names of the records in a message
WEIGHT = "num-examples"  # the metric by which updates are weighed, here and in Flower's own strategies


def pack(tensors: Tree) -> ArrayRecord:
    """Tensors as Flower's ArrayRecord."""
    arrays = {}
    for name, value in tensors.items():
        dtype = str(value.dtype).removeprefix("torch.")
        arrays[name] = Array(dtype=dtype, shape=tuple(value.shape), stype="numpy.ndarray", data=to_npy(value))
    return ArrayRecord(arrays)


def unpack(record: Mapping[str, Array]) -> Tree:
    """Flower's arrays as tensors that share their memory: for reading only."""
    return {name: from_npy(array_bytes(array)) for name, array in record.items()}


class Update(NamedTuple):
    """What one node answered, checked."""

    state: ClientState  # the mean of its clients
    weight: float
    metrics: dict[str, float]
    about: dict[str, Any]  # lists of the clients' own: ids, losses
    rows: Tree | None  # [k, ...] its clients' own u, for momentum policy "local"
    reply: Message


def accept(reply: Message, expected: Tree, weighted_by_key: str = WEIGHT) -> Update:
    """A reply's content, checked against the tensors that were sent ({} checks no shapes).

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
    for name in {**expected, **tensors}:
        if name not in tensors or name not in expected:
            raise ValueError(f"its update {'lacks' if name in expected else 'has an unknown'} {name}")
        value, right = tensors[name], expected[name]
        if value.shape != right.shape or value.dtype != right.dtype:
            got, wanted = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (value, right))
            raise ValueError(f"its update has {name} as {got}, must be {wanted}")
        # The sum of finite numbers is finite but for overflow, and costs a quarter of looking at each.
        if value.is_floating_point() and not (value.sum().isfinite() or value.isfinite().all()):
            raise ValueError(f"its update has NaN or infinite numbers in {name} (does a smaller lr help?)")
    rows = unpack(content.array_records[ROWS]) if ROWS in content.array_records else None
    about = dict(content.config_records.get(ABOUT, {}))
    scalars = {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}
    # In the order of what was sent, which a message need not keep: sums over tensors must not depend on it.
    state = unflatten({name: tensors[name] for name in expected})
    return Update(state, float(weight), scalars, about, rows, reply)
