"""One node's part: what it keeps of a round for its clients, and what it makes of the next message with that.

Nothing is written over: a round's rows lie beside those that they were made of until the server has taken them, so a
message that is sent again finds what its round began with.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from fedmom.backends.at_nodes.turns import Turns
from fedmom.errors import InputError
from fedmom.method.state import ClientState, Tree, flatten, is_finite, unflatten
from fedmom.rounds.round import Outcome
from fedmom.travel.messages import read_reference
from fedmom.travel.wire import is_coded

STATES = "states/"  # how the names begin of a correction's own states in a client's row
LOST = "(it has started anew)"  # what a node says of that which it has no more
_OWN, _MEAN, _REFERENCE = "own", "mean", "reference"


class Store(Protocol):
    """Trees by their names, which live as long as the run."""

    def names(self) -> Iterable[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def read(self, name: str) -> Tree: ...

    def write(self, name: str, tree: Tree) -> None: ...

    def drop(self, name: str) -> None: ...


class Asked(NamedTuple):
    """What a message asks for: a round of some clients."""

    number: int  # the round, from 1
    clients: Sequence[int]  # in ascending order
    since: Sequence[int]  # the last round that each of them trained in; 0: none
    given: Mapping[int, Tree] = {}  # {client: its row as the server knows it}, for a node that has it not


class Begun(NamedTuple):
    """What a round begins with."""

    start: ClientState
    own: ClientState | None  # [k, ...]
    states: Tree | None  # [k, ...]
    given: list[int]  # clients whose row was the server's


def begun(turns: Turns, asked: Asked, arrays: Tree, store: Store) -> Begun:
    """The start of the round, of what the message says and what this node has kept.

    Raises InputError where one of the two lacks something that it must have.
    """
    index = asked.number - 1
    form = turns.own(index)
    start = {flat: turns.begin[flat] for flat in turns.shared}
    for flat in turns.shared:
        if flat not in form and turns.is_told(flat):
            start[flat] = _of(arrays, flat)
    start |= {name: value for name, value in arrays.items() if name.startswith("correction/")}
    given = list[int]()
    rows = [_row(turns, asked, place, arrays, store, given) for place in range(len(asked.clients))]
    own = {flat: torch.stack([row[flat] for row in rows]) for flat in form}
    states = {name: torch.stack([row[STATES + name] for row in rows]) for name in turns.states}
    return Begun(unflatten(start), unflatten(own) if own else None, states or None, given)


def _row(turns: Turns, asked: Asked, place: int, arrays: Tree, store: Store, given: list[int]) -> Tree:
    """What one client begins the round with of its own, a correction's states among it."""
    client, since, index = asked.clients[place], asked.since[place], asked.number - 1
    kept: Tree | None = None

    def mine(flat: str) -> torch.Tensor:
        nonlocal kept
        if kept is None and client in asked.given and _name(client, since) not in store:
            kept = asked.given[client]
            given.append(client)
        elif kept is None:
            kept = row_of_round(store, client, since)
        return _of(kept, flat)

    row: Tree = {}
    for flat in turns.own(index):
        if since > turns.agreed(flat, index):
            row[flat] = mine(flat)
        elif flat in turns.begin and turns.is_told(flat):
            row[flat] = _of(arrays, flat)
        else:
            row[flat] = turns.first_value(flat, client)
    for name, value in turns.states.items():
        row[STATES + name] = mine(STATES + name) if since else value
    return row


def _name(client: int, number: int) -> str:
    return f"{_OWN}/{client}/{number}"


def _of(tree: Tree, flat: str) -> torch.Tensor:
    if flat not in tree:
        raise InputError(f"arrays: {flat} is missing; take this fedmom on both sides")
    return tree[flat]


def row_of_round(store: Store, client: int, number: int) -> Tree:
    """What a client had of its own after a round. Raises InputError where it is not here."""
    return store.read(_there(store, _name(client, number), client))


def keep(turns: Turns, asked: Asked, outcome: Outcome, store: Store) -> str:
    """Put the rows of a round beside those that it began with -> the part that is NaN or infinite in them, or ""."""
    last, these = {*map(_name, asked.clients, asked.since)}, {*asked.clients}
    for name in [*store.names()]:
        kind, _, rest = name.partition("/")
        client, _, number = rest.rpartition("/")
        of_these = kind == _OWN and int(client) in these and name not in last
        if of_these or (kind != _OWN and int(number) < asked.number - 1):
            store.drop(name)
    own = {} if outcome.own is None else flatten(outcome.own)
    states = {STATES + name: rows for name, rows in (outcome.correction or {}).items()}
    for place, whose in enumerate(asked.clients):
        row = {name: rows[place] for name, rows in {**own, **states}.items()}
        store.write(_name(whose, asked.number), row)
    mean, sent = flatten(outcome.mean), {*turns.up(asked.number)}
    alone = own if len(asked.clients) == 1 else {}
    looked_at = {flat: mean[flat] for flat in turns.shared if flat not in sent and flat not in alone}
    store.write(f"{_MEAN}/{asked.number}", looked_at)
    trees = (("params", own), ("momentum", own), ("buffers", own), ("correction", states))
    broken = [part for part, tree in trees if not is_finite({n: v for n, v in tree.items() if _is_of(n, part)})]
    return broken[0] if broken else ""


def _is_of(name: str, part: str) -> bool:
    return name.startswith(STATES) if part == "correction" else name.startswith(f"{part}/")


def told(turns: Turns, asked: Asked, arrays: Tree, before: int, store: Store) -> Tree:
    """What a message says, decoded where it is encoded; the next one counts from it.

    before: the round whose reference the message counts from; 0: it says it whole. Raises InputError where that is not
    here, and ValueError for what is no such message.
    """
    rules, index = turns.plan.codecs_down, asked.number - 1
    if not rules:
        return arrays
    if before:
        known = store.read(_there(store, f"{_REFERENCE}/{before}", asked.clients[0]))
        coded = {name: value for name, value in arrays.items() if is_coded(name)}
        new = read_reference(rules, known, coded, turns.plan.seed, index)
        arrays = {name: value for name, value in arrays.items() if not is_coded(name)} | new
    store.write(f"{_REFERENCE}/{asked.number}", {n: v for n, v in arrays.items() if turns.is_encoded(rules, n)})
    return arrays


def _there(store: Store, name: str, client: int) -> str:
    """The name, if there is such a thing here."""
    if name not in store:
        kind, _, number = name.rpartition("/")
        what = "what all began with in" if kind == _REFERENCE else "what the client had of its own after"
        raise InputError(
            f"client {client}: this node has not {what} round {number} {LOST}; resume the run from its "
            "last checkpoint, or set server.own-rows = 'server'"
        )
    return name


def mean_of_round(store: Store, number: int) -> Tree:
    """The mean of this node's clients of what they did not send in a round. Raises InputError where it is not here."""
    name = f"{_MEAN}/{number}"
    if name not in store:
        raise InputError(f"this node has nothing of round {number} {LOST}; resume the run")
    return store.read(name)
