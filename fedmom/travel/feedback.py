"""What clients send: the change since the round's start, encoded, and the error that each keeps for the next time.

p = e + s_i − ŝ;  send C(p);  e <- p − C(p). So ŝ + Σ p_i e_i moves by exactly Σ p_i (s_i − ŝ), whatever C is. The rows
that are averaged are ŝ + C(p). What a client keeps lies among its own tensors, under names of its own: "e/PART/NAME",
and "Q/PART/NAME" of a codec that keeps more.

A state that must stay positive sends itself in the place of its change, p = e + s_i, and at least s_i/2: a change that
is rounded could take ŝ below 0. The law is the same.
"""

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedmom.method.state import CLOCK, ClientState, Tree
from fedmom.method.states.rules import CodecRule, state_in
from fedmom.travel.codec import Address, Payload
from fedmom.travel.table import codec_of
from fedmom.travel.wire import coded_arrays

CodecRules = Mapping[str, CodecRule]  # {state: how it is encoded}
ERROR = "e"
POSITIVE = ("v",)  # the states that must stay so
_PARTS = ("params", "momentum")  # buffers travel as they are


class Senders(NamedTuple):
    """Who sends, and when."""

    seed: int
    clients: Tensor  # [K] int64
    round_index: int

    def address(self, part: str, name: str) -> Address:
        """Of the messages of one tensor."""
        return Address(self.seed, self.clients, self.round_index, zlib.crc32(f"{part}/{name}".encode()))


def rule_of(rules: CodecRules, part: str, name: str, value: Tensor) -> CodecRule | None:
    """How a tensor is encoded; None for one that travels as it is: a buffer, a clock, whole numbers."""
    state, slash, _ = name.partition("/")
    is_clock = part == "momentum" and slash and state.endswith(CLOCK)
    if part not in _PARTS or is_clock or not value.is_floating_point() or not value.numel():
        return None
    return rules.get(state_in(part, name))


def bytes_of(rules: CodecRules, part: str, name: str, value: Tensor) -> int:
    """What one client's tensor [*shape] takes on the way."""
    rule = rule_of(rules, part, name, value)
    return value.numel() * value.element_size() if rule is None else codec_of(rule).num_bytes(value.shape, value.dtype)


def kept_before(rules: CodecRules, start: ClientState, count: int) -> Tree:
    """[count, ...] what clients keep before the first round, by the names of their own tensors.

    start: one client's. All rows are one copy in memory.
    """
    found = dict[str, Tensor]()
    for part in _PARTS:
        for name, value in getattr(start, part).items():
            if (rule := rule_of(rules, part, name, value)) is not None:
                found |= _named(part, name, _first(rule, part, name, value, count))
    return found


def is_kept(name: str) -> bool:
    """Whether a name among a client's own tensors is of what it keeps for its messages."""
    head, _, rest = name.partition("/")
    return head in (ERROR, "Q") and rest.partition("/")[0] in _PARTS


def sent(
    rules: CodecRules,
    ended: ClientState,
    start: ClientState,
    kept: Tree,
    senders: Senders,
    messages: Tree | None = None,
) -> tuple[ClientState, Tree]:
    """Rows [K, ...] after the local steps -> (rows as the server has them, what the clients keep).

    start: the common one of the round; kept: [K, ...] what they kept before, by names; empty before the first time.
    messages: gets the encoded arrays [K, ...] behind those that it has, in main memory (fedmom.travel.messages).
    """
    parts, after = ended._asdict(), dict[str, Tensor]()
    for part in _PARTS:
        rows = dict(parts[part])
        for name, value in rows.items():
            rule = rule_of(rules, part, name, value[0])
            if rule is None:
                continue
            address, begun = senders.address(part, name), getattr(start, part)[name]
            own = _own(kept, part, name) or _first(rule, part, name, begun, len(value))
            rows[name], own, payload = _one(rule, value, begun, own, address, state_in(part, name))
            after |= _named(part, name, own)
            if messages is not None:
                _add(messages, coded_arrays(payload, part, name))
        parts[part] = rows
    return ClientState(**parts), after


def _add(messages: Tree, arrays: Tree) -> None:
    """Further clients' rows [K, ...] of the messages of one tensor."""
    for name, value in arrays.items():
        own = value.to("cpu", copy=True)  # what arrives may be the same memory, and is written over
        messages[name] = torch.cat([messages[name], own]) if name in messages else own


def arrival(decoded: Tensor, begun: Tensor, *, whole: bool) -> Tensor:
    """What the other end has of a message C(p). whole: it is of the state itself, and not of its change."""
    return decoded if whole else begun + decoded


def _one(
    rule: CodecRule, ended: Tensor, begun: Tensor, own: Tree, address: Address, state: str
) -> tuple[Tensor, Tree, Payload]:
    """One tensor: (rows as they arrive, what the clients keep, the messages)."""
    codec = codec_of(rule)
    whole = state in POSITIVE
    wanted = ended if whole else ended - begun
    if not rule.plain:
        wanted = wanted + own[ERROR]
    message = torch.maximum(wanted, ended / 2) if whole else wanted
    payload, more = codec.encode(message, address, own)
    arrived = codec.decode(payload, ended.shape[1:], ended.dtype, address)
    if not rule.plain:
        more[ERROR] = wanted - arrived
    return arrival(arrived, begun, whole=whole), more, payload


def _first(rule: CodecRule, part: str, name: str, value: Tensor, count: int) -> Tree:
    """[count, ...] of one tensor [*shape], e = 0."""
    address = Senders(0, torch.arange(count, device=value.device), 0).address(part, name)
    found = codec_of(rule).start(value.shape, value.dtype, address)
    return found if rule.plain else found | {ERROR: value.new_zeros(()).expand(count, *value.shape)}


def _named(part: str, name: str, own: Tree) -> Tree:
    return {f"{slot}/{part}/{name}": value for slot, value in own.items()}


def _own(kept: Tree, part: str, name: str) -> Tree:
    found = {slot: kept.get(f"{slot}/{part}/{name}") for slot in (ERROR, "Q")}
    return {slot: value for slot, value in found.items() if value is not None}
