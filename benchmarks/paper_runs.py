"""The runs of benchmarks/paper.py: the protocol that they share, one cell of the list, and how long it takes."""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from fedmom.data.datasets import Dataset
from fedmom.data.partition import make_partition
from fedmom.engine.auto import choose
from fedmom.engine.engine import Engine
from fedmom.engine.stacked.cuda_graphs import COMINGS
from fedmom.errors import DivergedError
from fedmom.method.algorithms import Method
from fedmom.method.schedules import LearningRate
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, RunState, beginning, round_job
from fedmom.tasks.models import build_model
from fedmom.tasks.supervised import Supervised

SCHEDULES = {"constant": "constant", "decayed": "step"}  # ours: fedmom's
ORDER = (1, 8, 16, 4)  # of I, the most telling first


class BudgetError(Exception):
    """The budget is spent, or whoever started this process is gone."""


class Cell(NamedTuple):
    """A run with either schedule."""

    seed: int
    interval: int  # I
    clients: int  # N


class Protocol(NamedTuple):
    """What all runs of a folder share: the first line of its rows."""

    model: str
    data: str  # what the images are
    images: int  # n, of all clients together
    test_images: int
    batch: int  # B of a client
    clients: list[int]
    intervals: list[int]
    lrs: list[float]  # tried for the fewest clients; one: not tried
    scale: str  # "linear" in N, or "none"
    augment: str
    matmul: str
    path: str  # asked for
    convolution: str  # "": by layer
    units: int  # E in units of `unit` examples
    points: int  # evaluations of a run
    ways: dict[str, list[Any]]  # {N: what `measured_way` gives}
    speedup: list[int]  # I; see `schedules_of`

    @property
    def unit(self) -> int:
        """Examples of the shortest run in which every milestone, 1/2 and 3/4, ends a round for every N and I."""
        return 4 * math.lcm(*self.intervals) * max(self.clients) * self.batch

    @property
    def epochs(self) -> float:
        """E, joint epochs of a run."""
        return self.units * self.unit / self.images

    def rounds(self, cell: Cell) -> int:
        return self.units * self.unit // (cell.clients * self.batch * cell.interval)

    def schedules(self, cell: Cell) -> list[str]:
        return schedules_of(cell.clients, cell.interval, max(self.clients), self.speedup)

    def ends(self, clients: int) -> tuple[int, int]:
        """The smallest and the largest I that so many clients run, in the trials of lr too."""
        sizes = [i for i in self.intervals if self.schedules(Cell(0, i, clients))]
        if len(self.lrs) > 1 and clients == min(self.clients):
            sizes.append(1)
        return min(sizes), max(sizes)

    def cost(self, cell: Cell, schedules: Sequence[str]) -> float:
        """Seconds that these runs of a cell take, by the rate measured at first; of none: those of a trial of lr.

        The first half is run once for all of them, and is all of a trial.
        """
        _, _, per_round, per_step, evaluation, short, long = self.ways[str(cell.clients)]
        least, most = self.ends(cell.clients)
        begin = short + (cell.interval - least) / max(1, most - least) * (long - short)
        lrs = 3 if "decayed" in schedules else 1  # of which each needs a recording of its own, on a GPU
        steady = self.rounds(cell) * (per_round + cell.interval * per_step) + self.points * evaluation
        return (0.5 + 0.5 * len(schedules)) * steady + lrs * begin


def schedules_of(clients: int, interval: int, most: int, speedup: Sequence[int]) -> list[str]:
    """What is run of an N and an I, first things first: both schedules, unless `speedup` says less.

    The lr then is decayed for the largest N alone, and constant for the I in `speedup` alone.
    """
    if not speedup:
        return ["constant", "decayed"]
    return ["decayed"] * (clients == most) + ["constant"] * (interval in speedup)


def small_cnn(shape: tuple[int, ...]) -> nn.Module:
    """Two convolutions with stride 2 and a dense layer; 25,578 parameters on CIFAR-10."""
    channels, height, width = shape
    features = 32 * -(-height // 4) * -(-width // 4)
    with torch.device("cpu"):
        return nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(features, 10)),
        )


def problem_of(protocol: Protocol, data: Dataset, clients: int, seed: int, device: str) -> Supervised:
    if protocol.model == "small-cnn":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = small_cnn(data.input_shape)
    else:
        model = build_model(protocol.model, data.input_shape, data.num_classes, seed=seed)
    partition = make_partition("iid", data.y_train.numpy(), clients, seed=seed)
    options: dict[str, Any] = {"batch_size": protocol.batch, "augment": protocol.augment}
    return Supervised(data, model, partition, **options, seed=seed, device=device)


def plan_of(protocol: Protocol, cell: Cell, schedule: str, lr: float) -> Plan:
    rate = LearningRate(lr, SCHEDULES[schedule], (0.5, 0.75), unit="fraction")
    rounds = protocol.rounds(cell)
    return Plan(
        *(Method(0.9, weight_decay=1e-4), rate, rounds, cell.clients, protocol.batch, cell.seed),
        num_local_steps=cell.interval,
        eval_every=rounds // protocol.points,
    )


# --- one cell -------------------------------------------------------------------------------------------------


class Watch:
    """The time that is left; a worker's is over when whoever began it is gone."""

    def __init__(self, seconds: float, *, is_worker: bool) -> None:
        self.begin, self.seconds = time.monotonic(), seconds
        self.parent = os.getppid() if is_worker else None  # of others a shell may go away, which means nothing

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def check(self) -> None:
        if self.left() <= 0 or self.parent not in (None, os.getppid()):
            raise BudgetError


class Course(NamedTuple):
    """A run so far."""

    done: RunState
    curve: list[list[float]]  # [points, 6]: steps, joint epochs, seconds, train loss, test loss, test accuracy
    seconds: float  # of training alone


def advance(problem: Supervised, plan: Plan, engine: Engine, course: Course, until: int, watch: Watch) -> Course:
    """Rounds up to the one numbered `until`."""
    done, curve, seconds = course.done, list(course.curve), course.seconds
    losses: list[float] = []  # of the rounds since the last evaluation
    steps = run_rounds(problem, plan, engine, done)
    while done.round < until:
        done, record = next(steps)
        watch.check()
        seconds += plan.cohort_size * plan.num_local_steps / record["client_steps_per_second"]
        losses.append(record["train_loss"])
        if "test_loss" in record:
            loss, losses = statistics.fmean(losses), []
            measured = [record["test_loss"], record["test_accuracy"]]
            curve.append([record["steps"], record["joint_epochs"], seconds, loss, *measured])
    return Course(done, curve, seconds)


def begun(
    protocol: Protocol, data: Dataset, cell: Cell, schedule: str, lr: float, device: str
) -> tuple[Supervised, Plan, Engine, Course]:
    """A run before its first round."""
    problem = problem_of(protocol, data, cell.clients, cell.seed, device)
    plan = plan_of(protocol, cell, schedule, lr)
    path, chunk = protocol.ways[str(cell.clients)][:2]
    engine = Engine(problem, plan.method, path=path, chunk_size=chunk, convolution=protocol.convolution)
    return problem, plan, engine, Course(beginning(problem, plan), [], 0.0)


def run_cell(
    protocol: Protocol, data: Dataset, cell: Cell, schedules: Sequence[str], lr: float, options: Any
) -> Iterator[dict[str, Any]]:
    """A row of each of the schedules as soon as it is finished; the rounds that they share are run once."""
    problem, _, engine, start = begun(protocol, data, cell, schedules[0], lr, options.device)
    plans = {name: plan_of(protocol, cell, name, lr) for name in schedules}
    shared = None
    for name, plan in plans.items():
        row: dict[str, Any] = {"kind": "run", **cell._asdict(), "schedule": name, "lr": lr, "status": "done"}
        begin = time.monotonic()
        try:
            if shared is None:
                shared = advance(problem, plan, engine, start, plan.num_rounds // 2, options.watch)
            course = advance(problem, plan, engine, shared, plan.num_rounds, options.watch)
            row["curve"] = [[round(value, 6) for value in point] for point in course.curve]
        except DivergedError as error:
            row |= {"status": "diverged", "why": str(error)}
        if engine.replays is not None:
            row |= {"replayed": engine.replays.num_replayed, "trouble": engine.replays.trouble}
        yield {**row, "took": time.monotonic() - begin, **options.where}


def cells_of(protocol: Protocol, seeds: int) -> list[Cell]:
    """In order of importance: all of a seed, then I as in ORDER, then the ends of N.

    For a speedup the largest N comes first, with every I. Where it takes both schedules they follow one another, as
    they share a half: with I = 4, the last in ORDER, all decayed runs are still before the constant ones.
    """
    intervals = sorted(protocol.intervals, key=lambda i: ORDER.index(i) if i in ORDER else len(ORDER))
    clients = sorted(protocol.clients, key=lambda n: (n not in (max(protocol.clients), min(protocol.clients)), -n))
    cells = [Cell(*each) for each in product(range(seeds), intervals, clients)]
    if protocol.speedup:
        cells.sort(key=lambda cell: (cell.seed, cell.clients != max(protocol.clients)))
    return [cell for cell in cells if protocol.schedules(cell)]


# --- the rate of this machine ----------------------------------------------------------------------------------


def measured_way(protocol: Protocol, data: Dataset, clients: int, options: Any) -> list[Any]:
    """[path, chunk size, seconds per round, per step, per evaluation, more at the begin for the smallest I, largest I].

    These I are of those that are run with so many clients. On a GPU the first rounds of every lr are not replayed yet,
    and are recorded and compared.
    """
    problem = problem_of(protocol, data, clients, 0, options.device)
    sizes = sorted({*protocol.ends(clients)})
    done, times, begins = beginning(problem, plan_of(protocol, Cell(0, 1, clients), "constant", 1e-3)), [], []
    path, chunk = protocol.path, clients
    for size in reversed(sizes):
        plan = plan_of(protocol, Cell(0, size, clients), "constant", 1e-3)
        job = round_job(problem, plan, done)
        if path == "auto":
            path, chunk, *_ = choose(problem, plan.method, done.state, job, path="auto", chunk_size=0)
        new = partial(Engine, problem, plan.method, path=path, chunk_size=chunk, convolution=protocol.convolution)
        new().run_round(done.state, job)  # kernels are loaded and chosen in it
        engine = new()
        once = partial(engine.run_round, done.state, job)
        first = seconds_of(lambda once=once: [once() for _ in range(COMINGS)], options)
        times.append(median_time(once, options))
        begins.append(max(0.0, first - COMINGS * times[-1]))
    problem.evaluate(done.state)
    evaluation = median_time(lambda: problem.evaluate(done.state), options)
    per_step = max(0.0, times[0] - times[-1]) / max(1, sizes[-1] - sizes[0]) or times[0] / sizes[-1]
    per_round = max(0.0, times[-1] - sizes[0] * per_step)
    return [path, chunk, per_round, per_step, evaluation, begins[-1], begins[0]]


def seconds_of(call: Callable[[], object], options: Any) -> float:
    begin = time.perf_counter()
    call()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def median_time(call: Callable[[], object], options: Any) -> float:
    found: list[float] = []
    while len(found) < 3 or (sum(found) < 0.5 and len(found) < 20):
        found.append(seconds_of(call, options))
    return statistics.median(found)
