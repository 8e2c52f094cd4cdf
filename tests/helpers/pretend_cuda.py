"""A CUDA device that is not there: tensors on the CPU that say they are on one, and are watched as they are used.

Inside of `pretend()` whatever is sent to "cuda" answers as it would there, and the `Card` writes down, by the place in
fedmom: what is launched, where the host waits, what is copied to the card, operators that mix devices, and memory that
one stream uses before another is done with it. Graphs are emulated: a capture's operators are written down and a replay
takes them again on the same memory. Memory that the capture did not make is held weakly, as CUDA holds it: if nobody
else keeps it, the replay reads NaN and the card says what it was. What a capture may not do raises, as on a card.

Kernels of Triton and the card's own rounding are not here.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from fedmom.data import batches

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
COPIES = {"_to_copy", "copy_"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
# What of an operator's operands is not read, or not as a whole.
WRITTEN_ALONE = {"copy_", "zero_", "fill_", "_foreach_zero_", "_foreach_copy_"}  # their first operand
READ_ALONE = {"_fused_sgd_": "grads"}  # though the schema says that it is written: it is where gradients are scaled
GATHERED = {"index_select", "index", "gather", "embedding"}  # as much of the first operand as there are results
# How torch's kernels over lists of tensors take them: so many tensors of 1, 2, … lists, and so many blocks of numbers.
LIST_DEPTHS, LIST_BLOCKS, LIST_BLOCK, CAT_TENSORS = (110, 64, 48, 36, 30), 320, 65_536, 128
FORM_ALONE = {"squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_", "detach_"}


class Memory:
    """What is known of one storage on the card."""

    def __init__(self, stream: "Stream", graph: "Graph | None") -> None:
        self.stream, self.graph = stream, graph
        self.written = (stream, 0 if graph else stream.now)  # a capture does nothing yet
        self.read: dict[Stream, int] = {}
        self.known_to = {stream}  # streams that the allocator was told of


class Stream:
    """Work in order; of other streams it knows what it has waited for."""

    device = CUDA

    def __init__(self, *_: Any, card: "Card", **__: Any) -> None:
        self.card, self.now, self.seen = card, 0, dict[Stream, int]()

    def done(self) -> dict["Stream", int]:
        return {**self.seen, self: self.now}

    def learn(self, done: dict["Stream", int]) -> None:
        for stream, number in done.items():
            self.seen[stream] = max(number, self.seen.get(stream, 0))

    def has_seen(self, stream: "Stream", number: int) -> bool:
        return stream is self or self.seen.get(stream, 0) >= number

    def wait_stream(self, other: "Stream") -> None:
        self.learn(other.done())

    def record_event(self, *_: Any) -> "Event":
        return Event(self.card, self.done())

    def wait_event(self, event: "Event") -> None:
        self.learn(event.done)


class Event(NamedTuple):
    """torch.cuda.Event."""

    card: "Card"
    done: dict[Stream, int]

    def synchronize(self) -> None:
        self.card.wait("synchronize", self.done)


class Place(NamedTuple):
    """A tensor of a recorded operator: a part of some memory."""

    memory: Any  # the storage, or of memory that the capture did not make a weak reference to it
    dtype: torch.dtype
    layout: tuple[Any, ...]  # offset, size, stride
    what: str


class Graph:
    """torch.cuda.CUDAGraph."""

    card: "Card"

    def __init__(self, **_: Any) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.broken = False

    def capture_begin(self) -> None:
        self.card.graph = self

    def capture_end(self) -> None:
        self.card.graph = None
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def place(self, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        memory, storage = memory_of(t), t.untyped_storage()
        layout = (t.storage_offset(), tuple(t.size()), tuple(t.stride()))
        own = memory is None or memory.graph is self
        if own:
            return Place(storage, t.dtype, layout, "")
        return Place(weakref.ref(storage), t.dtype, layout, _described(t))

    def replay(self) -> None:
        assert self.card.graph is None, "a replay while a graph is captured"
        self.card.replays += 1
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, places in self.calls:
                again = func(
                    *tree_map(self._there, args, is_leaf=_is_place), **tree_map(self._there, kwargs, is_leaf=_is_place)
                )
                for place, new in zip(places, _tensors(again), strict=True):
                    if place is not None:
                        self._there(place).copy_(new)

    def _there(self, place: Any) -> Any:
        if not _is_place(place):
            return place
        storage = place.memory() if isinstance(place.memory, weakref.ref) else place.memory
        if storage is None:
            self.card.dead[place.what] += 1
            return torch.full(place.layout[1], torch.nan if place.dtype.is_floating_point else 77, dtype=place.dtype)
        if memory := getattr(storage, "on_card", None):
            self.card.use(memory, lambda: place.what, writes=memory.graph is self)
        return torch.empty(0, dtype=place.dtype).set_(storage, *place.layout)


def _described(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} at {site()}"


def _is_place(leaf: Any) -> bool:
    return isinstance(leaf, Place)


class Capture:
    """torch.cuda.graph, which leaves its stream current where the capture failed."""

    def __init__(self, graph: Graph, **_: Any) -> None:
        self.graph, self.context = graph, torch.cuda.stream(torch.cuda.Stream())

    def __enter__(self) -> None:
        self.graph.card.wait("synchronize")
        self.context.__enter__()
        self.graph.capture_begin()

    def __exit__(self, *raised: Any) -> None:
        self.graph.capture_end()
        self.context.__exit__(*raised)


class OnStream:
    """torch.cuda.stream: what is left open stays."""

    card: "Card"

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before = self.card.current
        self.card.set_stream(self.stream)

    def __exit__(self, *_: Any) -> None:
        self.card.set_stream(self.before)


class Card:
    """What the device saw; every Counter is by the place in the code."""

    def __init__(self) -> None:
        self.launches, self.waits, self.sent = Counter[str](), Counter[str](), Counter[str]()
        self.bytes = Counter[str]()  # that kernels read and write, by operator; nothing stays in a cache
        self.mixed, self.races, self.dead = Counter[str](), Counter[str](), Counter[str]()
        self.replays = 0
        self.seconds, self.launch_seconds, self.first_seconds = 0.0, 1e-5, 0.0  # a clock that only launches move
        self.current, self.graph = Stream(card=self), None
        self.coming: list[tuple[Tensor, Tensor, Stream, int]] = []  # to main memory while the host goes on
        self.makes: bool | None = None  # whether what a call in Python makes is on the card; None outside of any
        self.streams = weakref.WeakSet([self.current])
        self._shapes = set[Any]()

    def troubles(self) -> dict[str, int]:
        """What no program may do."""
        return {**self.mixed, **self.races, **self.dead}

    def forget(self) -> None:
        """Count from here on."""
        for counter in (self.launches, self.waits, self.sent, self.bytes):
            counter.clear()
        self.replays = 0

    def set_stream(self, stream: Stream) -> None:
        self.current = stream
        self.streams.add(stream)

    def forbid(self, what: str) -> None:
        if self.graph is not None:
            self.graph.broken = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what} at {site()})")

    def wait(self, what: str, until: dict[Stream, int] | None = None) -> None:
        """The host waits for all that was launched, or for what streams had done by then: the rest comes after it."""
        self.forbid(what)
        self.waits[f"{what} {site()}"] += 1
        for stream in list(self.streams):
            for other in list(self.streams):
                stream.learn(other.done() if until is None else until)
        still = []
        for copy in self.coming:
            into, value, stream, number = copy
            if until is None or until.get(stream, 0) >= number:
                with _disable_current_modes():
                    into.copy_(value)
            else:
                still.append(copy)
        self.coming = still

    def bring(self, into: Tensor, value: Tensor) -> None:
        """A copy to main memory that nobody waits for: NaN is there until somebody does."""
        self.forbid("a copy to the host")
        self.current.now += 1
        with _disable_current_modes():
            self.coming.append((into, value.clone(), self.current, self.current.now))
            into.fill_(torch.nan if into.dtype.is_floating_point else 77)

    def send(self, what: str) -> None:
        self.forbid(what)
        self.sent[f"{what} {site()}"] += 1

    def make(self, t: Tensor) -> Tensor:
        """t, whose memory is new, is on the card."""
        if _is_dense(t) and not memory_of(t):
            storage = bare(t).untyped_storage()
            storage.on_card = Memory(self.current, self.graph)
            weakref.finalize(storage, self._freed, storage.on_card)
        return t

    def _freed(self, memory: Memory) -> None:
        for stream, number in memory.read.items():
            if stream not in memory.known_to and not memory.stream.has_seen(stream, number):
                self.races["memory is freed that another stream may still read, and record_stream was not called"] += 1

    def use(self, memory: Memory, what: Callable[[], str], *, writes: bool) -> None:
        now = self.current
        if memory.written[0] not in self.streams:  # of another pretended card: something kept it
            memory.written, memory.read = (now, 0), {}
        others = [memory.written, *(memory.read.items() if writes else ())]
        if any(not now.has_seen(*other) for other in others):
            self.races[f"{what()} is {'written' if writes else 'read'} before another stream is done with it"] += 1
        if writes:
            memory.written, memory.read = (now, now.now), {}
        else:
            memory.read[now] = now.now

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operator."""
        name, ins = func._schema.name.removeprefix("aten::"), _tensors((args, kwargs))
        device = kwargs.get("device")
        if ins and device is None:
            wanted: bool | None = None  # where its operands are
        elif device is not None and torch.device(device).type != "cpu":
            wanted = torch.device(device).type == "cuda"
            kwargs = {**kwargs, "device": CPU} if wanted else kwargs
        else:
            # What torch makes for itself goes where it is at work, and that looks like the CPU to it.
            wanted = torch._C._current_graph_task_id() != -1 if self.makes is None else self.makes
        here = [t for t in ins if memory_of(t)]
        if here or wanted:
            self._judge(func, name, args, kwargs, ins, here, wanted)
        graph = self.graph
        recorded = tree_map(graph.place, (args, kwargs)) if graph and here else (args, kwargs)
        if _is_brought(name, args):
            self.bring(*args[:2])
            return args[0]
        found = func(*args, **kwargs)
        outs, known = _tensors(found), {t.untyped_storage()._cdata for t in ins}
        new = [t.untyped_storage()._cdata not in known for t in outs]
        on_card = wanted if wanted is not None else bool(here)
        if name == "copy_":
            on_card = bool(memory_of(args[0]))
        launches = on_card and (any(new) or func._schema.is_mutable) and name not in FORM_ALONE
        if launches:
            self._launch(func, name, args, kwargs, [t for t, is_new in zip(outs, new, strict=True) if is_new])
        for t, is_new in zip(outs, new, strict=True):
            if is_new and on_card:
                self.make(t)
        if graph and launches and "empty" not in name:
            graph.calls.append(
                (func, *recorded, [graph.place(t) if n else None for t, n in zip(outs, new, strict=True)])
            )
        return found

    def _judge(
        self, func: Any, name: str, args: Any, kwargs: Any, ins: list[Tensor], here: list[Tensor], wanted: bool | None
    ) -> None:
        """Waits, copies and mixed devices."""
        away = [t for t in ins if t.dim() and not memory_of(t)]
        if name in COPIES:
            if _is_brought(name, args):
                return
            source, into = ins[-1], memory_of(ins[0]) if name == "copy_" else wanted
            if into is not None and bool(memory_of(source)) != bool(into):
                (self.send if into else self.wait)(f"{name} to the {'card' if into else 'host'}")
            return
        indices = _tensors(args[1]) if name in INDEXED else []
        if away and here:
            if all(any(t is i for i in indices) for t in away):
                self.send("an index")
            else:
                self.mixed[f"{name} mixes devices at {site()}"] += 1
        boolean = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        counted = name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None
        if name in WAITS or boolean or counted:
            self.wait(name)

    def _launch(self, func: Any, name: str, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        if "empty" not in name:
            number = num_kernels(name, args)
            self.launches[name] += number
            self.bytes[name] += num_moved(func, name, args, kwargs, made)
            self.current.now += 1
            self.seconds += number * self.launch_seconds
            shapes = (name, *(tuple(t.shape) for t in _tensors((args, kwargs))))
            self.seconds += 0 if shapes in self._shapes else self.first_seconds
            self._shapes.add(shapes)
        if self.graph is not None:
            return
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for t in _tensors(given.get(argument.name)):
                if memory := memory_of(t):
                    self.use(memory, partial(_described, t), writes=writes)


def _is_brought(name: str, args: Any) -> bool:
    """Whether the copy goes to main memory, and the host goes on meanwhile."""
    return name == "copy_" and args[2:] == (True,) and bool(memory_of(args[1])) and not memory_of(args[0])


def num_kernels(name: str, args: Any) -> int:
    """As many as torch launches for one operator: those over lists take so many tensors at a time."""
    lists = [a for a in args if isinstance(a, list | tuple) and any(isinstance(t, Tensor) for t in a)]
    if name == "cat":
        return -(-len(lists[0]) // CAT_TENSORS)
    if not name.startswith(("_foreach", "_fused")) or not lists:
        return 1
    blocks = sum(-(-t.numel() // LIST_BLOCK) for t in lists[0])
    return max(-(-len(lists[0]) // LIST_DEPTHS[len(lists) - 1]), -(-blocks // LIST_BLOCKS))


def num_moved(func: Any, name: str, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    """Bytes that an operator reads and writes at the least: each operand once, and what it gives."""
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    total, seen = sum(t.nbytes for t in made), set[Any]()
    for place, argument in enumerate(func._schema.arguments):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        writes = writes and READ_ALONE.get(name) != argument.name
        reads = not (name in WRITTEN_ALONE and place == 0)
        for t in _tensors(given.get(argument.name)):
            own = (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), tuple(t.stride()))
            size = t.element_size()
            for length, step in zip(t.shape, t.stride(), strict=True):
                size *= length if step else 1  # an expanded dimension is one in memory
            if name in GATHERED and place == 0 and made:
                size = made[0].numel() * t.element_size()
            total += size * ((own not in seen) * reads + writes)
            seen.add(own)
    return total


class _Operators(TorchDispatchMode):
    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.card.call(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What is asked of tensors in Python: on which device they are, and to go to another."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, card = kwargs or {}, self.card
        name, subject = getattr(func, "__name__", ""), args[0] if args else None
        if name == "__get__" and isinstance(subject, Tensor):
            asked, there = getattr(func.__self__, "__name__", ""), bool(memory_of(subject))
            if there and asked in ("is_cuda", "is_cpu", "device"):
                return {"is_cuda": True, "is_cpu": False, "device": CUDA}[asked]
        if name in ("numpy", "__array__") and memory_of(subject):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({site()})")
        if name == "tolist" and memory_of(subject):
            card.wait(name)
        if name == "pin_memory":
            return subject
        if name in ("to", "cpu", "cuda") and isinstance(subject, Tensor):
            return self._moved(func, name, subject, args[1:], kwargs)
        wanted = _is_cuda(kwargs.get("device"))
        sends = wanted and name in ("tensor", "as_tensor")
        if sends:
            card.send(f"torch.{name}")
            card.wait(f"torch.{name}")
        outer, card.makes = card.makes, not sends and (wanted or any(map(memory_of, _tensors((args, kwargs)))))
        try:
            found = func(*args, **({**kwargs, "device": CPU} if wanted else kwargs))
        finally:
            card.makes = outer
        if wanted or (name == "__deepcopy__" and memory_of(subject)):
            for t in _tensors(found):
                card.make(t)
        return found

    def _moved(self, func: Any, name: str, t: Tensor, args: Any, kwargs: Any) -> Tensor:
        device = {"cpu": CPU, "cuda": CUDA}.get(name, kwargs.get("device"))
        rest = list(args) if name == "to" else []
        if rest and isinstance(rest[0], torch.device | str):
            device = rest.pop(0)
        elif rest and isinstance(rest[0], Tensor):
            device, rest = (CUDA if memory_of(rest[0]) else CPU), [rest[0].dtype]
        there, wanted = bool(memory_of(t)), _is_cuda(device)
        dtype = next((a for a in rest if isinstance(a, torch.dtype)), kwargs.get("dtype") or t.dtype)
        if device is not None and torch.device(device).type == "meta":
            return torch.Tensor.to(t, device, dtype)
        if device is None or there == wanted:
            return torch.Tensor.to(t, dtype, copy=kwargs.get("copy", False))
        if wanted:
            self.card.send("to the card")
        if not (wanted and kwargs.get("non_blocking")):  # of memory that is not pinned the host waits for the copy
            self.card.wait(f"to the {'card' if wanted else 'host'}")
        with _disable_current_modes():
            moved = torch.Tensor.to(t, dtype, copy=True)
        return self.card.make(moved) if wanted else moved


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def bare(t: Tensor) -> Tensor:
    """The tensor that torch.func's levels lie around."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def memory_of(t: Any) -> Memory | None:
    """What is known of a tensor's memory; None where it is not on the card."""
    return getattr(bare(t).untyped_storage(), "on_card", None) if _is_dense(t) else None


def _is_dense(leaf: Any) -> bool:
    """Sparse tensors have no storage of their own, and are not watched."""
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if _is_dense(leaf)]


def site() -> str:
    """Where in fedmom we are."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < 2:
        path = frame.f_code.co_filename
        if "/fedmom/" in path or "/strategies/" in path:
            found.append(f"{path.rsplit('/', 1)[1]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


@contextlib.contextmanager
def pretend(free: int = 80 << 30, count: int = 1) -> Iterator[Card]:
    """A card with so many free bytes; of so many, one is used."""
    card = Card()
    names: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "get_device_name": lambda *_: "pretended",
        "mem_get_info": lambda *_: (free, free),
        "max_memory_allocated": lambda *_: 0,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "graph_pool_handle": lambda: (0, 1),
        "synchronize": lambda *_: card.wait("synchronize"),
        "current_stream": lambda *_: card.current,
        "set_stream": card.set_stream,
        "stream": type("OnStream", (OnStream,), {"card": card}),
        "Stream": partial(Stream, card=card),
        "CUDAGraph": type("CUDAGraph", (Graph,), {"card": card}),
        "graph": Capture,
    }

    def record_stream(t: Tensor, stream: Stream) -> None:
        if memory := memory_of(t):
            memory.known_to.add(stream)

    with contextlib.ExitStack() as stack:
        # By device: a real card's are of no use here, and those of here on no real card.
        batches._constants.cache_clear()
        stack.callback(batches._constants.cache_clear)
        for name, value in names.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", record_stream))
        stack.enter_context(_Operators(card))
        stack.enter_context(_Functions(card))
        yield card


def clock(card: Card) -> Any:
    """In the place of the module `time`: the card's own seconds."""
    return SimpleNamespace(perf_counter=lambda: card.seconds)
