"""Rules by which I changes in a run: the steps, their clocks and what is kept of them, by loops written out."""

import json

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import fedmom
from both_sides import DIGITS, QUADRATIC, assert_same, by_engine, by_flower, same_clients
from fedmom.backends.trainer import Node
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data.partition import make_partition
from fedmom.engine.engine import Engine
from fedmom.errors import InputError
from fedmom.method import schedules
from fedmom.method.algorithms import Method
from fedmom.method.schedules import Came, LearningRate, Pacing, adaptive
from fedmom.records.files import CHECKPOINT, FINAL, ROUNDS
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, beginning
from fedmom.tasks.models import build_model
from fedmom.tasks.quadratic import Quadratic
from fedmom.tasks.supervised import Supervised
from laws import table
from runs import LOCAL, give_digits, run_plan, tiny_images

H, C = np.array([0.5, 2.0, 1.0]), np.array([-1.0, 3.0, 0.0])


def adaptive_by_hand(rounds, interval):
    """(x after every round, I of every round) on the three quadratics, exact gradients."""
    x, u, found = 0.0, 0.0, []
    for _ in range(rounds):
        y, w = np.full(3, x), np.full(3, u)
        for _ in range(interval):
            w = 0.9 * w + H * (y - C)
            y = y - 0.05 * w
        found.append((y.mean(), interval))
        rho = ((y - y.mean()) ** 2).mean() / (2 * (y.mean() - x) ** 2)
        interval = max(1, interval // 2) if rho > 4 else interval
        x, u = y.mean(), w.mean()
    return found


def test_clients_that_part_more_than_they_move_together_halve_the_interval():
    problem = Quadratic(H[:, None].tolist(), C[:, None].tolist(), [0.0])
    plan = Plan(Method(0.9), LearningRate(0.05), 110, 3, 1, num_local_steps=8, interval="adaptive")
    done, records = run_plan(problem, plan)
    right = adaptive_by_hand(110, 8)
    assert [record["interval"] for record in records] == [interval for _, interval in right]
    assert [record["interval"] for record in records[:6]] == [8, 8, 4, 2, 1, 1]  # halved after rounds 2, 3, 4
    np.testing.assert_allclose([r["x"][0] for r in records], [x for x, _ in right], rtol=1e-10, atol=1e-12)
    assert abs(records[-1]["x"][0] - 11 / 7) < 0.01  # x_opt; I = 8 would end elsewhere
    assert records[-1]["steps"] == done.steps == sum(interval for _, interval in right)


def test_a_rule_looks_at_more_than_noise_and_at_more_clients_than_one():
    by = Pacing(8, 100, ())
    for clients in (2.0, 3.0, 1.6):
        for more, right in ((1 - 1e-9, 8), (1 + 1e-9, 4)):
            assert adaptive(8, Came(1, 4 * (clients - 1) * 0.3 * more, 0.3, clients), by) == right
    assert adaptive(8, Came(1, 1e-30, 0.0, 1.0), by) == 8  # one client: ρ is 0/0
    assert adaptive(8, Came(1, 0.0, 0.0, 5.0), by) == 8
    assert adaptive(8, Came(1, 1e-30, 0.0, 5.0), by) == 4
    assert adaptive(1, Came(1, 1.0, 0.0, 5.0), by) == 1
    assert adaptive(5, Came(1, 1.0, 0.0, 5.0), by) == 2


# --- minibatches, γ, weights and cohorts ---------------------------------------------------------------------


def by_hand(problem, rule, num_rounds, weights, lr_of):
    """(x after every round, I of every round) of local momentum SGD from I₀ = 4, by modules of torch."""
    model, data = problem.model, problem.dataset
    x = {n: p.detach().clone() for n, p in model.named_parameters()}
    u = {n: torch.zeros_like(p) for n, p in x.items()}
    p = torch.as_tensor(weights / weights.sum())
    t, interval, found = 0, 4, []
    for r in range(1, num_rounds + 1):
        ends = []
        for c in range(len(weights)):
            y, w = dict(x), dict(u)
            for s, rows in enumerate(problem.sampler.draw(torch.tensor([c]), torch.tensor([t]), interval)[0]):
                y = {n: v.detach().requires_grad_() for n, v in y.items()}
                images = (data.x_train[rows].double() / 255 - 0.4) / 0.3
                loss = cross_entropy(functional_call(model, y, images), data.y_train[rows])
                for n, g in zip(y, torch.autograd.grad(loss, [*y.values()]), strict=True):
                    w[n] = 0.5 * w[n] + g
                    y[n] = y[n].detach() - lr_of(t + s) * w[n]
            ends.append((y, w))
        mean = {n: sum(q * y[n] for q, (y, _) in zip(p, ends, strict=True)) for n in x}
        u = {n: sum(q * w[n] for q, (_, w) in zip(p, ends, strict=True)) for n in x}
        spread = sum(float(q * (y[n] - mean[n]).square().sum()) for q, (y, _) in zip(p, ends, strict=True) for n in x)
        moved = sum(float((mean[n] - x[n]).square().sum()) for n in x)
        found.append((mean, interval))
        t, x = t + interval, mean
        interval = rule(interval, r, spread / ((1 / float(p.square().sum()) - 1) * moved))
    return found


TOY = 1.0  # θ, where clients part less


def halves_by_rho(interval, r, rho):
    return max(1, interval // 2) if rho > TOY else interval


def halves_by_rounds(interval, r, rho):
    return 4 if r < 2 else 2 if r < 4 else 1  # milestones .4 and .8 of 5 rounds


# T = 4 + 4 + 2 + 2 + 1 = 13: γ falls at step 6.5, which is within the third round.
@table(
    "name, rule, lr_of",
    [
        ("adaptive", halves_by_rho, lambda t: 0.3 if t < 8 else 0.03),
        ("decaying", halves_by_rounds, lambda t: 0.3 if t < 6.5 else 0.03),
    ],
)
def test_minibatches_and_learning_rates_go_by_the_steps_that_were_taken(name, rule, lr_of, monkeypatch):
    monkeypatch.setattr(schedules, "THETA", TOY)
    data = tiny_images(40)
    partition = make_partition("dirichlet-class", data.y_train.numpy(), 3, alpha=0.5, min_size=2, seed=1)
    net = build_model("mlp", (1, 8, 8), 3, seed=3, hidden=8)
    problem = Supervised(data, net, partition, dtype=torch.float64, batch_size=5)
    assert len({*problem.sizes}) == 3
    epoch = float(problem.sizes.sum()) / (3 * 5)  # steps, of joint epochs
    unit = {"adaptive": ("joint-epochs", 8 / epoch), "decaying": ("fraction", 0.5)}[name]
    rate = LearningRate(0.3, "step", (unit[1],), 0.1, unit[0])
    options = {"num_local_steps": 4, "interval": name, "milestones": (0.4, 0.8) if name == "decaying" else ()}
    plan = Plan(Method(0.5), rate, 5, 3, 5, client_weights="samples", **options)
    right = by_hand(problem, rule, 5, problem.sizes.astype(float), lr_of)
    intervals = [interval for _, interval in right]
    assert len({*intervals}) > 1
    engine = Engine(problem, plan.method, path={"adaptive": "stack", "decaying": "loop"}[name], chunk_size=2)
    steps = run_rounds(problem, plan, engine, beginning(problem, plan))
    for (done, record), (x, interval) in zip(steps, right, strict=True):
        assert record["interval"] == interval
        for n, v in x.items():
            torch.testing.assert_close(done.state.params[n], v, rtol=1e-10, atol=1e-12)


# --- configurations ------------------------------------------------------------------------------------------

RUN = {**DIGITS, "algorithm.num-local-steps": 4, "algorithm.lr": 0.5, "run.num-rounds": 4}
THREE = {"data.curvatures": "0.5;2;1", "data.centers": "-1;3;0", "algorithm.num-local-steps": 8, "run.num-rounds": 5}
RULES = [
    {**QUADRATIC, **THREE, "algorithm.interval": "adaptive", "algorithm.lr": 0.05},
    {
        **RUN,
        "algorithm.interval": "decaying",
        "algorithm.interval-milestones": "0.3,0.7",
        "algorithm.lr-schedule": "cosine",
    },
]


def without_times(folder):
    records = [json.loads(line) for line in (folder / ROUNDS).read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("wall_seconds", "client_steps_per_second")} for r in records]


@table("rule", RULES)
def test_a_resumed_run_goes_on_with_its_interval_and_flower_is_told_it(rule, tmp_path):
    keys, cut, whole = rule, tmp_path / "cut", tmp_path / "whole"

    class Stop(fedmom.Callback):
        def on_round(self, record, state):
            return "so far" if record["round"] == 3 else None

    result = by_engine(keys, out=whole)
    fedmom.run(keys, out=cut, callbacks=[Stop()])
    fedmom.run(resume=cut, callbacks=[fedmom.Callback()])
    assert without_times(cut) == without_times(whole)
    for name in (CHECKPOINT, FINAL):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    intervals = [record["interval"] for record in result.rounds]
    assert intervals[2] < intervals[0], intervals
    assert_same(by_flower(keys, 3)[0], result)


@pytest.mark.slow
def test_clients_with_data_of_their_own_are_told_where_their_own_models_begin(tmp_path):
    """In the steps from x̂ to a client's own model, which are its next ones, and with parts of the model."""
    give_digits(tmp_path, 3, clients=True)
    keys = {**LOCAL, "data.data-dir": str(tmp_path), "run.client-eval-every": 3, "run.personal-steps": 2}
    keys |= {"algorithm.interval": "decaying", "algorithm.interval-milestones": "0.3", "algorithm.fragments": 2}
    engine = by_engine({**keys, "algorithm.personal": "head"}, out=tmp_path / "engine")
    result, _ = by_flower({**keys, "algorithm.personal": "head"}, 3, out=tmp_path / "flower")
    assert_same(result, engine)
    assert same_clients(tmp_path / "flower", tmp_path / "engine").results
    assert [record["steps"] for record in engine.rounds] == [4, 6, 8]


def test_a_run_of_one_interval_says_nothing_of_it(tmp_path):
    by_engine({**RUN, "run.num-rounds": 1}, out=tmp_path / "run")
    assert b"interval" not in (tmp_path / "run" / CHECKPOINT).read_bytes()
    assert "interval" not in without_times(tmp_path / "run")[0]


def test_an_adaptive_run_may_become_longer_and_a_decaying_one_not(tmp_path):
    for rule in RULES:
        folder = tmp_path / rule["algorithm.interval"]
        by_engine({**rule, "run.num-rounds": 2}, out=folder)
    longer = {"sets": {"run.num-rounds": 4}, "callbacks": [fedmom.Callback()]}
    fedmom.run(resume=tmp_path / "adaptive", **longer)
    by_engine({**RULES[0], "run.num-rounds": 4}, out=tmp_path / "whole")
    assert (tmp_path / "adaptive" / FINAL).read_bytes() == (tmp_path / "whole" / FINAL).read_bytes()
    with pytest.raises(InputError, match=r"run.num-rounds = 4: algorithm.lr-schedule = 'cosine' depends on the length"):
        fedmom.run(resume=tmp_path / "decaying", **longer)


def test_a_node_that_is_not_told_the_steps_says_so():
    node = Node(resolve(load({**RULES[0]})).config)
    with pytest.raises(InputError, match="'adaptive': a round's first-step and num-steps must be told"):
        node.train([0], 0, node.sent)


ADAPTIVE = {"algorithm.interval": "adaptive"}
DECAYING = {"algorithm.interval": "decaying"}


@table(
    "changes, words",
    [
        ({**ADAPTIVE, "algorithm.num-local-steps": 0, "algorithm.local-epochs": 1}, "needs num-local-steps, not local"),
        (
            {**DECAYING, "run.num-steps": 100},
            "run.num-steps = 100: with algorithm.interval = 'decaying' give run.num-r",
        ),
        ({**ADAPTIVE, "server.strategy": "fedavg"}, "'adaptive': needs server.strategy = 'pr-sgd-m', not 'fedavg'"),
        ({**ADAPTIVE, "algorithm.name": "d-sgd-m"}, "algorithm.interval = 'adaptive': with d-sgd-m there is no x̂"),
        ({**ADAPTIVE, "algorithm.fragments": 2}, "how far x moves in a round, and by fragments = 2 not all of it does"),
        (
            {**ADAPTIVE, "algorithm.states": "x: average every 2"},
            "by states = 'x: average every 2; u: average every 1'",
        ),
        ({**ADAPTIVE, "algorithm.lr-schedule": "cosine"}, "lr-schedule = 'cosine': depends on the steps in all"),
        (
            {**ADAPTIVE, "algorithm.lr-warmup": 0.1},
            "lr-unit = 'fraction': depends on the steps in all, .*take 'joint-e",
        ),
        ({**DECAYING, "algorithm.interval-milestones": "0.5,1"}, "interval-milestones = '0.5,1': must be fractions"),
        ({**DECAYING, "algorithm.interval-milestones": "0,0.5"}, "interval-milestones = '0,0.5': must be fractions"),
        (
            {**DECAYING, "algorithm.interval-milestones": "0.7,0.5"},
            "interval-milestones = '0.7,0.5': must be fractions",
        ),
        ({**DECAYING, "algorithm.interval-milestones": "half"}, "algorithm.interval-milestones = 'half'"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        resolve(load({**RUN, **changes}))
    assert "\n" not in str(caught.value)
