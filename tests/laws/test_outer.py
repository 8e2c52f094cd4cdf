"""Outer steps: by their equations, by other people's code, on exact numbers, and where they must do nothing."""

from types import SimpleNamespace

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedYogi
from test_states import GOLD_C, GOLD_H, plan_of, rules_of, x_of

import fedmom
from fedmom.data.partition import make_partition
from fedmom.engine.engine import Engine
from fedmom.method.outer import OUTERS, OuterNumbers, OuterRule
from fedmom.method.schedules import LearningRate
from fedmom.method.state import flatten
from fedmom.records.files import CHECKPOINT, FINAL, read_tensors
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning
from fedmom.tasks.quadratic import Quadratic
from fedmom.tasks.supervised import Supervised
from laws import FIXED_C, FIXED_H, FIXED_OPTIMUM, table
from runs import tiny_images

F64 = torch.float64
HALF = OuterNumbers(0.5, 0.5)
ADAM = OuterNumbers(0.1, 0.9, 0.99, 1e-3)


def run(rule, *, h=GOLD_H, c=GOLD_C, text="u 1", path="vmap", start=0.0, **options):
    """The states after every round of quadratics in one coordinate."""
    problem = Quadratic([[v] for v in h], [[v] for v in c], [start])
    plan = plan_of(len(h), rules_of(text), outer=rule, **options)
    engine = Engine(problem, plan.method, path=path, chunk_size=2)
    return [done.gathered() for done, _ in run_rounds(problem, plan, engine, beginning(problem, plan))]


GOLDEN = [
    ("slowmo", HALF, [-3 / 32, -179 / 1024, -6595 / 32768], 0),
    ("fedavgm", HALF, [-3 / 32, -179 / 1024, -6595 / 32768], 0),
    ("nesterov", HALF, [-9 / 64, -747 / 4096, -42737 / 262144], 0),
    ("fedadam", ADAM, [-0.094810064502, -0.208002213320], 5e-13),
    ("fedyogi", ADAM, [None, -0.207521398263], 5e-13),
]


@table("name, numbers, right, tolerance", GOLDEN)
def test_golden_rounds(name, numbers, right, tolerance):
    for path in ("loop", "vmap"):
        found = [x_of(done) for done in run(OuterRule(name, numbers), rounds=len(right), path=path)]
        for got, want in zip(found, right, strict=True):
            assert want is None or abs(got - want) <= tolerance


def test_a_new_lr_tells_slowmo_from_fedavgm():
    """γ halved from round 3: SlowMo's memory is of steps, FedAvgM's of changes."""
    for name, right in (("slowmo", -30495 / 131072), ("fedavgm", -33151 / 131072)):
        rate = LearningRate(0.25, "step", (0.5,), 0.5, "fraction")
        *_, third, _ = run(OuterRule(name, HALF), rate=rate)
        assert x_of(third) == right


@table("name", ["slowmo", "fedavgm", "nesterov"])
def test_with_lr_1_and_no_momentum_everybody_goes_on_from_the_average(name):
    """η = 1, μ = 0 is x̂: binary fractions, so exactly."""
    plain, stepped = (run(rule) for rule in (None, OuterRule(name, OuterNumbers(1.0, 0.0))))
    assert [x_of(done) for done in stepped] == [x_of(done) for done in plain]


def test_fedadam_with_a_large_tau_is_fedavgm():
    """η = cτ, τ → ∞: x + ηm/τ, and m is (1−β₁) times FedAvgM's −b.

    With β₂ = 0: the first v, τ², would stay beside τ else.
    """
    many = run(OuterRule("fedadam", OuterNumbers(1e9, 0.5, 0.0, 1e9)))
    plain = run(OuterRule("fedavgm", OuterNumbers(0.5, 0.5)))
    np.testing.assert_allclose([x_of(d) for d in many], [x_of(d) for d in plain], rtol=1e-7)


@table("name", [name for name in OUTERS if name != "none"])
def test_an_outer_step_moves_no_fixed_point(name):
    """Where x̂ = x and û = u nothing moves, though Δ of every client is far from 0."""
    n, h, c = len(FIXED_H), np.array(FIXED_H), np.array(FIXED_C)

    def one_round(z):
        x, u = np.full(n, z[0]), np.full(n, z[1])
        for _ in range(5):
            u = 0.9 * u + h * (x - c)
            x = x - 0.05 * u
        return np.array([x.mean(), u.mean()])

    at_zero = one_round(np.zeros(2))
    columns = [one_round(e) - at_zero for e in np.eye(2)]
    x, u = np.linalg.solve(np.eye(2) - np.array(columns).T, at_zero)
    assert abs(x - FIXED_OPTIMUM + 0.187519669) < 1e-9
    problem = Quadratic([[v] for v in FIXED_H], [[v] for v in FIXED_C], [x])
    rule = OuterRule(name, OuterNumbers(0.7, 0.3, 0.99, 0.1), ("x", "u"))
    plan = plan_of(n, {}, lr=0.05, beta=0.9, steps=5, rounds=3, outer=rule)
    done = beginning(problem, plan)
    done = done._replace(state=done.state._replace(momentum={"x": torch.tensor([u])}))
    *_, (done, _) = run_rounds(problem, plan, Engine(problem, plan.method, path="vmap", chunk_size=2), done)
    assert abs(x_of(done) - x) < 1e-12
    assert abs(float(done.state.momentum["x"]) - u) < 1e-12


def changes(seed=0, rounds=6):
    """x before the first round, and what rounds would change it by."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, dtype=F64, generator=g), torch.randn(rounds, 3, 4, dtype=F64, generator=g)


def by_rule(rule, x, deltas, lr=0.05):
    """x after every step, where each round would have come to x − Δ."""
    memory, found = rule.start({"x": x}), []
    for delta in deltas:
        moved, memory = rule.step({"x": x}, {"x": x - delta}, memory, lr)
        x = moved["x"]
        found.append(x)
    return torch.stack(found)


@table("name, nesterov", [("fedavgm", False), ("nesterov", True)])
def test_outer_momentum_is_torch_sgd_on_the_changes(name, nesterov):
    x, deltas = changes()
    p = torch.nn.Parameter(x.clone())
    sgd, right = torch.optim.SGD([p], lr=0.7, momentum=0.9, nesterov=nesterov), []
    for delta in deltas:
        p.grad = delta.clone()
        sgd.step()
        right.append(p.detach().clone())
    torch.testing.assert_close(
        by_rule(OuterRule(name, OuterNumbers(0.7, 0.9)), x, deltas), torch.stack(right), rtol=1e-14, atol=1e-14
    )


def test_fedyogi_is_flowers_on_x_alone():
    """Flower's begins with v = 0, where ours, as the paper, has τ²; the rest is the same."""
    x, deltas = changes()
    rule = OuterRule("fedyogi", OuterNumbers(0.05, 0.9, 0.98, 0.01))
    memory = {slot: {"x": torch.zeros_like(x)} for slot in ("m", "v")}
    flowers = FedYogi(eta=0.05, beta_1=0.9, beta_2=0.98, tau=0.01, fraction_evaluate=0.1)
    mine = theirs = x
    for number, delta in enumerate(deltas, 1):
        moved, memory = rule.step({"x": mine}, {"x": mine - delta}, memory, 1.0)
        mine = moved["x"]
        flowers.current_arrays = {"x": theirs.numpy()}
        records = {"arrays": ArrayRecord({"x": theirs - delta}), "metrics": MetricRecord({"num-examples": 1})}
        arrays, _ = flowers.aggregate_train(
            number, [SimpleNamespace(content=RecordDict(records), has_error=lambda: False)]
        )
        theirs = arrays.to_torch_state_dict()["x"]
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@table("yogi", [False, True])
def test_adaptive_steps_are_their_papers_equations(yogi):
    """Reddi et al. (2021), Algorithm 2, whose Δ is x̂ − x, one number after the other; v⁰ = τ²."""
    x, deltas = changes(1)
    found = by_rule(OuterRule("fedyogi" if yogi else "fedadam", OuterNumbers(0.05, 0.9, 0.98, 0.3)), x, deltas)
    for place in np.ndindex(3, 4):
        at, m, v = float(x[place]), 0.0, 0.3**2
        for step, delta in zip(found, deltas, strict=True):
            d = -float(delta[place])
            m = 0.9 * m + 0.1 * d
            v = v - 0.02 * d * d * np.sign(v - d * d) if yogi else 0.98 * v + 0.02 * d * d
            at += 0.05 * m / (np.sqrt(v) + 0.3)
            np.testing.assert_allclose(float(step[place]), at, rtol=1e-12)
    assert ((deltas**2 > 0.09).any(), (deltas**2 < 0.09).any()) == (True, True)  # Yogi's sign is both


NET = {
    "data.dataset": "digits",
    "data.num-clients": 3,
    "data.batch-size": 4,
    "model.name": "mlp",
    "model.hidden": 4,
    "algorithm.num-local-steps": 2,
    "run.num-rounds": 3,
    "run.dtype": "float64",
    "engine.path": "loop",
    "engine.threads": 1,
}


def finished(tmp_path, name, **changes):
    """(final tensors, the checkpoint's) of a run with these keys of [algorithm]."""
    keys = {**NET, **{f"algorithm.{key.replace('_', '-')}": value for key, value in changes.items()}}
    fedmom.run(keys, out=tmp_path / name, callbacks=[fedmom.Callback()])
    return [read_tensors(tmp_path / name / file)[0] for file in (FINAL, CHECKPOINT)]


def test_the_two_spellings_of_slowmo_are_the_same_to_the_bit(tmp_path):
    short = finished(tmp_path, "short", slow_momentum=0.5, slow_lr=0.7)
    long = finished(tmp_path, "long", outer="slowmo", outer_momentum=0.5, outer_lr=0.7)
    for mine, other in zip(short, long, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert {name.split("/")[1] for name in long[1] if name.startswith("outer/")} == {"b"}


class Normed(torch.nn.Module):
    """A net with running statistics, and an integer among its buffers."""

    def __init__(self):
        super().__init__()
        self.first, self.bn, self.last = torch.nn.Linear(64, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.bn(self.first(x.flatten(1))))


def test_neither_buffers_nor_clocks_are_stepped():
    """AdamW, of which the outer step moves x and m: the rest is the average as it is, which a step of 1/10 is not."""
    data = tiny_images(40)
    split = make_partition("iid", data.y_train.numpy(), 3, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        problem = Supervised(data, Normed(), split, dtype=F64, batch_size=5)
    found = []
    for rule in (None, OuterRule("fedavgm", OuterNumbers(0.1, 0.5), ("x", "m"))):
        plan = plan_of(3, rules_of("m 1, v 1"), rounds=1, batch_size=5, optimizer="adamw", beta2=0.9, outer=rule)
        engine = Engine(problem, plan.method, path="stack", chunk_size=2)
        start = beginning(problem, plan)
        found.append([done for done, _ in run_rounds(problem, plan, engine, start)][-1])
    plain, stepped = (flatten(done.state) for done in found)
    before, moved = flatten(start.state), {name for name in plain if not torch.equal(plain[name], stepped[name])}
    assert moved == {name for name in plain if name.startswith(("params/", "momentum/m/"))}
    for name in moved:
        torch.testing.assert_close(stepped[name], before[name] + 0.1 * (plain[name] - before[name]))
    assert {name for tree in found[1].outer.values() for name in tree} == moved
