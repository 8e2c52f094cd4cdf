"""What the arrays of a message are called, and the dtypes that they travel in."""

import torch

from fedmom.method.state import Tree
from fedmom.travel.codec import Payload

_CODED = "coded"
# NumPy has no bfloat16: its bits travel as another number's. No codec has numbers of that dtype itself.
_BFLOAT16 = torch.uint16


def coded_name(slot: str, part: str, name: str) -> str:
    """Of one part of the message of one tensor, such as coded/indices/params/weight."""
    return f"{_CODED}/{slot}/{part}/{name}"


def is_coded(name: str) -> bool:
    """Whether an array of this name is a part of a message that is encoded."""
    return name.startswith(f"{_CODED}/")


def coded_arrays(payload: Payload, part: str, name: str) -> Tree:
    """The message of one tensor as it travels, by names."""
    return {coded_name(slot, part, name): value for slot, value in to_wire(payload).items()}


def to_wire(payload: Payload) -> Payload:
    """The same bits in dtypes that NumPy has; float16 stays what it is."""
    return {n: v.view(_BFLOAT16) if v.dtype == torch.bfloat16 else v for n, v in payload.items()}


def from_wire(payload: Payload) -> Payload:
    """The inverse of `to_wire`."""
    return {n: v.view(torch.bfloat16) if v.dtype == _BFLOAT16 else v for n, v in payload.items()}
