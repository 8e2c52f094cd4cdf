"""What benchmarks/gpu.py measures: one way to run a round, whether it is right, how fast it is and what it launches."""

import gc
import statistics
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from paper_data import read_images
from torch import nn

from fedmom.data.datasets import Dataset
from fedmom.data.partition import make_partition
from fedmom.engine.engine import Engine
from fedmom.engine.stacked.cuda_graphs import COMINGS
from fedmom.machine.precision import allow_tf32
from fedmom.method.algorithms import Method
from fedmom.method.schedules import LearningRate
from fedmom.method.state import ClientState, to_device
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, beginning
from fedmom.tasks.models import GlobalAveragePool, build_model
from fedmom.tasks.supervised import Supervised

FORMS = {  # storage, and whether float32 products may be TF32
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
MEASURES = ("train_loss", "consensus_distance", "momentum_spread")
ROUNDING = 1e-6  # in float64, relative: what is wrong is off by more
Row = dict[str, Any]


class Load(NamedTuple):
    """A workload: so many clients of so many images, of which a cohort takes part."""

    model: str
    clients: int  # N
    each: int  # n_i
    cohort: int  # C, also the largest K
    batch: int  # B
    steps: int  # I
    shape: tuple[int, ...] = (3, 32, 32)  # of an image
    momentum: float = 0.9
    hidden: int = 0  # width of an mlp

    @property
    def name(self) -> str:
        return self.model + ("" if self.momentum else ", momentum 0")

    @property
    def plan(self) -> Plan:
        options: Row = {"num_local_steps": self.steps, "eval_every": 10**9}
        return Plan(Method(self.momentum), LearningRate(0.02), 2, self.cohort, self.batch, **options)


class Way(NamedTuple):
    """How the engine runs it."""

    path: str
    convolution: str  # "": by layer
    form: str
    chunk: int  # K

    @property
    def name(self) -> str:
        return f"{self.path} {self.convolution}".strip()


def images(num: int, shape: tuple[int, ...], path: Path | None = None) -> Dataset:
    """CIFAR-10 if it is given, else random images: speed does not depend on what they show."""
    if path is not None:
        data = read_images(path)
        return data._replace(x_train=data.x_train[:num], y_train=data.y_train[:num], augment="none")
    x = torch.randint(256, (num, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    y = torch.arange(num) % 10
    return Dataset(x, y, x[:200], y[:200], 10, (0.5,) * shape[0], (0.25,) * shape[0], "none")


def model_of(load: Load) -> nn.Module:
    options = {"hidden": load.hidden} if load.hidden and load.model == "mlp" else {}
    return build_model(load.model, load.shape, 10, seed=0, **options)


def problem_of(
    load: Load, data: Dataset, device: str, form: str = "float32", model: nn.Module | None = None
) -> Supervised:
    """`model`: instead of the load's."""
    net = model_of(load) if model is None else model
    partition = make_partition("iid", data.y_train.numpy(), load.clients, seed=0)
    return Supervised(data, net, partition, batch_size=load.batch, dtype=FORMS[form][0], device=device)


def layers(load: Load) -> dict[str, nn.Module]:
    """{geometry: a model of that convolution alone, behind one that makes its channels}, each geometry once.

    What takes long to compile in one model is then compiled by many processes.
    """
    found: dict[str, nn.Module] = {}
    side = load.shape[-1]

    def see(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        name = f"{layer.in_channels} to {layer.out_channels}, stride {layer.stride[0]}, side {inputs[0].shape[-1]}"
        own = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        if layer.bias is None:
            own.register_parameter("bias", None)
        before = nn.Conv2d(3, layer.in_channels, 1, stride=side // inputs[0].shape[-1])
        if before.stride[0] * inputs[0].shape[-1] != side:  # a side that a stride does not make: by its padding
            before = nn.Conv2d(3, layer.in_channels, 1 + side - inputs[0].shape[-1])
        found[name] = nn.Sequential(before, own, GlobalAveragePool(), nn.Linear(layer.out_channels, 10))

    model = model_of(load)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(see)
    with torch.no_grad():
        model(torch.zeros(2, *load.shape))
    return found


def engine_of(problem: Supervised, load: Load, way: Way, *, replays: bool = True) -> Engine:
    engine = Engine(problem, load.plan.method, path=way.path, chunk_size=way.chunk, convolution=way.convolution)
    if not replays:
        engine.replays = None
    return engine


def replayed(engine: Engine) -> Row:
    """What the engine says of its recordings."""
    found = engine.replays
    return {} if found is None else {"replayed": found.num_replayed, "trouble": found.trouble}


def why(failure: BaseException) -> str:
    """In one line: no kernel for this dtype or shape, no memory. All of it goes to standard error."""
    traceback.print_exception(failure)
    return (str(failure).splitlines() or [type(failure).__name__])[0][:120]


# --- right? ---------------------------------------------------------------------------------------------------

Trained = tuple[ClientState, list[Row]]


def trained(problem: Supervised, plan: Plan, engine: Engine) -> Trained:
    """The plan twice, one after the other, by one engine -> (the last state, the records of both)."""
    records: list[Row] = []
    for _ in range(2):
        steps = list(run_rounds(problem, plan, engine, beginning(problem, plan)))
        records += [record for _, record in steps]
    return to_device(steps[-1][0].state, "cpu"), records


def checked_plan(load: Load) -> Plan:
    """Six rounds with two lr lists: run twice, recordings of both are made, compared, and replayed."""
    rate = LearningRate(0.02, "step", (0.5,), unit="fraction")
    return load.plan._replace(rate=rate, num_rounds=6)


def exact(load: Load, data: Dataset) -> tuple[Trained, ClientState]:
    """What the plain loop on the CPU in float64 comes to, and the start."""
    problem = problem_of(load, data, "cpu", "float64")
    way = Way("loop", "", "float64", 1)
    return trained(problem, checked_plan(load), engine_of(problem, load, way)), problem.start()


def errors(found: Trained, wanted: Trained, start: ClientState) -> dict[str, float]:
    """Of x, u and buffers ‖found − wanted‖ over how far the wanted ones went; of each measure the worst round's."""
    (state, records), (want, right) = found, wanted
    row = {}
    for part in ("params", "momentum", "buffers"):
        trees = [getattr(s, part) for s in (state, want, start)]
        names = [n for n, v in trees[1].items() if v.is_floating_point()]
        got, end, before = (torch.cat([t[n].double().flatten() for n in names] or [torch.zeros(1)]) for t in trees)
        row[part] = float((got - end).norm() / ((end - before).norm() or 1))
    for name in MEASURES:
        row[name] = max(abs(a[name] - b[name]) / (abs(b[name]) or 1) for a, b in zip(records, right, strict=True))
    return row


def check(load: Load, data: Dataset, way: Way, wanted: tuple[Trained, ClientState], device: str) -> Row:
    """One way against the plain loop; "wrong" where float64 is off by more than rounding, or recordings failed."""
    row: Row = {"model": load.name, "way": way.name, "form": way.form}
    allow_tf32(FORMS[way.form][1])
    try:
        problem = problem_of(load, data, device, way.form)
        engine = engine_of(problem, load, way)
        row |= errors(trained(problem, checked_plan(load), engine), *wanted) | replayed(engine)
    except Exception as failure:
        return {**row, "failed": why(failure)}
    finally:
        allow_tf32(False)
    off = [value for value in row.values() if isinstance(value, float) and not value <= ROUNDING]
    return {**row, "wrong": bool(row.get("trouble") or (way.form == "float64" and off))}


# --- fast? ----------------------------------------------------------------------------------------------------


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rounds_of(load: Load, problem: Supervised, engine: Engine) -> Iterator[Any]:
    """One real round after the other: no minibatch comes twice, and each round is begun as a run begins it."""
    # What images show does not matter here, but a model must not diverge on noise.
    plan = load.plan._replace(num_rounds=10**9, rate=LearningRate(1e-6))
    return run_rounds(problem, plan, engine, beginning(problem, plan))


def measured(
    load: Load,
    data: Dataset,
    way: Way,
    device: str,
    seconds: float,
    *,
    replays: bool = True,
    model: nn.Module | None = None,
) -> Row:
    """Client-steps/s of a run's rounds, the median after those that are recorded and compared; or why it fails.

    Of no seconds: one round, for what it compiles.
    """
    row: Row = {"model": load.name, "way": way.name, "form": way.form, "chunk": way.chunk}
    row |= {} if replays else {"way": f"{way.name}, no graph"}
    allow_tf32(FORMS[way.form][1])
    try:
        problem = problem_of(load, data, device, way.form, model)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        engine = engine_of(problem, load, way, replays=replays)
        rounds = rounds_of(load, problem, engine)
        for _ in range(COMINGS + 1 if seconds and engine.replays is not None else 1):
            next(rounds)  # not timed: kernels are compiled and chosen in them, recordings made and compared
        times: list[float] = []
        while seconds and (len(times) < 3 or (sum(times) < seconds and len(times) < 200)):
            begin = time.perf_counter()  # a round ends with a wait, and the device may have begun the next one by then
            next(rounds)
            times.append(time.perf_counter() - begin)
            if sum(times) > 3 * seconds:
                break
        if times:
            row["rate"] = load.cohort * load.steps / statistics.median(times)
        row |= replayed(engine)
        if device == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    except Exception as failure:
        row["failed"] = why(failure)
    finally:
        allow_tf32(False)
    gc.collect()  # recordings hold a GPU's memory for as long as somebody knows of them
    return row


def profiled(load: Load, data: Dataset, way: Way, device: str) -> Row:
    """Of one replayed round its kernels (on a CPU operators) by time, and the host's calls."""
    row: Row = {"model": load.name, "way": way.name, "form": way.form, "chunk": way.chunk}
    allow_tf32(FORMS[way.form][1])
    cuda = device == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * cuda]
    try:
        problem = problem_of(load, data, device, way.form)
        engine = engine_of(problem, load, way)
        rounds = rounds_of(load, problem, engine)
        for _ in range(5):
            next(rounds)
        begin = time.perf_counter()
        for _ in range(5):
            next(rounds)
        row["milliseconds"] = 1e3 * (time.perf_counter() - begin) / 5
        now(problem.device)
        with torch.profiler.profile(activities=kinds) as profile:
            next(rounds)  # launches one round, be it this one or the one after it
            now(problem.device)
        everything = profile.key_averages()
        kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        found = [e for e in everything if e.device_type == kind]
        times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in found}
        counts = {e.key: e.count for e in found}
        longest = sorted(times, key=lambda name: -times[name])[:40]
        row["busy"] = sum(times.values()) / 1e3
        row["kernels"] = [[name[:100], times[name] / 1e3, counts[name]] for name in longest if times[name] > 0]
        calls = [e for e in everything if e.key.startswith("cu")]  # of CUDA's runtime and driver
        row["host"] = [[e.key, e.self_cpu_time_total / 1e3, e.count] for e in calls]
        row |= replayed(engine)
    except Exception as failure:
        row["failed"] = why(failure)
    finally:
        allow_tf32(False)
    return row
