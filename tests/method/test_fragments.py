"""The model exchanged by parts (algorithm.fragments): against a loop over clients written out in plain torch."""

from collections import OrderedDict
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import fedmom
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data.partition import make_partition
from fedmom.engine.engine import Engine
from fedmom.engine.gossip import GossipRounds
from fedmom.errors import InputError
from fedmom.method.algorithms import Method
from fedmom.method.decentralized.topology import make_topology
from fedmom.method.outer import OuterNumbers, OuterRule
from fedmom.method.schedules import LearningRate
from fedmom.method.state import initial_state
from fedmom.method.states.fragments import Fragments, fragments_of
from fedmom.method.states.rules import StateRule
from fedmom.records.files import CHECKPOINT, CLIENTS, FINAL
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, beginning, cohort
from fedmom.tasks.quadratic import Quadratic
from fedmom.tasks.supervised import Supervised
from laws import table
from runs import F64, tiny_images

# --- which tensor is in which part ---------------------------------------------------------------------------


def parts(params: dict[str, int], buffers: tuple[str, ...], count: int, order: tuple[str, ...] = ()) -> dict[str, int]:
    found = fragments_of(
        {name: torch.zeros(size) for name, size in params.items()}, {n: torch.zeros(1) for n in buffers}, count, order
    )
    assert found.num_parts == count
    return dict(found.parts)


def test_parts_follow_one_another_and_are_as_equal_as_whole_tensors_allow():
    rng = np.random.default_rng(0)
    for n in range(1, 7):
        sizes = {str(i): int(s) for i, s in enumerate(rng.integers(1, 9, n))}
        for count in range(1, n + 1):
            found = [*parts(sizes, (), count).values()]
            assert found == sorted(found)
            assert {*found} == {*range(1, count + 1)}

            def squares(of, sizes=sizes, count=count):
                sums = [sum(s for s, p in zip(sizes.values(), of, strict=True) if p == f + 1) for f in range(count)]
                return sum(s * s for s in sums)

            every = [[1]]
            for _ in range(n - 1):
                every = [[*one, one[-1] + step] for one in every for step in (0, 1)]
            assert squares(found) == min(squares(one) for one in every if one[-1] == count)


def test_a_buffer_is_where_the_parameters_of_its_module_are_or_the_one_before_it():
    params, buffers = {"a.weight": 4, "a.bias": 4, "b.weight": 4}, ("a.mean", "norm.mean", "first")
    order = ("first", "a.weight", "a.bias", "a.mean", "norm.mean", "b.weight")
    found = parts(params, buffers, 3, order)
    assert found == {"a.weight": 1, "a.bias": 2, "b.weight": 3, "a.mean": 1, "norm.mean": 2, "first": 1}


# --- separable problems --------------------------------------------------------------------------------------


class Apart(Quadratic):
    """The quadratic, every coordinate a tensor of its own."""

    small = False

    def start(self):
        return initial_state({str(k): x.clone() for k, x in enumerate(self.x0)}, {})

    def gradient(self, params, buffers, batch, /):
        x = torch.stack([*params.values()])
        g = batch.h * (x - batch.c)
        return {name: g[k] for k, name in enumerate(params)}, buffers, (g * (x - batch.c)).sum() / 2

    gradient_alone = gradient

    def evaluate(self, state):
        return {}


def quadratic(h, c, start, num_rounds, *, method=None, lr=0.25, **options):
    problem = Apart(h, c, start)
    gossip = options.get("topology")
    options = {"num_local_steps": 2, **options}
    plan = Plan(method or Method(0.5), LearningRate(lr), num_rounds, len(h), 1, **options)
    engine = Engine(problem, plan.method, path="loop", chunk_size=1)
    backend = engine if gossip is None else GossipRounds(engine, gossip, "cpu")
    return [done.gathered() for done, _ in run_rounds(problem, plan, backend, beginning(problem, plan))]


GOLD = ([[1.0, 1.0], [3.0, 3.0]], [[4.0, 4.0], [-2.0, -2.0]], [0.0, 0.0])
TWO = Fragments(2, {"0": 1, "1": 2})


def test_the_last_part_of_a_separable_problem_is_algorithm_1_with_as_many_steps_more():
    states = quadratic(*GOLD, 8, method=Method(0.5, fragments=TWO))
    assert float(states[3].state.params["1"]) == float(Fraction(58861, 65536))
    longer = quadratic(*GOLD, 4, num_local_steps=4)
    for number, right in enumerate(longer, 1):
        for part in ("params", "momentum"):
            got = getattr(states[2 * number - 1].state, part)["1"]
            torch.testing.assert_close(got, getattr(right.state, part)["1"], rtol=1e-12, atol=1e-12)
    assert states[3].state.params["0"] != states[3].state.params["1"]


def gossip_by_hand(h, c, start, W, rounds, policy, lr, beta, steps, part):
    """x of every client after every round, one coordinate, exchanged where r ≡ part (mod 2)."""
    x, u, out = np.full(len(h), start), np.zeros(len(h)), []
    for r in range(1, rounds + 1):
        for _ in range(steps):
            u = beta * u + h * (x - c)
            x = x - lr * u
        if r % 2 == part % 2:
            x = W.T @ x
            u = {"average": W.T @ u, "local": u, "reset": 0 * u}[policy]
        out.append(x)
    return out


@table("policy", ["average", "local", "reset"])
def test_algorithm_2_mixes_by_w_part_by_part(policy):
    h, c, start = np.array([[0.5, 1], [2, 1.5], [1, 3]]), np.array([[-1.0, 2], [3, 0], [0, 1]]), [0.5, -1.0]
    W = np.array([[2, 1, 0], [1, 1, 1], [0, 1, 2]]) / 3
    method = Method(0.9, momentum_policy=policy, fragments=TWO)
    topology = make_topology("path", 3)
    states = quadratic(h.tolist(), c.tolist(), start, 5, method=method, lr=0.05, topology=topology)
    for k in (0, 1):
        right = gossip_by_hand(h[:, k], c[:, k], start[k], W, 5, policy, 0.05, 0.9, 2, k + 1)
        for done, x in zip(states, right, strict=True):
            np.testing.assert_allclose(done.rows.params[str(k)].numpy(), x, rtol=1e-12, atol=1e-13)
    each = 8 * (2 if policy == "average" else 1)
    assert states[-1].bytes_sent == 5 * each * 4  # four links, one of two numbers in a round


# --- a model with buffers, by hand ---------------------------------------------------------------------------

PARTS = {"first.weight": 1, "first.bias": 2, "bn.weight": 2, "bn.bias": 2, "last.weight": 3, "last.bias": 3}
PARTS |= dict.fromkeys(("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"), 2)


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = OrderedDict(flat=nn.Flatten(), first=nn.Linear(64, 4), bn=nn.BatchNorm1d(4), last=nn.Linear(4, 3))
    return nn.Sequential(layers).double()


class Case(NamedTuple):
    cohort: int
    policy: str = "average"
    optimizer: str = "sgd"
    outer: bool = False
    personal: str = ""
    path: str = "loop"


CASES = [
    Case(4, path="stack"),
    Case(2, "reset", path="vmap"),
    Case(3, "local", outer=True, path="stack"),
    Case(3, optimizer="adamw", personal="last.bias", outer=True),
]
N, STEPS, LR = 4, 2, 0.05


def step(case, x, kept, grads):
    """One local step of one client, in place."""
    for name, g in grads.items():
        s = kept[name]
        if case.optimizer == "sgd":
            s["u"] = 0.9 * s["u"] + g
            x[name] = x[name] - LR * s["u"]
            continue
        s["m"], s["z"] = 0.9 * s["m"] + 0.1 * g, 0.9 * s["z"] + 0.1
        s["v"], s["y"] = 0.99 * s["v"] + 0.01 * g**2, 0.99 * s["y"] + 0.01
        x[name] = x[name] - LR * (s["m"] / s["z"]) / ((s["v"] / s["y"]).sqrt() + 1e-3)


def by_hand(case, problem, rounds):
    """After every round (x, the buffers and the optimizer's states: the common ones; everybody's own) by tensors."""
    model, zero = net(), torch.zeros((), dtype=F64)
    params = {n: p.detach() for n, p in model.named_parameters()}
    empty = {"sgd": ("u",), "adamw": ("m", "v", "z", "y")}[case.optimizer]
    common = {**params, **dict(model.named_buffers())}
    states = {n: {s: zero if s in "zy" else torch.zeros_like(p) for s in empty} for n, p in params.items()}
    own, own_states, b, out = [{} for _ in range(N)], [{} for _ in range(N)], {n: 0 * p for n, p in params.items()}, []
    last, names = dict(common), {*params}
    for r in range(1, rounds + 1):
        ids, ends = cohort(N, case.cohort, 2, r - 1), []
        for c in ids:
            x, kept = {**common, **own[c]}, {n: dict(own_states[c].get(n, states[n])) for n in params}
            batches = problem.sampler.draw(torch.tensor([c]), torch.tensor([(r - 1) * STEPS]), STEPS)[0]
            for rows in batches:
                x = {n: v.clone().requires_grad_(n in names) for n, v in x.items()}
                images = (problem.dataset.x_train[rows].double() / 255 - 0.4) / 0.3
                loss = cross_entropy(functional_call(model, x, images), problem.dataset.y_train[rows])
                grads = dict(zip(params, torch.autograd.grad(loss, [x[n] for n in params]), strict=True))
                x = {n: v.detach() for n, v in x.items()}
                step(case, x, kept, grads)
            ends.append((x, kept))
        for c, (x, kept) in zip(ids, ends, strict=True):
            own[c], own_states[c] = dict(x), dict(kept)
        mine = {n for n in common if n == case.personal}
        for n in {*common} - mine:
            if (r - PARTS[n]) % 3:
                continue
            rows = torch.stack([x[n] for x, _ in ends])
            mean = rows.amax(0) if not rows.is_floating_point() else rows.mean(0)
            if n.endswith("running_var"):
                means = torch.stack([x["bn.running_mean"] for x, _ in ends])
                mean = mean + (means**2).mean(0) - means.mean(0) ** 2
            if case.outer and n in names:
                delta = last[n] - mean
                b[n] = 0.5 * b[n] + delta
                mean = last[n] - 0.7 * (delta + 0.5 * b[n])
            common[n] = last[n] = mean
            for c in range(N):
                own[c].pop(n, None)
            if n in names and case.policy != "local":
                means = {s: torch.stack([kept[n][s] for _, kept in ends]).mean(0) for s in empty}
                states[n] = {s: mean * (case.policy != "reset") for s, mean in means.items()}
                for c in range(N):
                    own_states[c].pop(n, None)
        everybody = [({**common, **own[c]}, {n: own_states[c].get(n, states[n]) for n in params}) for c in range(N)]
        out.append((dict(common), everybody))
    return out


def small(case, num_rounds=5):
    data = tiny_images(40)
    partition = make_partition("dirichlet-class", data.y_train.numpy(), N, alpha=0.5, min_size=2, seed=1)
    problem = Supervised(data, net(), partition, dtype=F64, batch_size=5, personal=case.personal)
    begun = problem.start()
    some = {n: v for n, v in begun.params.items() if n != case.personal}
    fragments = fragments_of(some, begun.buffers, 3, [*problem.places.names])
    assert dict(fragments.parts) == {n: f for n, f in PARTS.items() if n != case.personal}
    rest = {"optimizer": "adamw", "beta2": 0.99, "eps": 1e-3} if case.optimizer == "adamw" else {}
    method = Method(0.9, momentum_policy=case.policy, fragments=fragments, **rest)
    outer = OuterRule("nesterov", OuterNumbers(0.7, 0.5)) if case.outer else None
    plan = Plan(method, LearningRate(LR), num_rounds, case.cohort, 5, seed=2, num_local_steps=STEPS, outer=outer)
    return problem, plan


@table("case", CASES)
def test_rounds_are_those_of_a_loop_over_clients(case):
    problem, plan = small(case)
    engine = Engine(problem, plan.method, path=case.path, chunk_size=3)
    steps = run_rounds(problem, plan, engine, beginning(problem, plan))
    sent = 0
    for number, ((done, record), (_, everybody)) in enumerate(
        zip(steps, by_hand(case, problem, plan.num_rounds), strict=True), 1
    ):
        done, same = done.gathered(), {"rtol": 1e-10, "atol": 1e-11}
        names = {"u": "{}", "m": "m/{}", "v": "v/{}", "z": "m.clock/{}", "y": "v.clock/{}"}
        begun = plan.method.rules.begun(done.state.momentum, number)
        for c, (x, kept) in enumerate(everybody):
            for part, tree in (("params", done.state.params), ("buffers", done.state.buffers), ("momentum", begun)):
                own = getattr(done.own, part)
                got = {n: own[n][c] if n in own else v for n, v in tree.items()}
                for n, v in got.items():
                    if part != "momentum":
                        torch.testing.assert_close(v, x[n], **same)
                if part == "momentum":
                    for n, states in kept.items():
                        for s, right in states.items():
                            torch.testing.assert_close(got[names[s].format(n)], right, **same)
        for n in {**done.state.params, **done.state.buffers}:  # what is evaluated: the mean of what all have
            if n.endswith(("running_var", "tracked")):
                continue
            mean = torch.stack([x[n] for x, _ in everybody]).mean(0)
            if n != case.personal:
                torch.testing.assert_close({**done.state.params, **done.state.buffers}[n], mean, **same)
        x = {n: v for n, v in problem.start().params.items() if n != case.personal}
        held = sum(v.nbytes for n, v in problem.start().buffers.items() if (number - PARTS[n]) % 3 == 0)
        due = [v for n, v in x.items() if (number - PARTS[n]) % 3 == 0]
        many = {"average": 2, "local": 1, "reset": 1}[case.policy] + (case.optimizer == "adamw")
        clocks = 2 * 8 * len(due) if case.optimizer == "adamw" else 0
        sent += case.cohort * (many * sum(v.nbytes for v in due) + held + clocks)
        assert record["bytes_sent"] == sent


# --- configurations ------------------------------------------------------------------------------------------

RUN = {
    "data.dataset": "digits",
    "data.num-clients": 4,
    "algorithm.cohort-size": 3,
    "algorithm.num-local-steps": 2,
    "algorithm.fragments": 3,
    "algorithm.outer": "nesterov",
    "model.name": "mlp",
    "model.hidden": 4,
    "run.num-rounds": 5,
    "run.dtype": "float64",
    "engine.path": "loop",
}
ALONE = ("algorithm.cohort-size", "algorithm.num-local-steps")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_has_the_bytes_of_one_that_went_through(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with pytest.warns(
        UserWarning, match="algorithm.fragments: the largest part of the model is part 1 of 3, 0.0041 MB"
    ):
        fedmom.run(RUN, out=whole)
    fedmom.run({**RUN, "run.num-rounds": 2}, out=cut)
    fedmom.run(resume=cut, sets={"run.num-rounds": 5})
    for name in (CHECKPOINT, CLIENTS, FINAL):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


@table(
    "changes, words",
    [
        ({"algorithm.fragments": 7}, r"algorithm.fragments = 7: x has 6 tensors that are averaged"),
        ({"algorithm.fragments": 6, "algorithm.personal": "head"}, "algorithm.fragments = 6: x has 4 tensors"),
        ({"algorithm.states": "x: average every 2"}, "algorithm.fragments = 3: .*x is exchanged every 2 rounds"),
        ({"algorithm.states": "u: average every 3"}, "algorithm.fragments = 3: .*u is exchanged every 3 rounds"),
        ({"server.strategy": "fedavg", "algorithm.outer": "none"}, "algorithm.fragments = 3 lets clients keep states"),
        (
            {"algorithm.name": "d-sgd-m-qg", **dict.fromkeys(ALONE, 0), "algorithm.outer": "none"},
            "quasi-global follows x, all of which must be mixed; set algorithm.fragments = 1",
        ),
        ({"algorithm.fragments": 0}, "algorithm.fragments = 0: must be >= 1"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        fedmom.run({**RUN, **changes})
    assert "\n" not in str(caught.value)


def test_streaming_diloco_is_diloco_by_parts():
    named = resolve(load({"algorithm.name": "streaming-diloco"})).config.algorithm
    plain = resolve(load({"algorithm.name": "diloco"})).config.algorithm
    assert named.fragments == 4
    assert {f for f in vars(named) if getattr(named, f) != getattr(plain, f)} == {"name", "fragments"}
    assert (
        resolve(load({"algorithm.name": "streaming-diloco", "algorithm.fragments": 2})).config.algorithm.fragments == 2
    )
    assert StateRule("local") == plain_rule(named.states, "m")


def plain_rule(text: str, state: str) -> StateRule:
    (entry,) = [e for e in text.split("; ") if e.startswith(f"{state}: ")]
    return StateRule(entry.removeprefix(f"{state}: "))
