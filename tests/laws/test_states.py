"""States with a policy and a period each: fedmom's own rounds against exact numbers and a plain loop."""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import periods
from fedmom.data.partition import make_partition
from fedmom.engine.engine import Engine
from fedmom.engine.gossip import GossipRounds
from fedmom.method.algorithms import Method
from fedmom.method.decentralized.topology import make_topology
from fedmom.method.outer import OuterNumbers, OuterRule
from fedmom.method.schedules import LearningRate
from fedmom.method.state import ClientState
from fedmom.method.states.rules import StateRule
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, beginning, cohort
from fedmom.tasks.quadratic import Quadratic
from fedmom.tasks.supervised import Supervised
from laws import FIXED_C, FIXED_H, FIXED_OPTIMUM, table
from periods import Rule, World
from runs import F64, tiny_images

GOLD_H, GOLD_C = [1.0, 3.0], [4.0, -2.0]  # the golden run: f_i = h_i/2 (x − c_i)², γ = 1/4, β = 1/2, I = 2


def rules_of(text):
    """ "x 2, u local" -> {"x": Rule("average", 2), "u": Rule("local")}."""
    found = {}
    for entry in text.split(", "):
        state, *policy, last = entry.split()
        if last.isdigit():
            found[state] = Rule(*policy or ["average"], every=int(last))
        else:
            found[state] = Rule(last)
    return found


def plan_of(num_clients, rules, *, lr=0.25, beta=0.5, steps=2, rounds=4, **more):
    names = ("optimizer", "beta2", "eps", "weight_decay", "nesterov", "running_var")
    options = {name: more.pop(name) for name in names if name in more}
    states = {state: StateRule(rule.policy, rule.every) for state, rule in rules.items()}
    method = Method(beta, states=states, **options)
    more.setdefault("batch_size", 1)
    more.setdefault("cohort_size", num_clients)
    rate = more.pop("rate", LearningRate(lr))
    return Plan(method, rate, rounds, num_local_steps=steps, **more)


def scalars(h, c, rules, *, path="loop", chunk=64, **options):
    """Quadratics in one coordinate: the gathered states after every round, and the records."""
    problem, plan = Quadratic([[v] for v in h], [[v] for v in c], [0.0]), plan_of(len(h), rules, **options)
    engine = Engine(problem, plan.method, path=path, chunk_size=chunk)
    backend = engine if plan.topology is None else GossipRounds(engine, plan.topology, "cpu")
    return [(done.gathered(), record) for done, record in run_rounds(problem, plan, backend, beginning(problem, plan))]


def x_of(done):
    return float(done.state.params["x"])


def quadratic_world(h, c, rules, *, lr=0.25, beta=0.5, steps=2, x0=0.0, **more):
    def gradient(x, buffers, client, t):
        away = x["x"] - c[client]
        return {"x": h[client] * away}, 0.5 * h[client] * float(away) ** 2, buffers

    start, n = {"x": np.asarray(x0)}, len(h)
    return World(start, [1.0] * n, [steps] * n, gradient, lambda r: lr, rules, beta=beta, **more)


GOLDEN = [  # 65536 x̄⁸
    ("u 1", -8347),
    ("u 2", -125),
    ("u 4", 5275),
    ("u local", 5275),
    ("u reset 1", -13107),
    ("u reset 2", -1025),
    ("x 2, u 1", 47567),
    ("x 2, u 2", 58861),
]


@table("text, number", GOLDEN)
def test_the_golden_run_bit_for_bit(text, number):
    """Binary fractions, so that any path and chunk must come to them exactly; so does the plain loop."""
    rules = rules_of(text)
    for path, chunk in (("loop", 1), ("vmap", 1), ("vmap", 2)):
        *_, (done, _) = scalars(GOLD_H, GOLD_C, rules, path=path, chunk=chunk)
        assert x_of(done) * 65536 == number
    *_, came = periods.rounds(quadratic_world(GOLD_H, GOLD_C, rules), [(0, 1)] * 4)
    assert came.mean["x", "x"] * 65536 == number


def test_a_period_counts_rounds_from_one():
    """Counted from 0, û would be made after rounds 1 and 3, which the golden run tells from 2 and 4."""
    shifted = quadratic_world(GOLD_H, GOLD_C, rules_of("u 2"), period_from=1)
    *_, came = periods.rounds(shifted, [(0, 1)] * 4)
    assert came.mean["x", "x"] * 65536 == -2947
    done = scalars(GOLD_H, GOLD_C, rules_of("u 2"))
    own = [new.own is not None and bool(new.own.momentum) for new, _ in done]
    assert own == [True, False, True, False]


def test_the_average_after_the_last_round_is_what_a_look_at_it_shows():
    """û of u every 4 in the golden run."""
    *_, (done, _) = scalars(GOLD_H, GOLD_C, rules_of("u 4"))
    assert float(done.state.momentum["x"]) == -11115 / 16384


FIXED = [
    ("u 1", -0.187519669),
    ("u 2", -0.313383850),
    ("u 4", -0.526472360),
    ("u 16", -0.487293443),
    ("u local", -0.485885107),
    ("u reset 2", -0.258293748),
    ("x 2, u 1", -0.479838877),
]


def super_round(z, rules, W, *, steps):
    """As many rounds as until everything has been exchanged, of rows z = (x_i, u_i) [2, N]: an affine map."""
    (x, u), h, c = z, np.array(FIXED_H), np.array(FIXED_C)
    rule = {"x": Rule(), "u": Rule()} | rules
    for number in range(1, period_of(rules) + 1):
        for _ in range(steps):
            u = 0.9 * u + h * (x - c)
            x = x - 0.05 * u
        x = x if number % rule["x"].every else x @ W
        if rule["u"].policy != "local" and number % rule["u"].every == 0:
            u = u @ W if rule["u"].policy == "average" else 0 * u
    return np.array([x, u])


def period_of(rules):
    return int(np.lcm.reduce([rule.every for rule in rules.values()]))


def fixed_point(rules, W, *, steps):
    """Rows (x_i, u_i) [2, N] that a super-round leaves as they are."""
    n = len(FIXED_H)
    at_zero = super_round(np.zeros((2, n)), rules, W, steps=steps).ravel()
    columns = [super_round(e.reshape(2, n), rules, W, steps=steps).ravel() - at_zero for e in np.eye(2 * n)]
    return np.linalg.solve(np.eye(2 * n) - np.array(columns).T, at_zero).reshape(2, n)


@table("text, away", FIXED)
def test_fixed_points_of_periods(text, away):
    """fedmom's own rounds leave x* where it is, from one exchange of everything to the next."""
    rules, n = rules_of(text), len(FIXED_H)
    x, u = fixed_point(rules, np.full((n, n), 1 / n), steps=5)
    assert abs(x - FIXED_OPTIMUM - away).max() < 1e-9
    period = period_of(rules)
    problem = Quadratic([[v] for v in FIXED_H], [[v] for v in FIXED_C], [0.0])
    plan = plan_of(n, rules, lr=0.05, beta=0.9, steps=5, rounds=2 * period)
    done = beginning(problem, plan)._replace(round=period)
    state = done.state._replace(params={"x": torch.tensor(x[:1])}, momentum={"x": torch.tensor([u.mean()])})
    own = None if rules["u"].policy != "local" else ClientState({}, {"x": torch.tensor(u)[:, None]}, {})
    engine = Engine(problem, plan.method, path="vmap", chunk_size=2)
    *_, (done, _) = run_rounds(problem, plan, engine, done._replace(state=state, own=own))
    assert abs(x_of(done.gathered()) - x[0]) < 1e-12
    if rules["u"].policy != "reset":
        found = done.own.momentum["x"][:, 0].numpy() if own else float(done.state.momentum["x"])
        assert abs(found - u).max() < 1e-12


@table(
    "text, away",
    [
        ("u 1", (0.034632, 0.004329, -0.025974)),
        ("u 2", (0.049561, 0.006101, -0.037358)),
        ("u local", (0.095238, 0.011905, -0.071429)),
    ],
)
def test_fixed_points_of_algorithm_2_on_the_path_of_3(text, away, tmp_path):
    """I = 1, Metropolis weights; every client's own x_i."""
    rules, W = rules_of(text), np.array([[2, 1, 0], [1, 1, 1], [0, 1, 2]]) / 3
    x, u = fixed_point(rules, W, steps=1)
    assert abs(x - FIXED_OPTIMUM - away).max() < 1e-6
    np.savetxt(tmp_path / "path.csv", W, delimiter=",")
    topology, period = make_topology(str(tmp_path / "path.csv"), 3), period_of(rules)
    problem = Quadratic([[v] for v in FIXED_H], [[v] for v in FIXED_C], [0.0])
    plan = plan_of(3, rules, lr=0.05, beta=0.9, steps=1, rounds=2 * period, topology=topology)
    done = beginning(problem, plan)._replace(round=period)
    rows = done.rows._replace(params={"x": torch.tensor(x)[:, None]}, momentum={"x": torch.tensor(u)[:, None]})
    backend = GossipRounds(Engine(problem, plan.method, path="vmap", chunk_size=2), topology, "cpu")
    *_, (done, _) = run_rounds(problem, plan, backend, done._replace(rows=rows))
    for found, right in ((done.rows.params, x), (done.rows.momentum, u)):
        np.testing.assert_allclose(found["x"][:, 0].numpy(), right, atol=1e-12)


COHORTS = [(0,), (0, 1), (1,), (0, 1)]


@pytest.fixture
def cohorts(monkeypatch):
    """The rounds' cohorts as given, not drawn."""

    def given(ids):
        monkeypatch.setattr("fedmom.rounds.plan.cohort", lambda n, size, seed, number: np.array(ids[number]))

    return given


def test_a_drawn_client_goes_on_from_its_own_u_or_from_a_newer_average(cohorts):
    """u every 2. Always the own row would make the third −929/256; always û the second −3/64."""
    cohorts(COHORTS)
    done = scalars(GOLD_H, GOLD_C, rules_of("u 2"))
    assert [x_of(new) for new, _ in done] == [9 / 4, 11 / 32, -1561 / 512, -445 / 512]
    world = quadratic_world(GOLD_H, GOLD_C, rules_of("u 2"))
    assert [float(came.mean["x", "x"]) for came in periods.rounds(world, COHORTS)] == [x_of(new) for new, _ in done]


def test_where_x_is_not_exchanged_the_mean_of_all_clients_is_evaluated(cohorts):
    """Of those, too, who were absent, which still stand where the last exchange has put them."""
    ids = [(0, 1, 2), (2,), (0, 1), (1,), (0, 2), (1, 2)]
    cohorts(ids)
    h, c, rules = [1.0, 3.0, 0.5], [4.0, -2.0, 1.0], rules_of("x 3, u 2")
    came = list(periods.rounds(quadratic_world(h, c, rules), ids))
    done = scalars(h, c, rules, rounds=6)
    for number, ((new, record), want) in enumerate(zip(done, came, strict=True), 1):
        x = np.array([row["x", "x"] for row in want.clients])
        assert len(set(x)) == [3, 3, 1, 2, 3, 1][number - 1]
        np.testing.assert_allclose(x_of(new), x.mean(), rtol=1e-14)
        loss = np.mean([hi / 2 * (x.mean() - ci) ** 2 for hi, ci in zip(h, c, strict=True)])
        np.testing.assert_allclose(record["loss"], loss, rtol=1e-14)
        np.testing.assert_allclose(record["consensus_distance"], want.spreads[0], rtol=1e-12)


BYTES = [  # of x (10 numbers), the buffers and the optimizer's states: bytes of one client in rounds 1 to 6
    ("sgd", "u 1", {}, [160] * 6),
    ("sgd", "u 2", {}, [80, 160] * 3),
    ("sgd", "u local", {}, [80] * 6),
    ("sgd", "u reset 2", {}, [80] * 6),
    ("sgd", "x 2, u 3", {}, [0, 80, 80, 80, 0, 160]),
    ("sgd", "x 2, u 1", {"beta": 0.0}, [0, 80] * 3),  # β = 0: u is the last gradient, and says nothing
    ("adamw", "m 2, v 3", {}, [80, 168, 168, 168, 80, 256]),  # a clock is one number
    ("adamw", "m local, v 1", {}, [168] * 6),
    ("adamw", "x 3, m reset 1, v 2", {}, [0, 88, 80, 88, 0, 168]),
    ("adamw", "m 1, v 1", {"beta": 0.0}, [168] * 6),
    ("adagrad", "v 2", {}, [80, 160] * 3),
]


@table("optimizer, text, more, each", BYTES)
def test_what_is_sent_is_counted_in_the_round_that_sends_it(optimizer, text, more, each, cohorts):
    """A cohort of two of three clients; float64."""
    cohorts([(0, 1), (1, 2), (0, 2)] * 2)
    problem = Quadratic([[1.0] * 10, [2.0] * 10, [3.0] * 10], [[1.0] * 10] * 3, [0.0] * 10)
    plan = plan_of(3, rules_of(text), rounds=6, optimizer=optimizer, lr=0.01, beta2=0.9, **more)
    engine = Engine(problem, plan.method, path="vmap", chunk_size=2)
    sent = [done.bytes_sent for done, _ in run_rounds(problem, plan, engine, beginning(problem, plan))]
    assert np.diff([0, *sent]).tolist() == [2 * one for one in each]


# --- nets of several tensors ---------------------------------------------------------------------------------


def small_net(norm):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        middle = nn.BatchNorm1d(4) if norm else nn.Tanh()
        layers = OrderedDict(flat=nn.Flatten(), first=nn.Linear(64, 4), bn=middle, last=nn.Linear(4, 3))
    return nn.Sequential(layers)


def net_world(case):
    """fedmom's problem and plan of a case, and the same for the plain loop, which takes the drawn minibatches."""
    data = tiny_images(40)
    partition = make_partition("dirichlet-class", data.y_train.numpy(), case.N, alpha=0.5, min_size=2, seed=1)
    assert case.N == 1 or len({*partition.sizes}) > 1
    problem = Supervised(data, small_net(case.norm), partition, dtype=F64, batch_size=5, personal=case.personal)
    rules, method = rules_of(case.text), {"optimizer": case.optimizer, "beta2": 0.95, "weight_decay": 0.01}
    more = {"nesterov": case.optimizer == "sgd", "eps": 1e-3, "beta": 0.8, **method}
    outer = {"": (None, None), **OUTERS}[case.outer]
    # γ changes, so that SlowMo is not FedAvgM; under local epochs every client has a clock of its own.
    rate = LearningRate(0.1) if case.epochs else LearningRate(0.1, "step", (0.6,), 0.5, "fraction")
    plan = plan_of(case.N, rules, steps=2, rounds=5, batch_size=5, outer=outer[0], rate=rate, seed=2, **more)
    plan = plan._replace(client_weights=case.weights, cohort_size=case.cohort or case.N)
    if case.epochs:
        plan = plan._replace(local_epochs=1)
    if case.topology:
        plan = plan._replace(topology=make_topology(case.topology, case.N))
    start, steps, model = problem.start(), plan.steps_of(problem.sizes).tolist(), small_net(case.norm).double().train()
    losses = []

    def gradient(x, buffers, client, t):
        drawn = problem.sampler.draw(torch.tensor([client]), torch.tensor([t]), 1)[0, 0]
        model.load_state_dict({n: torch.as_tensor(v).clone() for n, v in (x | buffers).items()})
        inputs = (data.x_train[drawn].double() / 255 - 0.4) / 0.3
        loss = cross_entropy(model(inputs), data.y_train[drawn])
        names, tensors = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, tensors)
        losses.append(loss.item())
        after = {name: b.numpy().copy() for name, b in model.named_buffers()}
        return {n: g.numpy() for n, g in zip(names, grads, strict=True)}, loss.item(), after

    x, buffers = ({n: v.numpy() for n, v in tree.items()} for tree in (start.params, start.buffers))
    weights = [float(w) for w in plan.weights_of(problem.sizes)]
    lrs = lambda number: 0.1 if case.epochs or (number - 1) * 2 < 0.6 * 10 else 0.05  # noqa: E731
    world = World(x, weights, steps, gradient, lrs, rules, 0.8, 0.95, 1e-3, 0.01, case.optimizer == "sgd")
    kept = [n for n in (*x, *buffers) if case.personal and n.startswith(OWN[case.personal])]
    world = world._replace(optimizer=case.optimizer, buffers=buffers, personal=kept, outer=outer[1])
    if case.topology:
        world = world._replace(W=lambda number: plan.topology.at(number - 1).dense())
    return problem, plan, world


OWN = {"head": "last.", "norm": "bn."}
OUTERS = {
    "slowmo": (OuterRule("slowmo", OuterNumbers(0.7, 0.5)), periods.slowmo(0.7, 0.5)),
    "nesterov": (OuterRule("nesterov", OuterNumbers(0.7, 0.5)), periods.nesterov(0.7, 0.5)),
    "fedyogi": (
        OuterRule("fedyogi", OuterNumbers(0.1, 0.9, 0.9, 0.1)),
        periods.adaptive(0.1, 0.9, 0.9, 0.1, yogi=True),
    ),
}


class Case(NamedTuple):
    text: str
    N: int = 5
    cohort: int = 0
    optimizer: str = "sgd"
    norm: bool = False
    weights: str = "uniform"
    epochs: int = 0
    personal: str = ""
    outer: str = ""
    topology: str = ""


CASES = [
    Case("x 2, u 3", norm=True, cohort=3, weights="samples"),
    Case("x 2, u local", N=2, norm=True, epochs=1, weights="samples"),
    Case("x 3, u 2", N=1, norm=True),
    Case("x 3, u reset 2", cohort=2, personal="head", outer="slowmo"),
    Case("x 2, u 1", norm=True, cohort=4, epochs=1, personal="norm", outer="nesterov"),
    Case("m 2, v 3", optimizer="adamw", cohort=2, outer="fedyogi", weights="samples"),
    Case("x 2, m local, v 3", optimizer="adamw", norm=True, epochs=1, personal="head"),
    Case("x 2, u 3", norm=True, topology="one-peer-exponential"),
    Case("x 1, m 2, v local", optimizer="adamw", topology="ring"),
]
WAYS = [("stack", 2), ("loop", 1), ("vmap", 2), ("stack", 5), ("stack", 1)]


@table("place, case", enumerate(CASES))
def test_small_nets_are_the_plain_loops(place, case):
    """x, states and buffers of every client and of the mean after every round, losses and distances."""
    assert_plain(case, WAYS[place % 3 : place % 3 + 1])


@pytest.mark.slow
@table("case", CASES)
def test_small_nets_are_the_plain_loops_on_every_path_in_every_chunk(case):
    assert_plain(case, WAYS)


def assert_plain(case, ways):
    problem, plan, world = net_world(case)
    ids = [cohort(case.N, plan.cohort_size, plan.seed, number).tolist() for number in range(plan.num_rounds)]
    assert case.cohort == 0 or len({*map(tuple, ids)}) > 2
    came = list(periods.rounds(world, ids))
    for path, chunk in ways:
        engine = Engine(problem, plan.method, path=path, chunk_size=chunk)
        backend = engine if plan.topology is None else GossipRounds(engine, plan.topology, "cpu")
        rounds = run_rounds(problem, plan, backend, beginning(problem, plan))
        for number, ((new, record), want) in enumerate(zip(rounds, came, strict=True), 1):
            compare(new.gathered(), want, world, number)
            found = [record[name] for name in ("train_loss", "consensus_distance", "momentum_spread")]
            total = sum(world.weights[c] for c in ids[number - 1])
            loss = sum(world.weights[c] / total * v for c, v in zip(ids[number - 1], want.losses, strict=True))
            np.testing.assert_allclose(found, [loss, *want.spreads], rtol=1e-9, atol=1e-13)


def compare(done, want, world, number):
    """Where every client goes on from, and the mean of x and the buffers over all of them."""
    for (state, name), mean in want.mean.items():
        part = {"x": "params", "buffers": "buffers"}.get(state, "momentum")
        full = name if state in ("x", "u", "buffers") else f"{state}/{name}"
        common, rows = getattr(done.state, part)[full], np.array([row[state, name] for row in want.clients])
        if part != "momentum":
            np.testing.assert_allclose(common.numpy(), mean, rtol=1e-10, atol=1e-12)
        own = done.rows or done.own
        if own is not None and full in getattr(own, part):
            np.testing.assert_allclose(getattr(own, part)[full].numpy(), rows, rtol=1e-10, atol=1e-12)
            continue
        rule = world.rules.get(state.partition(".")[0].replace("buffers", "x"), Rule())
        assert name not in world.personal
        assert number % rule.every == 0
        if rule.policy == "average":  # of what is reset, the mean is there to be looked at
            np.testing.assert_allclose(np.broadcast_to(common.numpy(), rows.shape), rows, rtol=1e-10, atol=1e-12)
