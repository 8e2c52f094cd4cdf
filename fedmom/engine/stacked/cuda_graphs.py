"""The local steps of a chunk of clients, recorded once as a CUDA graph and replayed: nothing is launched from Python.

A recording belongs to a number of clients and the γ of a round; start, minibatches and weights are copied into the
memory that it reads, and it owns all memory that it reads and did not make. It is made the second time that such a
chunk comes by, and trusted after it has given what the same steps give without it, also in another round. While a
chunk runs, the next one's minibatches are drawn on a stream of their own.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fedmom.engine.stacked.means import Distances, distances
from fedmom.engine.stacked.steps import Stack
from fedmom.method.state import ClientState
from fedmom.rounds.round import Job, Progress
from fedmom.tasks.classification import Batch
from fedmom.user_code import one_line

# f -> (what it gave, a function that does it again, into the same memory)
Recorder = Callable[[Callable[[], Distances]], tuple[Distances, Callable[[], None]]]
GraphKey = tuple[Any, ...]

COMINGS = 4  # of a chunk: it is taken, recorded, compared, and from then on replayed
_MOST = 4  # recordings that are kept, each with the memory of its steps
_BATCHES = 0.1  # of the free memory: more minibatches of a chunk than fit into it are drawn step by step, unrecorded


def cuda_graph(run: Callable[[], Distances]) -> tuple[Distances, Callable[[], None]]:
    """`run` as a CUDA graph. Raises RuntimeError where it cannot be one."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    try:
        side.wait_stream(main)
        with torch.cuda.stream(side):
            run()  # whatever is made at first use must not be recorded
        main.wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
    finally:
        torch.cuda.set_stream(main)  # a capture that fails leaves its own stream behind
    return found, graph.replay


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
        self._kept: OrderedDict[GraphKey, _Recording] = OrderedDict()
        self._last: OrderedDict[GraphKey, None] = OrderedDict()  # what came by once

    def fits(self, job: Job, num_clients: int) -> bool:
        """Whether all minibatches of a chunk of so many clients may lie in memory at once."""
        task = self.stack.task
        if task.device.type != "cuda":
            return True
        each = math.prod(task.dataset.x_train.shape[1:]) * task.dtype.itemsize * task.sampler.batch_size
        return 2 * num_clients * len(job.lrs) * each < _BATCHES * torch.cuda.mem_get_info(task.device)[0]

    def run(self, start: ClientState, parts: Sequence[Job], progress: Progress | None = None) -> Iterator[Distances]:
        """What remains of each chunk, all of whose clients take as many steps as there are in job.lrs.

        Each is to be used up before the next is asked for: they may share their memory.
        """
        for part, batches in self._drawn(parts):
            yield self._run(start, part, batches)
            if progress:
                progress(len(part.clients) * len(part.lrs))

    def _run(self, start: ClientState, job: Job, batches: list[Batch]) -> Distances:
        inputs = _inputs(start, batches, job.weights)
        key = (tuple(job.lrs), *((tensor.shape, tensor.dtype) for tensor in inputs))
        recording = self._kept.get(key)
        if recording is not None:
            self._kept.move_to_end(key)
            for memory, tensor in zip(recording.inputs, inputs, strict=True):
                memory.copy_(tensor)
            recording.replay()
            if recording.is_trusted(job.round_index):
                self.num_replayed += 1
                return recording.found
        found = self._straight(start, job, batches)
        if recording is not None:
            recording.compared.append(job.round_index)
            self._check(recording.found, found)
        elif key in self._last and not self.trouble:
            self._record(key, start, job, batches, found)
        self._last[key] = None
        while len(self._last) > 2 * _MOST:
            self._last.popitem(last=False)
        return found

    def _straight(self, start: ClientState, job: Job, batches: list[Batch]) -> Distances:
        try:
            return distances(start, self.stack.run_straight(start, job, batches))
        except torch.OutOfMemoryError:
            if not self._kept:
                raise
        self._give_up("the memory does not suffice for recordings beside the steps themselves")
        torch.cuda.empty_cache()
        return distances(start, self.stack.run_straight(start, job, batches))

    def _record(self, key: GraphKey, start: ClientState, job: Job, batches: list[Batch], want: Distances) -> None:
        """Record this chunk, and keep it if it gives `want`."""
        while len(self._kept) >= _MOST:
            self._kept.popitem(last=False)
        memory = tree_map(torch.clone, (start, batches, job.weights))
        own_start, own_batches, weights = memory
        own_job, reads = job._replace(weights=weights), _Reads()

        def steps() -> Distances:
            with reads:
                return distances(own_start, self.stack.run_straight(own_start, own_job, own_batches))

        try:
            found, replay = self.record(steps)
            replay()
        except RuntimeError as error:
            self._give_up(one_line(error))
            return
        # Kernels that torch's dispatcher never sees (Triton's) read what the job and the stack hold.
        owns = (own_job, self.stack.numbers, reads.outside)
        self._kept[key] = _Recording(_inputs(*memory), owns, found, replay, [job.round_index])
        self._check(found, want)

    def _check(self, found: Distances, want: Distances) -> None:
        if not _agree(found, want):
            self._give_up("a replay gave another result")

    def _give_up(self, trouble: str) -> None:
        self.trouble = trouble
        self._kept.clear()
        warnings.warn(f"rounds are not replayed as a CUDA graph: {trouble}", stacklevel=2)

    def _drawn(self, parts: Sequence[Job]) -> Iterator[tuple[Job, list[Batch]]]:
        """Every chunk and its minibatches; on a GPU the next ones are drawn while the caller's work goes on."""
        task = self.stack.task

        def draw(part: Job) -> list[Batch]:
            return list(task.round_batches(part.clients, part.first_steps, len(part.lrs)))

        if task.device.type != "cuda":
            for part in parts:
                yield part, draw(part)
            return
        side = torch.cuda.Stream(task.device)
        side.wait_stream(torch.cuda.current_stream(task.device))
        for number, part in enumerate(parts):
            if number == 0:
                batches, ready = self._on(side, draw, part)
            main = torch.cuda.current_stream(task.device)  # of this chunk's work: not the last one's for sure
            main.wait_event(ready)
            for tensor in tree_leaves(batches):
                tensor.record_stream(main)
            yield part, batches
            if number + 1 < len(parts):
                batches, ready = self._on(side, draw, parts[number + 1])

    @staticmethod
    def _on(side: Any, draw: Callable[[Job], list[Batch]], part: Job) -> tuple[list[Batch], Any]:
        with torch.cuda.stream(side):
            batches = draw(part)
            return batches, side.record_event()


def _inputs(start: ClientState, batches: list[Batch], weights: Tensor) -> list[Tensor]:
    """All that a chunk's steps read, by name: the order of a dict may change from round to round."""
    return [*(tree[name] for tree in start for name in sorted(tree)), *tree_leaves(batches), weights]


def _agree(one: Distances, other: Distances) -> bool:
    """Up to generous rounding: a replay of the wrong memory is off by as much as the steps themselves."""
    pairs = [(one.losses, other.losses)]
    pairs += [(a, b) for at, found in other.sums.items() for a, b in zip(one.sums[at], found, strict=True)]
    pairs += [(one.buffers[name], other.buffers[name]) for name in other.buffers]
    for got, want in pairs:
        away, size = (torch.linalg.vector_norm(t.double()) for t in (got - want, want))
        if not away <= 0.02 * size + 1e-9 and torch.isfinite(size):  # a run that diverges says so itself
            return False
    return True
