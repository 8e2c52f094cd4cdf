"""Small runs for tests: the engine on quadratics and on tiny images, without a config or a folder."""

import numpy as np
import torch

from fedmom.data.datasets import Dataset, load_dataset
from fedmom.data.partition import make_partition
from fedmom.engine.engine import Engine
from fedmom.method.algorithms import Method
from fedmom.method.outer import OuterNumbers, OuterRule
from fedmom.method.schedules import LearningRate
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, RunState, beginning
from fedmom.tasks.models import build_model
from fedmom.tasks.quadratic import Quadratic
from fedmom.tasks.supervised import Supervised
from laws import Problem, Runner, Trajectory

F64 = torch.float64


class WatchedEngine(Engine):
    """The engine, writing down every client's state before every step."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list = []
        step = self.plain.step

        def watched(state, *args, **kwargs):
            self.seen.append(state)
            return step(state, *args, **kwargs)

        self.plain.step = watched


def engine_runner(path: str, chunk_size: int = 64) -> Runner:
    """The engine as a runner of laws."""

    def run(p: Problem) -> Trajectory:
        problem = Quadratic(p.h, p.c, p.start, dtype=p.dtype)
        N, interval = len(p.h), p.interval
        engine = WatchedEngine(problem, Method(p.beta, p.nesterov), path=path, chunk_size=chunk_size)
        T = len(p.lrs)
        assert T % interval == 0
        change = next((t for t in range(1, T) if p.lrs[t] != p.lrs[0]), T)
        rate = LearningRate(p.lrs[0], "step", (change / T,), p.lrs[-1] / p.lrs[0], "fraction")
        plan = Plan(engine.method, rate, T // interval, N, 1, num_local_steps=interval)
        *_, (done, _) = run_rounds(problem, plan, engine, beginning(problem, plan))
        return Trajectory(*(_series(engine, done, part, N, interval) for part in ("params", "momentum")))

    return run


def _series(engine: WatchedEngine, done: RunState, part: str, N: int, interval: int) -> np.ndarray:
    """[T + 1, N, d] from the states before each step, which come chunk by chunk within each round."""
    rows = [getattr(state, part)["x"] for state in engine.seen]
    chunks_per_round = -(-N // engine.chunk_size)
    series = []
    for begin in range(0, len(rows), chunks_per_round * interval):
        chunks = [rows[begin + k * interval : begin + (k + 1) * interval] for k in range(chunks_per_round)]
        series += [torch.cat(step) for step in zip(*chunks, strict=True)]
    last = getattr(done.state, part)["x"]
    series.append(last.expand_as(series[0]))
    return torch.stack(series).numpy()


def tiny_images(num_examples: int = 60, *, channels: int = 1, side: int = 8, num_classes: int = 3) -> Dataset:
    """Random uint8 images whose labels can be learned: each class has its own mean image."""
    rng = np.random.default_rng(0)
    y = torch.from_numpy(np.arange(num_examples) % num_classes)
    prototypes = rng.integers(0, 200, (num_classes, channels, side, side))
    noise = rng.integers(0, 56, (num_examples, channels, side, side))
    x = torch.from_numpy((prototypes[y.numpy()] + noise).astype(np.uint8))
    return Dataset(x, y, x[: num_examples // 2], y[: num_examples // 2], num_classes, (0.4,), (0.3,), "none")


def image_problem(
    model: str = "mlp",
    num_clients: int = 4,
    *,
    data: Dataset | None = None,
    dtype=F64,
    norm="batch",
    hidden=8,
    **options,
) -> Supervised:
    data = data or tiny_images()
    partition = make_partition("dirichlet-client", data.y_train.numpy(), num_clients, alpha=0.5, seed=1)
    net = build_model(model, tuple(data.x_train.shape[1:]), data.num_classes, seed=3, norm=norm, hidden=hidden)
    options.setdefault("batch_size", 5)
    return Supervised(data, net, partition, dtype=dtype, **options)


def run_plan(problem, plan: Plan, *, path: str = "loop", chunk_size: int = 64, done: RunState | None = None):
    """All rounds -> (the last state, the records)."""
    engine = Engine(problem, plan.method, path=path, chunk_size=chunk_size)
    steps = list(run_rounds(problem, plan, engine, done or beginning(problem, plan)))
    return steps[-1][0], [record for _, record in steps]


def simple_plan(num_clients: int, *, num_rounds=3, lr=0.05, beta=0.9, batch_size=5, **options) -> Plan:
    names = ("nesterov", "weight_decay", "momentum_policy", "running_var")
    method = Method(beta, **{name: options.pop(name) for name in names if name in options})
    alpha, eta = options.pop("slow", (0.0, 1.0))  # SlowMo's α and η
    if (alpha, eta) != (0.0, 1.0):
        options["outer"] = OuterRule("slowmo", OuterNumbers(eta, alpha))
    options.setdefault("cohort_size", num_clients)
    options.setdefault("num_local_steps", 3)
    return Plan(method, LearningRate(lr), num_rounds, batch_size=batch_size, **options)


LOCAL = {
    "data.dataset": "local",
    "data.num-clients": 3,
    "model.name": "mlp",
    "model.hidden": 8,
    "run.dtype": "float64",
    "run.num-rounds": 3,
    "algorithm.num-local-steps": 4,
    "engine.path": "loop",
}


def give_digits(root, num_clients, *, server=True, clients=False):
    """client-0.npz …, of unequal sizes, with real digits; the test set for the server or shared among the clients."""
    data = load_dataset("digits")
    split = make_partition("quantity", data.y_train.numpy(), num_clients, min_size=2, seed=2)
    for c in range(num_clients):
        own = split.of(c)
        arrays = {"x_train": data.x_train[own].numpy(), "y_train": data.y_train[own].numpy()}
        if clients:
            some = slice(10 * c, 10 * (c + 2) if c else 30)
            arrays |= {"x_test": data.x_test[some].numpy(), "y_test": data.y_test[some].numpy()}
        np.savez(root / f"client-{c}.npz", **arrays)
    if server:
        np.savez(root / "test.npz", x_test=data.x_test.numpy(), y_test=data.y_test.numpy())
    return data, split
