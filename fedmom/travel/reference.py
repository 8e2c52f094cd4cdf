"""What the server sends: the change since a reference that both ends keep, encoded.

ref <- ref + C(x − ref). Clients begin at ref, and the server keeps x: after a round x <- x + (x̂ − ref), x̂ the mean of
clients that began at ref. The reference is its own memory of what the codec left behind: with an e beside it that would
count twice. A client that missed a message gets ref whole.
"""

import torch
from torch import Tensor

from fedmom.method.state import ClientState, Tree, flatten, unflatten
from fedmom.travel.codec import SERVER
from fedmom.travel.feedback import CodecRules, Senders, rule_of
from fedmom.travel.table import codec_of
from fedmom.travel.wire import coded_arrays

_KEPT = "Q/"  # how the names begin of what the server keeps of a codec that keeps more


def first_reference(rules: CodecRules, start: ClientState) -> Tree:
    """{part/name: tensor} before the first round, which everybody gets whole, and what the server keeps beside it."""
    found: Tree = {}
    for flat, value in flatten(start).items():
        part, _, name = flat.partition("/")
        if (rule := rule_of(rules, part, name, value)) is not None:
            found[flat] = value.clone()
            address = Senders(0, torch.tensor([SERVER], device=value.device), 0).address(part, name)
            more = codec_of(rule).start(value.shape, value.dtype, address)
            found |= {_KEPT + flat: more["Q"][0].clone()} if more else {}
    return found


def clients_start(state: ClientState, reference: Tree) -> ClientState:
    """What clients begin at: the reference, and what travels whole."""
    return unflatten({name: reference.get(name, value) for name, value in flatten(state).items()})


def after_mean(before: ClientState, mean: ClientState, reference: Tree) -> ClientState:
    """The server's state after a round: it moves from its own, `before`, as the clients moved from the reference."""
    old = flatten(before)
    moved = {n: old[n] + (m - reference[n]) if n in reference else m for n, m in flatten(mean).items()}
    return unflatten(moved)


def next_reference(
    rules: CodecRules, reference: Tree, state: ClientState, seed: int, round_index: int
) -> tuple[Tree, Tree]:
    """(the reference after the message that begins round 0, 1, …, towards the server's `state`; the message).

    The message is as `fedmom.travel.messages.read_reference` takes it, where `state` is.
    """
    found, message = dict[str, Tensor](), dict[str, Tensor]()
    for flat, value in flatten(state).items():
        if flat not in reference:
            continue
        part, _, name = flat.partition("/")
        rule = rule_of(rules, part, name, value)
        assert rule is not None
        address = Senders(seed, torch.tensor([SERVER], device=value.device), round_index).address(part, name)
        codec, kept = codec_of(rule), _KEPT + flat
        own = {"Q": reference[kept][None]} if kept in reference else {}
        payload, own = codec.encode((value - reference[flat])[None], address, own)
        found[flat] = reference[flat] + codec.decode(payload, value.shape, value.dtype, address)[0]
        found |= {kept: own["Q"][0]} if own else {}
        message |= coded_arrays({slot: rows[0] for slot, rows in payload.items()}, part, name)
    return found, message
