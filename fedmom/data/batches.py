"""Which examples a client sees at which step, and how their images are augmented: addressed, never consumed.

A client's examples form one endless stream, indexed by its global step t: step t reads positions tB … tB + B − 1.
With `shuffle`, position p belongs to permutation number ⌊p/n⌋ of the client's n examples, so runs with different
I see the same data in the same order, every example comes once per pass over the stream, and a client with n < B
wraps. t is the run's step, so a client that sits a round out passes over those positions.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmom.data.partition import Partition
from fedmom.method.randomness import CROP, FLIP, REPLACEMENT, SHUFFLE, integers, random_bits

SAMPLINGS = {
    "shuffle": "every example once per pass over the client's data, in a new order each pass",
    "replacement": "every draw independent and uniform over the client's data (the theory's i.i.d. samples)",
}
AUGMENTATIONS = {
    "auto": "what is customary for the data set (cifar: crop-flip)",
    "none": "images as they are",
    "crop-flip": "random crop after padding by 4 pixels, random horizontal flip",
}

_KEY = (
    1 << 40
) - 1  # bits of a shuffle key: two of n examples tie with probability n² / 2⁴¹, and then keep their order
_SEGMENTS = 1 << 23  # whose numbers fit beside a key


class Sampler:
    """Addresses the minibatches of all clients; holds the partition in main memory and nothing that changes.

    Drawing takes a hundred operators on a few thousand integers: a GPU would wait for each of their launches, and the
    host has nothing else to do while a GPU works.
    """

    def __init__(
        self,
        partition: Partition,
        batch_size: int,
        *,
        sampling: str = "shuffle",
        seed: int = 0,
    ) -> None:
        self.batch_size, self.sampling, self.seed = batch_size, sampling, seed
        self.indices = torch.from_numpy(np.ascontiguousarray(partition.indices))
        self.offsets = torch.from_numpy(np.ascontiguousarray(partition.offsets))
        self.sizes = self.offsets.diff()

    def draw(self, clients: Tensor, first_steps: Tensor, num_steps: int) -> Tensor:
        """Example numbers [K, num_steps, B] of clients [K], from each one's step first_steps [K] on."""
        place = torch.arange(num_steps * self.batch_size)
        positions = first_steps[:, None] * self.batch_size + place  # [K, P] in each client's stream
        sizes = self.sizes[clients][:, None]
        if self.sampling == "replacement":
            own = integers(sizes, REPLACEMENT, self.seed, clients[:, None], positions)
        else:
            own = self._shuffled(clients, positions)
        drawn = self.indices[self.offsets[clients][:, None] + own]
        return drawn.reshape(len(clients), num_steps, self.batch_size)

    def _shuffled(self, clients: Tensor, positions: Tensor) -> Tensor:
        """[K, P] numbers in 0 … n−1 of each client's own examples, by its permutations.

        A segment is one permutation of one client; all segments that the positions touch are made together, by
        sorting random keys and then by segment. Only whole segments are made: about max(n, P) keys per client.
        """
        sizes = self.sizes[clients]  # [K]
        first_pass = positions[:, 0] // sizes
        num_passes = positions[:, -1] // sizes - first_pass + 1  # [K] permutations of each client
        rows = torch.repeat_interleave(num_passes)  # [S] the client's place 0 … K−1 of every segment
        segment_of_row = num_passes.cumsum(0) - num_passes  # [K] each client's first segment
        which_pass = first_pass[rows] + torch.arange(len(rows)) - segment_of_row[rows]
        segment = torch.repeat_interleave(sizes[rows])  # [E] the segment of every entry
        starts = sizes[rows].cumsum(0) - sizes[rows]  # [S] each segment's first entry
        entry = torch.arange(len(segment)) - starts[segment]  # [E] 0 … n−1 within it
        bits = random_bits(SHUFFLE, self.seed, clients[rows][segment], which_pass[segment], entry)
        keys = bits & _KEY
        if len(rows) <= _SEGMENTS:  # by segment and then by key, in one number
            order = entry[torch.sort(segment << 40 | keys, stable=True).indices]
        else:
            by_key = torch.sort(keys, stable=True).indices
            # Stable, so within each segment the random order stays.
            order = entry[by_key[torch.sort(segment[by_key], stable=True).indices]]
        where = segment_of_row[:, None] + positions // sizes[:, None] - first_pass[:, None]  # [K, P] segment
        return order[starts[where] + positions % sizes[:, None]]


def moves(seed: int, clients: Tensor, steps: Tensor, batch_size: int, pad: int = 4) -> Tensor:
    """How images are cropped and flipped: [*steps.shape, B, 3] rows down and columns right (−pad … pad), flip (0, 1).

    Addressed by (seed, client, the client's step, place in the batch); `clients` and `steps` are of one shape.
    """
    address = (seed, clients[..., None], steps[..., None], torch.arange(batch_size))
    down = integers(2 * pad + 1, CROP, 0, *address) - pad
    right = integers(2 * pad + 1, CROP, 1, *address) - pad
    return torch.stack([down, right, integers(2, FLIP, *address)], -1)


def crop_flip(images: Tensor, moved: Tensor) -> Tensor:
    """Random crop after zero padding, and random horizontal flip, of images [K, B, C, H, W] by `moves` [K, B, 3].

    He et al. (2016), section 4.2.
    """
    K, B, _, H, W = images.shape
    down, right, flip = moved.unbind(-1)
    y = down[..., None] + torch.arange(H, device=images.device)  # [K, B, H] source rows
    x = right[..., None] + torch.arange(W, device=images.device)
    x = torch.where(flip[..., None] > 0, x.flip(-1), x)
    inside = ((y >= 0) & (y < H))[..., :, None] & ((x >= 0) & (x < W))[..., None, :]  # [K, B, H, W]
    source = y.clamp(0, H - 1)[..., :, None] * W + x.clamp(0, W - 1)[..., None, :]
    flat = images.reshape(K, B, -1, H * W)
    shown = flat.gather(3, source.reshape(K, B, 1, H * W).expand_as(flat)).reshape(images.shape)
    return shown * inside[:, :, None].to(images.dtype)


def normalised(images: Tensor, mean: Any, std: Any, dtype: torch.dtype) -> Tensor:
    """uint8 images [..., C, H, W] -> (images / 255 − mean) / std in `dtype`; real tensors are cast, whole ones int64.

    A copy in any case: a model may write into its input, and the examples must stay what they are.
    """
    if images.dtype != torch.uint8:
        return images.to(dtype if images.is_floating_point() else torch.int64, copy=True)
    scale, shift = _constants(tuple(np.ravel(mean).tolist()), tuple(np.ravel(std).tolist()), dtype, images.device)
    # A GPU takes bytes as they are in one pass; a CPU is slower at mixed products.
    return (images * scale if images.is_cuda else images.to(dtype).mul_(scale)).sub_(shift)


@lru_cache(maxsize=64)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """1/(255 std) and mean/std, [C, 1, 1]."""
    shift, scale = (torch.tensor(v, dtype=torch.float64, device=device).reshape(-1, 1, 1) for v in (mean, std))
    return (1 / (255 * scale)).to(dtype), (shift / scale).to(dtype)
