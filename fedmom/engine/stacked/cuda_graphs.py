"""The local steps of a chunk of clients, recorded once as a CUDA graph and replayed: nothing is launched from Python.

A recording belongs to a number of clients and of steps; the start, and all else that may change from round to round
(minibatches, γ, weights), is copied into the memory that it reads, and it owns all memory that it reads and did not
make. It is made the second time that such a chunk comes by, and trusted after it has given what the same steps give
without it (agreement.py), also in another round. While a chunk is replayed, the host draws the next one's minibatches,
those of the next round's first chunk too.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmom.engine.stacked.agreement import agrees, short, trouble_between
from fedmom.engine.stacked.means import Distances, distances
from fedmom.engine.stacked.steps import Orders, Stack
from fedmom.machine.graphs import cuda_graph, sendable, sent
from fedmom.method.state import ClientState
from fedmom.rounds.round import Job, Progress, part_of
from fedmom.user_code import one_line

# f -> (what it gave, a function that does it again, into the same memory)
Recorder = Callable[[Callable[[], Distances]], tuple[Distances, Callable[[], None]]]
GraphKey = tuple[Any, ...]

NO_ROOM = "the memory does not suffice for recordings beside the steps themselves"
COMINGS = 4  # of a chunk: it is taken, recorded, compared, and from then on replayed
_MOST = 4  # recordings that are kept, each with the memory of its steps


class _Reads(TorchDispatchMode):
    """Watches a pass: which memory it reads and has not made itself."""

    def __enter__(self) -> "_Reads":
        self.outside: dict[int, torch.UntypedStorage] = {}
        self._made: set[int] = set()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self.outside[storage._cdata] = storage  # held, so that no other memory can come to have its address
        found = func(*args, **(kwargs or {}))
        self._made.update(s._cdata for s in _storages(found) if s._cdata not in self.outside)
        return found


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass
class _Recording:
    inputs: list[Tensor]  # the memory that a chunk is copied into
    owns: Any  # all else that is read and was not made inside; nobody else may keep it
    found: Distances
    replay: Callable[[], None]
    compared: list[int]  # the rounds in which it gave what the steps give

    def replay_by(self, words: Tensor) -> None:
        """By other orders, which are in main memory."""
        there = self.inputs[-1]
        there.copy_(sendable(words, there.device), non_blocking=True)
        self.replay()

    def is_trusted(self, round_index: int) -> bool:
        """Whether it need not be compared now: it was twice, and once in a later round than its own if there was one.

        The first comparison repeats what was recorded, so memory that has gone stale is not seen by it.
        """
        again = self.compared[1:]
        return bool(again) and (again[-1] != self.compared[0] or round_index == self.compared[0])


class Replays:
    """Chunks through a stack, replayed where they can be. One process, one device, one thread."""

    def __init__(self, stack: Stack, record: Recorder = cuda_graph) -> None:
        self.stack, self.record = stack, record
        self.trouble = ""  # why nothing is recorded any more
        self.num_replayed = 0  # chunks
        self.num_ahead = 0  # of the chunks those whose minibatches were drawn during the round before
        self._kept: OrderedDict[GraphKey, _Recording] = OrderedDict()
        self._last: OrderedDict[GraphKey, None] = OrderedDict()  # what came by once
        self._ahead: tuple[Job, Orders] | None = None

    def run(self, start: ClientState, parts: Sequence[Job], progress: Progress | None = None) -> Iterator[Distances]:
        """What remains of each chunk, all of whose clients take as many steps as there are in job.lrs.

        Each is to be used up before the next is asked for: they may share their memory.
        """
        for part in parts:
            yield self._run(start, part, self._orders(part))
            if progress:
                progress(len(part.clients) * len(part.lrs))
        following = parts[-1].following
        if following is not None and self.stack.problem.device.type == "cuda":  # the card works; the host would wait
            job = following()
            first = part_of(job, torch.arange(min(len(parts[0].clients), len(job.clients))))
            self._ahead = first, self.stack.orders(first)

    def _orders(self, job: Job) -> Orders:
        """Of this chunk, in main memory."""
        if self._ahead is not None:
            known, orders = self._ahead
            self._ahead = None
            if _alike(known, job):
                self.num_ahead += 1
                return orders
        return self.stack.orders(job)

    def _run(self, start: ClientState, job: Job, orders: Orders) -> Distances:
        inputs, words = _tensors(start), orders.words()
        key = (words.shape, len(job.clients), len(job.lrs), *((tensor.shape, tensor.dtype) for tensor in inputs))
        recording = self._kept.get(key)
        if recording is not None:
            self._kept.move_to_end(key)
            _copied(recording.inputs[:-1], inputs)
            recording.replay_by(words)
            if recording.is_trusted(job.round_index):
                self.num_replayed += 1
                return recording.found
        there = sent(words, self.stack.problem.device)
        found = self._straight(start, job, orders.read(there))
        if recording is not None:
            recording.compared.append(job.round_index)
            self._check(recording, found, start, job)
        elif key in self._last and not self.trouble:
            self._record(key, start, job, orders, there, found)
        self._last[key] = None
        while len(self._last) > 2 * _MOST:
            self._last.popitem(last=False)
        return found

    def _straight(self, start: ClientState, job: Job, orders: Orders) -> Distances:
        try:
            return distances(start, self.stack.run_straight(start, job, orders))
        except torch.OutOfMemoryError:
            if not self._kept:
                raise
        self._give_up(NO_ROOM)
        torch.cuda.empty_cache()
        return distances(start, self.stack.run_straight(start, job, orders))

    def _record(
        self, key: GraphKey, start: ClientState, job: Job, orders: Orders, words: Tensor, want: Distances
    ) -> None:
        """Record this chunk, and keep it if it gives `want`."""
        while len(self._kept) >= _MOST:
            self._kept.popitem(last=False)
        own_start = ClientState(*({name: value.clone() for name, value in tree.items()} for tree in start))
        own_words, reads = words.clone(), _Reads()
        own_orders = orders.read(own_words)

        def steps() -> Distances:
            with reads:
                return distances(own_start, self.stack.run_straight(own_start, job, own_orders))

        try:
            found, replay = self.record(steps)
            replay()
        except RuntimeError as error:
            self._give_up(one_line(error))
            return
        # Kernels that torch's dispatcher never sees read what these hold.
        owns = (own_orders, reads.outside)
        recording = _Recording([*_tensors(own_start), own_words], owns, found, replay, [job.round_index])
        self._kept[key] = recording
        self._check(recording, want, start, job)

    def _check(self, recording: _Recording, want: Distances, start: ClientState, job: Job) -> None:
        """Keep it only if it gives `want`, or else what the steps give where they are short."""
        if agrees(recording.found, want):
            return
        orders = self.stack.orders(job._replace(lrs=short(job.lrs)))
        words = orders.words()
        recording.replay_by(words)
        there = orders.read(sent(words, self.stack.problem.device))
        try:
            trouble = trouble_between(
                recording.found, lambda: distances(start, self.stack.run_straight(start, job, there))
            )
        except torch.OutOfMemoryError:
            trouble = NO_ROOM
        if trouble:
            self._give_up(trouble)

    def _give_up(self, trouble: str) -> None:
        self.trouble = trouble
        self._kept.clear()
        warnings.warn(f"rounds are not replayed as a CUDA graph: {trouble}", stacklevel=2)


def _tensors(start: ClientState) -> list[Tensor]:
    """By name: the order of a dict may change from round to round."""
    return [tree[name] for tree in start for name in sorted(tree)]


def _copied(memory: list[Tensor], tensors: list[Tensor]) -> None:
    """In a few launches: all of one dtype together."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        pairs = [(m, t) for m, t in zip(memory, tensors, strict=True) if t.dtype == dtype]
        torch._foreach_copy_([m for m, _ in pairs], [t for _, t in pairs])


def _alike(one: Job, other: Job) -> bool:
    """Whether the same clients take the same steps."""
    fields = ((one.clients, other.clients), (one.first_steps, other.first_steps), (one.weights, other.weights))
    return list(one.lrs) == list(other.lrs) and all(torch.equal(a, b) for a, b in fields)
