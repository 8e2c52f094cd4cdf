"""The one table of codecs, which the keys and the rounds read."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from fedmom.method.states.rules import CodecRule
from fedmom.travel.codec import Codec
from fedmom.travel.codecs.casts import Cast
from fedmom.travel.codecs.integers import Integers
from fedmom.travel.codecs.lowrank import LowRank
from fedmom.travel.codecs.randomk import RandomK
from fedmom.travel.codecs.topk import TopK


class Kind(NamedTuple):
    """A codec by name, as the rest of fedmom knows it."""

    make: Callable[[CodecRule], Codec]
    summary: str
    number: str = ""  # what its number is: "B", "k/d" or "r"; "" for none
    default: float = 0.0  # its number where none is given
    most: float = 0.0  # with feedback its number must be less; 0: whatever it may be
    may_scale: bool = False  # whether it can be `scaled`

    @property
    def is_share(self) -> bool:
        return self.number == "k/d"


CODECS = {
    "float32": Kind(lambda rule: Cast(None, fine=True), "the run's own numbers, as they are"),
    "bfloat16": Kind(lambda rule: Cast(torch.bfloat16, fine=True), "2 bytes a number, relative error 2⁻⁸"),
    "float16": Kind(lambda rule: Cast(torch.float16, fine=False), "2 bytes a number, relative error 2⁻¹¹, to 65504"),
    "int8": Kind(
        lambda rule: Integers(8, int(rule.number)), "8 bits, one scale per block of B = 256", "B", 256, 4 * 127**2
    ),
    "int4": Kind(
        lambda rule: Integers(4, int(rule.number)), "4 bits, one scale per block of B = 64", "B", 64, 4 * 7**2
    ),
    "topk": Kind(lambda rule: TopK(rule.number), "the largest k of d numbers, k/d = 0.1, and their places", "k/d", 0.1),
    "randomk": Kind(
        lambda rule: RandomK(rule.number, scaled=rule.scaled),
        "k of d numbers, k/d = 0.1, at places that both ends draw",
        "k/d",
        0.1,
        may_scale=True,
    ),
    "lowrank": Kind(lambda rule: LowRank(int(rule.number)), "matrices by two factors of rank r = 4", "r", 4),
}


@functools.cache
def codec_of(rule: CodecRule) -> Codec:
    """The codec of a rule."""
    return CODECS[rule.name].make(rule)
