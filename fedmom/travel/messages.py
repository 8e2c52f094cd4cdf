"""Messages as they travel, in plain values: what arrays one must have, and what the other end makes of them.

The message of a state is a flat tree. A tensor that is encoded is the arrays of its codec's payload, under
"coded/SLOT/PART/NAME" and in dtypes that NumPy has; any other tensor is itself, under "PART/NAME". No array has an axis
of clients: a message is of one client, or of the server.

Whoever reads one trusts nothing of it: what no honest sender makes is a ValueError of one line.
"""

import torch
from torch import Tensor

from fedmom.method.state import Tree
from fedmom.method.states.rules import CodecRule, state_in
from fedmom.travel.codec import SERVER, Payload
from fedmom.travel.feedback import POSITIVE, CodecRules, Senders, arrival, rule_of
from fedmom.travel.table import codec_of
from fedmom.travel.wire import coded_arrays, coded_name, from_wire

_LONGEST = 100  # characters of a name that somebody else has given


def form(rules: CodecRules, state: Tree) -> Tree:
    """What arrays a message of `state` must have, {part/name: tensor [*]} of one sender.

    The encoded ones take no memory, and have shapes and dtypes alone; the others are the tensors of `state`.
    """
    found: Tree = {}
    for flat, value in state.items():
        part, name, rule = _rule(rules, flat, value)
        if rule is None:
            found[flat] = value
        else:
            found |= coded_arrays(codec_of(rule).form(value.shape, value.dtype), part, name)
    return found


def read(rules: CodecRules, arrays: Tree, begun: Tree, senders: Senders) -> Tree:
    """The server's end of one client's message: its row {part/name: [*]} as it arrives, bit for bit `sent`'s.

    begun: what the client began the round at, where it is to be decoded; of a tensor that is not encoded the form alone
    counts. senders: the one client. What is not encoded is passed on as it is, and its bounds are not looked at.
    Raises ValueError with the one reason why this is no message.
    """
    return _read(rules, arrays, begun, senders, "update", up=True)


def read_reference(rules: CodecRules, reference: Tree, arrays: Tree, seed: int, round_index: int) -> Tree:
    """A client's end of what the server sends: the reference at which round 0, 1, … begins, bit for bit the server's.

    reference: {part/name: [*]}, that of the round before; a tensor in it that is not encoded is replaced by the array
    of its name. Raises ValueError as `read` does.
    """
    return _read(rules, arrays, reference, Senders(seed, torch.tensor([SERVER]), round_index), "message", up=False)


def _rule(rules: CodecRules, flat: str, value: Tensor) -> tuple[str, str, CodecRule | None]:
    """(part, name, how it is encoded)."""
    part, _, name = flat.partition("/")
    return part, name, rule_of(rules, part, name, value)


def _read(rules: CodecRules, arrays: Tree, before: Tree, senders: Senders, what: str, *, up: bool) -> Tree:
    """The state that a message is of. up: it is a client's, whose v is itself, and not its change."""
    _check_form(what, arrays, form(rules, before))
    found: Tree = {}
    for flat, value in before.items():
        part, name, rule = _rule(rules, flat, value)
        if rule is None:
            found[flat] = arrays[flat]
            continue
        codec, whole = codec_of(rule), up and state_in(part, name) in POSITIVE
        slots = codec.form(value.shape, value.dtype)
        payload = {slot: arrays[coded_name(slot, part, name)][None].to(value.device) for slot in slots}
        payload = from_wire(payload)
        _check_numbers(what, payload, part, name)
        for slot, has in codec.faults(payload, value.shape):
            raise ValueError(f"its {what} has {has} in {coded_name(slot, part, name)}")
        decoded = codec.decode(payload, value.shape, value.dtype, senders.address(part, name))[0]
        found[flat] = row = arrival(decoded, value, whole=whole)
        if not _is_finite(row):  # of finite arrays: their product is too large
            raise _not_finite(what, flat)
        if whole and bool((row < 0).any()):
            raise ValueError(f"its {what} has numbers below 0 in {flat}, must be at least 0")
    return found


def _check_form(what: str, arrays: Tree, forms: Tree) -> None:
    """Raises ValueError for an array that is missing, unknown, misshapen, of another dtype or not finite."""
    for name in forms:
        if name not in arrays:
            raise ValueError(f"its {what} lacks {name}")
    for name, value in arrays.items():
        if name not in forms:
            raise ValueError(f"its {what} has an unknown {_short(name)}")
        right = forms[name]
        if value.shape != right.shape or value.dtype != right.dtype:
            got, wanted = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (value, right))
            raise ValueError(f"its {what} has {name} as {got}, must be {wanted}")
        if not _is_finite(value):
            raise _not_finite(what, name)


def _check_numbers(what: str, payload: Payload, part: str, name: str) -> None:
    """Raises ValueError for what is not finite in the dtypes of the codec."""
    for slot, value in payload.items():
        if not _is_finite(value):
            raise _not_finite(what, coded_name(slot, part, name))


def _is_finite(value: Tensor) -> bool:
    """Whether all numbers are; the sum of finite ones is, but for overflow, and costs a quarter of a look at each."""
    return not value.is_floating_point() or bool(value.sum().isfinite()) or bool(value.isfinite().all())


def _not_finite(what: str, name: str) -> ValueError:
    return ValueError(f"its {what} has NaN or infinite numbers in {name} (does a smaller lr help?)")


def _short(name: str) -> str:
    """One line of a name, whatever it is."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"
