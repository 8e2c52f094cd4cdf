"""What was measured on this device, kept on disk so that the next start need not measure again."""

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fedmom.data.inputs import rows_of_inputs
from fedmom.engine.calls import work_of
from fedmom.engine.paths import PATHS
from fedmom.machine.cache import Kept, folder
from fedmom.machine.cores import processor, usable_cores
from fedmom.machine.graphs import cuda_graph
from fedmom.machine.precision import tf32_allowed
from fedmom.method.algorithms import Method
from fedmom.method.corrections import user_object
from fedmom.method.state import ClientState
from fedmom.rounds.round import Job
from fedmom.tasks.kinds import Named
from fedmom.tasks.problem import Problem
from fedmom.tasks.quadratic import Quadratic
from fedmom.tasks.supervised import Supervised

_MOST = 5000  # shapes of one card
_FORMAT, _MOST_WAYS = 1, 1000  # of what is remembered of whole runs
# What decides how fast a way is lies in these rooms.
_ROOMS = ("data", "engine", "machine", "method", "rounds", "tasks")


class Timings:
    """{what: {way: seconds}} of one device and one torch; a file that cannot be read or written is done without."""

    def __init__(self, path: Path | None) -> None:
        self.kept = Kept(path, _seconds, _MOST)
        self.known: dict[str, dict[str, float]] = self.kept.read()

    @classmethod
    def of_device(cls, device: torch.device) -> "Timings":
        """Those of a card by its name, under the torch that runs."""
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        name = "".join(c if c.isalnum() or c in ".+-" else "-" for c in f"{card}-torch-{torch.__version__}")
        place = folder()
        return cls(place and place / f"convolutions-{name}.json")

    def get(self, what: str) -> dict[str, float] | None:
        return self.known.get(what)

    def put(self, what: str, seconds: dict[str, float]) -> None:
        """Keep, beside what other processes have written meanwhile."""
        self.known[what] = seconds
        self.kept.put(what, seconds)

    def measure(self, once: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
        """Seconds of one call, the median after two that are not timed; on a GPU of its replays, as rounds will run.

        Launched one by one, small kernels take as long as their launches, which says nothing about a replay.
        """
        if device.type == "cuda":
            once()  # an error of its own is the caller's
            with contextlib.suppress(RuntimeError):
                _, once = cuda_graph(once)
        found = []
        for number in range(repeats + 2):
            begin = now(device)
            once()
            if number >= 2:
                found.append(now(device) - begin)
        return statistics.median(found)


def _seconds(raw: Any) -> dict[str, float]:
    """Of one shape. Raises ValueError where there are none."""
    if not raw:
        raise ValueError("no way was timed")
    return {way: float(value) for way, value in raw.items()}


class Remembered(NamedTuple):
    """What was chosen for a run by timing: the way, and how fast each way was that it was chosen from."""

    path: str
    chunk_size: int
    measured: dict[str, float]  # {"way × chunk size": client-steps per second}
    day: str = ""  # 2026-01-31, when it was measured


class KnownWays:
    """What was chosen before in one situation: device, versions, problem, model, job and what was asked for.

    It is a timing and no more: whoever takes a way from here has compared it with plain torch first.
    """

    def __init__(
        self, problem: Problem, method: Method, start: ClientState, job: Job, asked: Sequence[Any], *, on: bool
    ) -> None:
        """asked: what else decides which ways there are and how fast they are, in plain values.

        on: whether anything is remembered.
        """
        place = folder() if on else None
        self.name = _situation(problem, method, start, job, asked) if place else ""
        self.kept = Kept(place / "ways.json" if place and self.name else None, _remembered, _MOST_WAYS)

    def get(self) -> Remembered | None:
        return self.kept.read().get(self.name) if self.name else None

    def put(self, path: str, chunk_size: int, measured: dict[str, float]) -> bool:
        """Whether it could be written."""
        return self.kept.put(self.name, Remembered(path, chunk_size, measured, date.today().isoformat()))


def _remembered(raw: Any) -> Remembered:
    """Raises KeyError, TypeError or ValueError where it is none."""
    path, chunk_size, measured, day = raw
    right = path in PATHS and type(chunk_size) is int and chunk_size >= 1 and isinstance(day, str)
    rates = {str(way): float(rate) for way, rate in measured.items()}
    if not right or rates.get(f"{path} × {chunk_size}", 0) != max(rates.values()):
        raise ValueError("no way that was the fastest of some")
    return Remembered(path, chunk_size, rates, day)


def _situation(problem: Problem, method: Method, start: ClientState, job: Job, asked: Sequence[Any]) -> str:
    """All that the speed of the ways depends on, in some digits; "" where that cannot be told."""
    device = problem.device
    parts: dict[str, Any] = {
        "format": _FORMAT,
        "versions": [*_versions(), torch.__version__],
        "device": _device(device),
        "torch": [
            torch.get_num_threads(),
            tf32_allowed(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ],
        "start": [[name, *_form(t)] for tree in start for name, t in tree.items()],
        "clients": [len(problem.sizes), int(problem.sizes.sum())],
        "job": [len(job.clients), len(job.lrs), int(job.num_steps.sum())],
        "method": [method.beta == 0, method.nesterov, method.weight_decay == 0, method.momentum_policy],
        "optimizer": [method.optimizer, method.rules.has_rows or bool(method.codecs)],
        "running_var": method.running_var,
        "problem": [type(problem).__qualname__, problem.small],
        "asked": list(asked),
    }
    if isinstance(problem, Quadratic):
        parts["noise"] = problem.noise_sigma > 0
    if method.correction is not None:  # the user's code: how fast it is, its text must tell
        parts["correction"] = _source(user_object(method.correction)) or _source(type(method.correction))
        if not parts["correction"]:
            return ""
    if isinstance(problem, Supervised):
        batch = next(iter(problem.round_batches(job.clients[:1], job.first_steps[:1], 1)))
        layers = _layers(problem.model)
        kinds = dict.fromkeys(map(type, problem.model.modules()))
        work = work_of(problem.model, rows_of_inputs(batch.x, 0)) or _source(*kinds)
        if not (work and layers):
            return ""
        examples, sampler = problem.dataset.x_train, problem.sampler
        parts["examples"] = [
            *(part for one in tree_leaves(examples) for part in _form(one)),
            str(problem.dtype),
            sampler.batch_size,
            sampler.sampling,
            problem.augment,
        ]
        parts["model"] = [work, layers]
        task = problem.task
        parts["task"] = [task.name, *map(str, task.asked)] if isinstance(task, Named) else _source(type(task))
        if not parts["task"]:
            return ""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _device(device: torch.device) -> list[str | int]:
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]]
    return [device.type, processor(), usable_cores()]


def _form(t: torch.Tensor) -> list[Any]:
    return [list(t.shape), str(t.dtype)]


def _layers(model: nn.Module) -> list[Any]:
    """Every module's kind and options, and what it holds, frozen tensors too; empty where a module does not say."""
    try:
        return [
            [name, type(m).__module__, type(m).__qualname__, m.extra_repr()]
            + [[n, *_form(p), p.requires_grad] for n, p in m.named_parameters(recurse=False, remove_duplicate=False)]
            + [[n, *_form(b)] for n, b in m.named_buffers(recurse=False, remove_duplicate=False)]
            for name, m in model.named_modules(remove_duplicate=False)
        ]
    except Exception:  # a user's model may raise anything
        return []


def _source(*objects: Any) -> list[str]:
    """Names and texts of functions and classes, in some digits; empty where one has none (typed into a console).

    What they call is left out: a choice that is remembered wrongly costs time, and is right all the same.
    """
    try:
        return [
            f"{one.__module__}.{one.__qualname__} {hashlib.sha256(inspect.getsource(one).encode()).hexdigest()[:16]}"
            for one in objects
        ]
    except (OSError, TypeError, AttributeError):
        return []


@functools.cache
def _versions() -> list[str]:
    """Of fedmom: its number, and a fingerprint of the code, which in a checkout changes without it."""
    root, code = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (root / room).rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        number = importlib.metadata.version("fedmom")
    except importlib.metadata.PackageNotFoundError:  # as Flower bundles it
        number = ""
    return [number, code.hexdigest()[:16]]


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
