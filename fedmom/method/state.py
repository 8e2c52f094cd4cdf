"""What a client carries, as a value: the model x, the momentum u, the model's buffers, a correction's own state."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Tree = dict[str, Tensor]
Arrays = dict[str, np.ndarray]
_NOTHING: Tree = {}  # never written into

X = "x"  # the model among the states that have a policy and a period
CLOCK = ".clock"  # how the name of a state's clock ends
_PREFIXED = ("m", "v", "y", "g")  # the states whose tensors' names begin with theirs


class ClientState(NamedTuple):
    """One client between two steps; stacked, every tensor gains a leading client axis K."""

    params: Tree  # x, {name: [*shape]} or {name: [K, *shape]}
    # What the local optimizer remembers. SGD's momentum u has its parameters' names and shapes. Others' states have
    # names of their own, m/NAME and v/NAME; beside a state that averages over time lies its clock [], m.clock/NAME.
    momentum: Tree
    buffers: Tree  # BatchNorm's statistics and other tensors that no gradient moves
    # Of a correction with state (`algorithms.Correction`); else empty. A client has its own state here, the common
    # start of a round the server's, and the mean of a round the mean of the clients' messages.
    correction: Tree = _NOTHING


def full_name(state: str, parameter: str) -> str:
    """Where the state (or the clock) of a parameter lies in ClientState.momentum."""
    return parameter if state == "u" else f"{state}/{parameter}"


def state_of(name: str) -> str:
    """The state, of which a name in ClientState.momentum is a tensor or the clock."""
    prefix, slash, _ = name.partition("/")
    state = prefix.removesuffix(CLOCK)
    return state if slash and state in _PREFIXED else "u"


def parameter_of(name: str) -> str:
    """The parameter that a name in ClientState.momentum belongs to."""
    return name if state_of(name) == "u" else name.partition("/")[2]


def is_clock(name: str) -> bool:
    """Whether a name in ClientState.momentum is of a state's clock."""
    prefix, slash, _ = name.partition("/")
    return bool(slash) and prefix.endswith(CLOCK) and prefix.removesuffix(CLOCK) in _PREFIXED


def is_momentum(name: str) -> bool:
    """Whether a name in ClientState.momentum is of a momentum, u, m or y, which momentum_spread is measured on."""
    state, clock = state_of(name), CLOCK in name.partition("/")[0]
    return state == "u" or (state in ("m", "y") and not clock)


def is_among(name: str, parameters: Collection[str]) -> bool:
    """Whether a name of x, the buffers or the optimizer's states belongs to one of these parameters and buffers."""
    return name in parameters or parameter_of(name) in parameters


def initial_state(params: Tree, buffers: Tree) -> ClientState:
    """The start of the method: the given x, and u = 0."""
    return ClientState(params, zeros_like(params), buffers)


def zeros_like(tree: Tree) -> Tree:
    return {name: torch.zeros_like(value) for name, value in tree.items()}


def expand(tree: Tree, num_rows: int) -> Tree:
    """[*shape] -> [num_rows, *shape], all rows one copy in memory: clients that restart from the same point."""
    return {name: value.expand(num_rows, *value.shape) for name, value in tree.items()}


def stacked(state: ClientState, num_rows: int) -> ClientState:
    """`num_rows` clients that all stand at `state`."""
    return ClientState(*(expand(tree, num_rows) for tree in state))


def where(active: Tensor, new: ClientState, old: ClientState) -> ClientState:
    """Rows of `new` where `active` [K] is true, rows of `old` elsewhere."""

    def rows(name: str, new: Tree, old: Tree) -> Tensor:
        return torch.where(active.reshape(-1, *[1] * (new[name].ndim - 1)), new[name], old[name])

    pairs = zip(new, old, strict=True)
    return ClientState(*({name: rows(name, a, b) for name in a} for a, b in pairs))


def concatenated(parts: Sequence[ClientState]) -> ClientState:
    """Chunks of stacked clients [k, ...] one after the other."""
    if len(parts) == 1:
        return parts[0]
    trees = zip(*parts, strict=True)
    return ClientState(*({name: torch.cat([tree[name] for tree in part]) for name in part[0]} for part in trees))


def rows_of(state: ClientState, places: Tensor | slice) -> ClientState:
    """Some rows of stacked clients, by place."""

    def pick(value: Tensor) -> Tensor:
        return value[places.to(value.device) if isinstance(places, Tensor) else places]

    return ClientState(*({name: pick(value) for name, value in tree.items()} for tree in state))


def row_of(state: ClientState, place: int) -> ClientState:
    """One of stacked clients."""
    return ClientState(*({name: value[place] for name, value in tree.items()} for tree in state))


def parted(state: ClientState, names: Collection[str]) -> tuple[ClientState, ClientState]:
    """(all but these tensors of x, u and the buffers, these alone); a correction's own stay with the first."""

    def some(inside: bool) -> ClientState:
        return ClientState(*({n: v for n, v in tree.items() if is_among(n, names) == inside} for tree in state[:3]))

    return some(False)._replace(correction=state.correction), some(True)


def joined(shared: ClientState, own: ClientState, like: ClientState) -> ClientState:
    """The inverse of `parted`, in the order of the names of `like`; of what both have, `own` is taken."""
    trees = zip(shared[:3], own[:3], like[:3], strict=True)
    whole = ClientState(*({n: b[n] if n in b else a[n] for n in order} for a, b, order in trees))
    return whole._replace(correction=shared.correction)


def like(state: ClientState, right: ClientState) -> ClientState:
    """`state` where the tensors of `right` are."""
    device = next((value.device for tree in right for value in tree.values()), torch.device("cpu"))
    return to_device(state, device)


def to_device(state: ClientState, device: torch.device | str) -> ClientState:
    return ClientState(*({name: value.to(device) for name, value in tree.items()} for tree in state))


def num_bytes(tree: Tree) -> int:
    return sum(value.numel() * value.element_size() for value in tree.values())


def is_finite(tree: Tree) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in tree.values() if value.is_floating_point())


def flatten(state: ClientState) -> Tree:
    """`params/NAME`, `momentum/NAME`, `buffers/NAME`, `correction/NAME`: the form on the wire and in files."""
    parts = state._asdict().items()
    return {f"{part}/{name}": value for part, tree in parts for name, value in tree.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> ClientState:
    """The inverse of `flatten`. Raises ValueError for a name without one of the four prefixes."""
    state = ClientState({}, {}, {}, {})
    for key, value in tensors.items():
        part, slash, name = key.partition("/")
        if not slash or part not in ClientState._fields:
            raise ValueError(f"tensor {key!r}: expected params/…, momentum/…, buffers/… or correction/…")
        getattr(state, part)[name] = value
    return state


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares the memory of an array which may be read-only: read it only."""
    with warnings.catch_warnings():  # of torch, that the memory may not be written to
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def to_arrays(tree: Tree) -> Arrays:
    """Tensors as NumPy's arrays, which processes share in Ray's store; of tensors on the CPU no copy is made."""
    return {name: value.detach().cpu().numpy() for name, value in tree.items()}


def from_arrays(arrays: Arrays) -> Tree:
    """The inverse of `to_arrays`, on the arrays' own memory, which may be read only."""
    return {name: as_tensor(value) for name, value in arrays.items()}
