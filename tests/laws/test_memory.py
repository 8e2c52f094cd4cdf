"""A correction with state on every backend: its laws on quadratics, and the naive loop whoever runs a round.

SCAFFOLD (Karimireddy et al., ICML 2020) and a FedProx with memory as examples/memory.py has them.
"""

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from test_backends import BASE, backend, backends, close, flattened  # noqa: F401  # a fixture

import oracle
from both_sides import QUADRATIC, by_flower
from fedmom.engine.engine import Engine
from fedmom.errors import InputError
from fedmom.flower.wire import pack
from fedmom.method.algorithms import Method
from fedmom.method.corrections import Correction
from fedmom.method.schedules import LearningRate
from fedmom.records.files import read_tensors
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, beginning, cohort
from fedmom.tasks.quadratic import Quadratic
from strategies.prsgdm import PRSGDM

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # for actors too, which have the path of who starts them
import memory

F64 = torch.float64
PATHS = [("loop", 1), ("vmap", 2), ("vmap", 64)]
Q = ((0.5, 2.0, 1.0, 3.0, 0.25), (-1.0, 3.0, 0.0, 2.0, -2.0))  # h, c of up to five clients


class OptionII(memory.Scaffold):
    """As published, for β = 0: from where a client went."""

    def start(self, params):
        return {n: 0 * x for n, x in params.items()}, {n: 0 * x for n, x in params.items()}

    def gradient(self, g, x, x_start, client, server):
        return {n: g[n] - client[n] + server[n] for n in g}

    def finish(self, x, x_start, client, server, num_steps, total_lr):
        message = {n: (x_start[n] - x[n]) / total_lr - server[n] for n in x}
        return {n: client[n] + message[n] for n in x}, message


def states(correction, h, c, *, lr, beta=0.0, interval=2, rounds=3, start=0.0, nesterov=False, way=PATHS[0], **plan):
    """The states after every round on quadratics of one number."""
    dtype = plan.pop("dtype", F64)
    problem = Quadratic([[v] for v in h], [[v] for v in c], (start,), dtype=dtype)
    rate = lr if isinstance(lr, LearningRate) else LearningRate(lr)
    cohort_size = plan.pop("cohort_size", len(h))
    method = Method(beta, nesterov, correction=correction)
    whole = Plan(method, rate, rounds, cohort_size, 1, num_local_steps=interval, **plan)
    engine = Engine(problem, method, path=way[0], chunk_size=way[1])
    return [done for done, _ in run_rounds(problem, whole, engine, beginning(problem, whole))]


def scaffold_by_hand(h, c, lr, interval, rounds):
    """x after every round, in fractions, β = 0: c_i⁺ = c_i − c + (x − y_i)/(Iγ), and c moves by the mean change."""
    h, c, lr = [Fraction(v) for v in h], [Fraction(v) for v in c], Fraction(lr)
    x, own, mean, N = Fraction(0), [Fraction(0)] * len(h), Fraction(0), len(h)
    found = []
    for _ in range(rounds):
        ends, new = [], []
        for i in range(N):
            y = x
            for _ in range(interval):
                y -= lr * (h[i] * (y - c[i]) - own[i] + mean)
            ends.append(y)
            new.append(own[i] - mean + (x - y) / (interval * lr))
        mean += sum(b - a for a, b in zip(own, new, strict=True)) / N
        own, x = new, sum(ends) / N
        found.append(x)
    return found


def test_scaffold_on_the_golden_run_is_exact_on_every_path_in_both_dtypes():
    h, c = (1.0, 3.0), (4.0, -2.0)
    golden = [Fraction(-9, 64), Fraction(-1185, 4096), Fraction(-100149, 262144)]
    assert scaffold_by_hand(h, c, 0.125, 2, 3) == golden
    for way in PATHS:
        for dtype in (torch.float32, F64):
            for kind in (memory.Scaffold, OptionII):
                ends = states(kind(), h, c, lr=0.125, way=way, dtype=dtype)
                assert [end.state.params["x"].item() for end in ends] == [float(x) for x in golden]
    for N, interval in ((1, 3), (2, 1), (5, 3)):  # not exact in floats any more
        h, c = (v[:N] for v in Q)
        ends = states(memory.Scaffold(), h, c, lr=0.0625, interval=interval, rounds=4)
        want = [float(x) for x in scaffold_by_hand(h, c, 0.0625, interval, 4)]
        np.testing.assert_allclose([end.state.params["x"].item() for end in ends], want, rtol=1e-13)


def optimum(h, c):
    return np.dot(h, c) / np.sum(h)


def test_the_optimum_is_the_fixed_point_for_every_interval_and_momentum():
    """From x_opt with c_i = ∇f_i(x_opt), or λ_i = −∇f_i(x_opt), nothing moves; from elsewhere x comes there."""
    cases = [(1, 4, 0.9, False), (2, 2, 0.0, False), (3, 5, 0.9, True), (5, 1, 0.5, False), (5, 7, 0.0, False)]
    for N, interval, beta, nesterov in cases:
        h, c = (v[:N] for v in Q)
        x = optimum(h, c)
        gradients = torch.tensor([[hi * (x - ci)] for hi, ci in zip(h, c, strict=True)], dtype=F64)
        problem = Quadratic([[v] for v in h], [[v] for v in c], (x,), dtype=F64)
        for kind, own, sign in ((memory.Scaffold, "c x", 1), (memory.ProximalWithMemory, "x", -1)):
            if kind is memory.ProximalWithMemory and beta:
                continue
            plan = Plan(
                Method(beta, nesterov, correction=kind()), LearningRate(0.05), 1, N, 1, num_local_steps=interval
            )
            begin = beginning(problem, plan)
            begin = begin._replace(client_correction=begin.client_correction | {own: sign * gradients})
            engine = Engine(problem, plan.method, path="vmap", chunk_size=2)
            ((end, _),) = run_rounds(problem, plan, engine, begin)
            close(end.state.params["x"], begin.state.params["x"], 1e-13)
            for name, value in begin.client_correction.items():
                close(end.client_correction[name], value, 1e-13)
            close(end.state.correction["x"], [0.0], 1e-13)
    h, c = (v[:3] for v in Q)
    for kind in (memory.Scaffold, memory.ProximalWithMemory):
        end = states(kind(), h, c, lr=0.1, rounds=60, interval=3, way=PATHS[2])[-1]
        assert abs(end.state.params["x"].item() - optimum(h, c)) < 1e-6


class Forgetful(OptionII):
    """c_i⁺ without c_i − c."""

    def finish(self, x, x_start, client, server, num_steps, total_lr):
        new = {n: (x_start[n] - x[n]) / total_lr for n in x}
        return new, {n: new[n] - client[n] for n in x}


class Whole(memory.Scaffold):
    """The cohort's size where the paper has N."""

    def gather(self, server, mean_message, share):
        return super().gather(server, mean_message, 1.0)


def means_apart(kind, **options):
    """The largest |c − mean c_i| after any round."""
    ends = states(kind(), *Q, lr=0.05, interval=3, cohort_size=2, rounds=6, seed=3, **options)
    return max(abs(end.state.correction["x"] - end.client_correction["c x"].mean(0)).item() for end in ends)


def test_wrong_variants_break_the_laws():
    """Each ends where it was derived to end, apart from this code."""
    h, c = (v[:3] for v in Q)
    end = states(Forgetful(), h, c, interval=5, lr=0.05, rounds=80, way=PATHS[2])[-1]
    assert end.state.params["x"].item() - optimum(h, c) == pytest.approx(-0.0536, abs=5e-5)
    assert means_apart(memory.Scaffold) < 1e-15
    assert means_apart(Whole) > 0.01
    # Without memory a round is x ← a x + b, so that three points of a run give its fixed point.
    for correct, away in ((memory.proximal, -0.100479987), (None, -0.101011626)):
        a, b, d = (end.state.params["x"].item() for end in states(correct, h, c, lr=0.05, interval=5))
        assert a - (b - a) ** 2 / (d - 2 * b + a) - optimum(h, c) == pytest.approx(away, abs=1e-9)
    far = states(OptionII(), h, c, interval=5, lr=0.05, beta=0.9, rounds=60, way=PATHS[2])[-1]
    assert abs(far.state.params["x"].item()) > 1e5


def test_who_was_never_drawn_has_the_state_of_the_start_and_others_keep_theirs():
    class Counts(Correction):
        def start(self, params):
            return {"rounds": torch.tensor(7)}, {"rounds": torch.zeros((), dtype=F64)}

        def finish(self, x, x_start, client, server, num_steps, total_lr):
            return {"rounds": client["rounds"] + 1}, {"one": torch.ones((), dtype=F64)}

        def gather(self, server, mean_message, share):
            return {"rounds": server["rounds"] + share * mean_message["one"]}

    for way in PATHS:
        for size in (1, 2, 5):
            ends = states(Counts(), *Q, lr=0.05, cohort_size=size, rounds=3, seed=5, way=way)
            drawn = np.bincount(np.concatenate([cohort(5, size, 5, r) for r in range(3)]), minlength=5)
            assert ends[-1].client_correction["rounds"].tolist() == (7 + drawn).tolist()
            assert ends[-1].state.correction["rounds"].item() == pytest.approx(3 * size / 5)
            # 8 bytes of x, 8 of the message; β = 0, so that u stays at home.
            assert ends[-1].bytes_sent == 3 * size * 16


def test_a_client_is_told_the_sum_of_its_own_learning_rates():
    class Told(Correction):
        def start(self, params):
            zero = torch.zeros((), dtype=F64)
            return {}, {"steps": zero, "lr": zero}

        def finish(self, x, x_start, client, server, num_steps, total_lr):
            return {}, {"steps": num_steps.to(F64), "lr": total_lr}

        def gather(self, server, mean_message, share):
            return mean_message

    rate = LearningRate(0.1, "cosine", minimum=0.01)
    horizon = Plan(Method(0), rate, 4, 5, 1, num_local_steps=3).horizon(np.ones(5, dtype=np.int64))
    for way in PATHS:
        for r, end in enumerate(states(Told(), *Q, lr=rate, interval=3, rounds=4, way=way)):
            want = sum(rate.at(3 * r + s, horizon) for s in range(3))
            assert end.state.correction["lr"].item() == pytest.approx(want, rel=1e-14)
            assert end.state.correction["steps"].item() == 3


def scaffold_round(state, asked, settings, data, own, mean, shares):
    """One round of SCAFFOLD on the oracle's task, one client after another -> (x, u, own [N, …], mean)."""
    xs, us, changes, own = [], [], [], own.copy()
    for client, draws in zip(asked.clients, asked.draws, strict=True):
        x, u, total = state.x, state.u, 0
        for rows in draws:
            g, _ = oracle.gradient(x, data["x_train"][rows], data["y_train"][rows])
            total = total + g
            g = g - own[client] + mean
            u = settings.beta * u + g
            x = x - asked.lr * (settings.beta * u + g if settings.nesterov else u)
        changes.append(total / len(draws) - own[client])
        own[client] = total / len(draws)
        xs.append(x)
        us.append(u)
    p = np.asarray(asked.weights) / np.sum(asked.weights)
    x, u, change = (sum(w * row for w, row in zip(p, rows, strict=True)) for rows in (xs, us, changes))
    return x, u, own, mean + sum(shares[list(asked.clients)]) * change


@backends("vmap", "flower", "workers", "simulation")
def test_rounds_with_scaffold_are_the_naive_loops(backend):  # noqa: F811
    """Cohorts, weights and numbers of steps that differ; c is the mean of all c_i by the weights of all clients."""
    for weights in ("samples",) if backend.way.workers else ("samples", "uniform"):
        changes = {"algorithm.correction": "memory:Scaffold", "algorithm.client-weights": weights}
        changes |= {"algorithm.cohort-size": 3, "run.num-rounds": 3, "algorithm.nesterov": True}
        changes |= {"algorithm.num-local-steps": 0, "algorithm.local-epochs": 1}
        begun = backend(changes)
        problem, plan, data = begun.problem, begun.plan, oracle.examples()
        sizes = problem.sizes
        steps = [-(-n // BASE["data.batch-size"]) for n in sizes]
        weigh = sizes if weights == "samples" else np.ones(len(sizes))
        settings = oracle.Settings(begun.config.algorithm.beta, True, "average")
        state = oracle.start(flattened(problem.start().params), len(sizes))
        own, mean = np.zeros_like(state.own_x), np.zeros_like(state.x)
        for number, (new, _) in enumerate(begun.rounds()):
            ids = cohort(len(sizes), 3, plan.seed, number)
            draws = [problem.sampler.draw(*torch.tensor([[c], [number * steps[c]]]), steps[c])[0].numpy() for c in ids]
            asked = oracle.Round(ids, [weigh[c] for c in ids], draws, begun.config.algorithm.lr)
            x, u, own, mean = scaffold_round(state, asked, settings, data, own, mean, weigh / weigh.sum())
            state = state._replace(x=x, u=u)
            close(flattened(new.state.params), x)
            close(flattened(new.state.momentum), u)
            close(flattened(new.state.correction), mean)
            kept = {n.removeprefix("c "): v for n, v in new.client_correction.items() if n.startswith("c ")}
            close(flattened(kept), own)
            close(mean, np.tensordot(weigh / weigh.sum(), own, 1))
            assert all(not v.any() for n, v in new.client_correction.items() if n.startswith("sum "))


def test_who_does_not_answer_keeps_its_state_and_c_stays_the_mean_of_all(tmp_path):
    """On Flower, nodes that hold one client and two; in round 2 the node of clients 0 and 1 fails."""
    changes = {**QUADRATIC, "algorithm.correction": "memory:Scaffold", "server.on-failure": "proceed"}
    changes |= {"algorithm.momentum-policy": "local", "run.checkpoint-every": 1}

    def fault(message, node):
        late = message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2
        return ValueError("broken") if late and node["partition-id"] == 0 else None

    seen = []
    for length, options in ((1, {}), (2, {"fault": fault})):
        folder = tmp_path / str(length)
        result, _ = by_flower({**changes, "run.num-rounds": length}, 3, options, out=folder)
        assert result.rounds[-1]["num_clients"] == (5 if length == 1 else 3)
        rows, checkpoint = (read_tensors(folder / f"{name}.safetensors")[0] for name in ("clients", "checkpoint"))
        seen.append(rows)
        close(checkpoint["correction/x"], rows["correction/c x"].mean(0))
    for name in ("correction/c x", "momentum/x"):
        assert torch.equal(seen[1][name][:2], seen[0][name][:2])
        assert not torch.equal(seen[1][name][2:], seen[0][name][2:])
    # Whoever takes our strategy without the round loop has nobody who gathers: that is said, and not done by halves.
    with pytest.raises(InputError, match="initial_arrays: a correction with state"):
        PRSGDM(5).start(None, pack({"params/x": torch.zeros(1), "correction/x": torch.zeros(1)}))
