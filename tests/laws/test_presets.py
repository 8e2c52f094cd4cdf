"""Named methods: where they end, what a naive loop comes to, what they send, and what of a configuration wins."""

from fractions import Fraction

import named_rounds
import numpy as np
import pytest
import torch
from test_backends import BASE, backend, backends, close, flattened  # noqa: F401  # a fixture

import oracle
from fedmom.backends.local import make_backend
from fedmom.config.build import make_plan, make_problem
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.engine.engine import Engine
from fedmom.method.algorithms import ALGORITHMS
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning, cohort
from laws import table

H, C = np.array([0.5, 2.0, 1.0]), np.array([-1.0, 3.0, 0.0])
OPTIMUM = 11 / 7
Q = {
    "data.dataset": "quadratic",
    "data.curvatures": "0.5; 2; 1",
    "data.centers": "-1; 3; 0",
    "data.start": "0",
    "algorithm.lr": 0.05,
    "algorithm.num-local-steps": 5,
    "run.num-rounds": 4,
}
GOLDEN = Q | {"data.curvatures": "1; 3", "data.centers": "4; -2", "algorithm.num-local-steps": 2}


def begun(changes, path="loop"):
    """(problem, plan, engine) of a configuration on quadratics."""
    sizes = changes.pop("sizes", None)
    config = resolve(load({**Q, **changes})).config
    problem, plan = make_problem(config, "cpu"), make_plan(config)
    if sizes is not None:
        problem.sizes = np.array(sizes)
    if plan.topology is not None:
        return problem, plan, make_backend(config, problem, plan)
    return problem, plan, Engine(problem, plan.method, path=path, chunk_size=2)


def states_of(changes, path="loop"):
    """The states after every round."""
    problem, plan, engine = begun(dict(changes), path)
    return [new.gathered() for new, _ in run_rounds(problem, plan, engine, beginning(problem, plan))]


def xs(changes, path="loop"):
    return [done.state.params["x"].item() for done in states_of(changes, path)]


def fixed_point(changes):
    """x* of the affine map that one round is, on x, u, and the states of a correction and of an outer step."""
    problem, plan, engine = begun({**changes, "run.num-rounds": 1})
    first = beginning(problem, plan)
    trees = [first.state.params, first.state.momentum, *(first.outer or {}).values()]
    trees += [first.client_correction if first.client_correction else first.state.correction]
    sizes = [t.numel() for tree in trees for t in tree.values()]

    def step(vector):
        parts = iter(np.split(vector, np.cumsum(sizes)[:-1]))
        x, u, *more = ({n: torch.tensor(next(parts)).reshape(t.shape) for n, t in tree.items()} for tree in trees)
        outer, states = dict(zip(first.outer or {}, more, strict=False)), more[-1]
        server = {"x": states["c x"].mean(0)} if "c x" in states else states
        state = first.state._replace(params=x, momentum=u, correction=server)
        own = states if first.client_correction else None
        done = first._replace(state=state, outer=outer or None, client_correction=own)
        (new, _), *_ = run_rounds(problem, plan, engine, done)
        ends = [new.state.params, new.state.momentum, *(new.outer or {}).values()]
        ends += [new.client_correction if own else new.state.correction]
        return np.concatenate([t.numpy().reshape(-1) for tree in ends for t in tree.values()])

    zero = np.zeros(sum(sizes))
    away = step(zero)
    matrix = np.stack([step(e) - away for e in np.eye(len(zero))], 1)
    # It gets there; SlowMo's α = 0.5 on top of β = 0.9 is past what this γ bears, and stands still at the same x.
    assert plan.outer is not None or max(abs(np.linalg.eigvals(matrix))) < 1 + 1e-9
    return np.linalg.lstsq(np.eye(len(zero)) - matrix, away, rcond=None)[0][0]


# x* − x_opt, computed elsewhere by linear algebra.
ENDS = [
    ("fedprox", {"algorithm.prox-mu": 1.0}, -0.100479987),
    ("scaffold", {}, 0.0),
    ("scaffold", {"algorithm.num-local-steps": 11}, 0.0),
    ("scaffold", {"algorithm.beta": 0.8}, 0.0),
    ("fednova", {}, -0.101011626),  # equal steps: FedAvg
    ("fednova", {"sizes": (2, 8, 5), "algorithm.local-epochs": 1}, -0.232969),
    ("fednova", {"sizes": (2, 8, 5), "algorithm.local-epochs": 1, "algorithm.lr": 0.0005}, -0.002362),
    ("local-sgd", {"sizes": (2, 8, 5), "algorithm.local-epochs": 1, "algorithm.lr": 0.0005}, 0.563240),
    ("fedcm", {}, -0.010013431),
    ("local-sgd", {"algorithm.lr": 0.005}, -0.010013431),  # FedCM's law: local SGD at αγ
    ("mime-lite", {}, -0.009801749),
    ("slowmo", {}, -0.187519669),  # an outer step moves no fixed point
    ("fedavgm", {}, -0.101011626),
]


@table("name, changes, away", ENDS)
def test_where_nothing_moves_any_more(name, changes, away):
    changes = {"algorithm.name": name, **changes}
    if "algorithm.local-epochs" in changes:
        changes["algorithm.num-local-steps"] = 0
    assert fixed_point(changes) - OPTIMUM == pytest.approx(away, abs=6e-7 if "sizes" in changes else 6e-10)


def test_fednova_counts_the_steps_that_momentum_makes_longer():
    """a_i = Σ (1−β^k)/(1−β); by τ_i for a_i the end would be .4017 away."""
    keys = {"algorithm.name": "fednova", "algorithm.num-local-steps": 0, "algorithm.local-epochs": 1}
    keys |= {"algorithm.beta": 0.9 - 1e-12, "algorithm.lr": 0.0005, "sizes": (2, 8, 5)}
    assert fixed_point(keys) - OPTIMUM == pytest.approx(-0.004142, abs=6e-7)


def test_fedprox_for_ever_minimises_the_proximal_mean():
    """I → ∞: x* = Σ w c / Σ w with w = hμ/(h + μ), which is 10/9 at μ = 1."""
    keys = {"algorithm.name": "fedprox", "algorithm.prox-mu": 1.0, "algorithm.lr": 0.3, "algorithm.num-local-steps": 60}
    assert fixed_point(keys) == pytest.approx(10 / 9, abs=1e-9)


def test_golden_rounds():
    half = {"algorithm.name": "slowmo", "algorithm.slow-lr": 0.5, "algorithm.beta": 0.5, "algorithm.lr": 0.25}
    rows = [
        (GOLDEN | {"algorithm.name": "scaffold", "algorithm.lr": 0.125}, "-9/64 -1185/4096 -100149/262144"),
        (GOLDEN | half, "-3/32 -179/1024 -6595/32768"),
    ]
    for changes, want in rows:
        for path in ("loop", "vmap"):
            assert xs(changes, path)[:3] == [float(Fraction(f)) for f in want.split()]
    assert xs({"algorithm.name": "fedcm"})[2] == pytest.approx(0.243791905040, abs=1e-12)
    assert xs({"algorithm.name": "mime-lite"})[2] == pytest.approx(1.741513714305, abs=1e-12)
    # Problem A: the preset's AdamW, and periods that the configuration gives.
    a = {"data.start": "0.5", "algorithm.lr": 0.125, "algorithm.beta": 0.5, "algorithm.beta2": 0.75}
    a |= {"algorithm.num-local-steps": 2}
    assert xs(a | {"algorithm.name": "local-adam"})[3] == pytest.approx(0.650632892891, abs=1e-12)
    periods = {"algorithm.name": "des-loc", "algorithm.states": "m: average every 2; v: average every 4"}
    assert xs(a | periods)[3] == pytest.approx(0.416593444967, abs=1e-12)
    plain = {"algorithm.name": "diloco", "algorithm.outer-lr": 1.0, "algorithm.outer-momentum": 0.0}
    assert xs(a | plain)[3] == pytest.approx(0.204008810554, abs=1e-12)


def test_mime_lite_with_one_step_is_algorithm_1():
    one = {"algorithm.num-local-steps": 1, "algorithm.beta": 0.7, "run.num-rounds": 7}
    mime, paper = (xs(one | {"algorithm.name": name}) for name in ("mime-lite", "pr-sgd-m"))
    np.testing.assert_allclose(mime, paper, rtol=1e-13)


def asked_of(number, x_shape=()):
    return named_rounds.Asked(number, range(3), [5] * 3, np.ones(3) / 3, lambda i, k, x: H[i] * (x - C[i]), 0.05)


# The numbers that a preset's keys come to, as the naive loop takes them.
LOOPS = {
    "fedprox": {},
    "scaffold": {},
    "fednova": {},
    "fedcm": {},
    "mime-lite": {"mime": 0.9},
    "slowmo": {"beta": 0.9, "outer": 0.5},
    "fedavgm": {},
    "fedadam": {},
    "local-adam": {},
    "des-loc": {},
    "diloco": {"eta": 0.7},
}
ADAM = ("local-adam", "des-loc", "diloco")


def test_every_preset_is_the_naive_loops():
    of_several_tensors = "streaming-diloco"  # in method/test_fragments.py
    here = {*LOOPS, "d-sgd-m-qg", "gradient-tracking", of_several_tensors}
    assert here == {n for n, a in ALGORITHMS.items() if a.equation}
    for name, numbers in LOOPS.items():
        state, want = named_rounds.start(np.zeros(()), 3), []
        one_round = named_rounds.adam_round if name in ADAM else named_rounds.one_round
        for number in range(1, 8):
            state = one_round(name, state, asked_of(number), numbers)
            want.append(float(state["x"]))
        for path in ("loop", "vmap"):
            got = xs({"algorithm.name": name, "run.num-rounds": 7, "run.eval-every": 9}, path)
            np.testing.assert_allclose(got, want, rtol=1e-12, err_msg=name)


def test_algorithm_2s_presets_are_the_naive_loops(tmp_path):
    """On a path of 3, whose W is not symmetric where it counts: quasi-global momentum, and gradient tracking."""
    W = np.array([[2, 1, 0], [1, 1, 1], [0, 1, 2]]) / 3
    np.savetxt(tmp_path / "w.csv", W, delimiter=",")
    for name in ("d-sgd-m-qg", "gradient-tracking"):
        keys = {"algorithm.name": name, "algorithm.topology": str(tmp_path / "w.csv"), "algorithm.num-local-steps": 1}
        rows = {kind: np.zeros(3) for kind in "xuyg"}
        ends = states_of(keys | {"run.num-rounds": 6})
        for end in ends:
            rows |= named_rounds.gossip_step(name, rows, W, lambda x: H * (x - C), 0.05, 0.9)
            np.testing.assert_allclose(end.rows.params["x"].squeeze().numpy(), rows["x"], rtol=1e-12)
        if name == "gradient-tracking":
            y, g = (end.rows.momentum[f"{kind}/x"].squeeze() for kind in "yg")
            assert y.mean().item() == pytest.approx(g.mean().item(), rel=1e-12)
            # Everybody gets to the optimum of all; with y left at home (.015238, .001905, −.011429) away.
            last = states_of(keys | {"algorithm.lr": 0.2, "run.num-rounds": 130, "run.eval-every": 130})[-1]
            np.testing.assert_allclose(last.rows.params["x"].squeeze().numpy(), OPTIMUM, rtol=1e-9)
        # x, and of gradient tracking y, to one or two neighbours: four links.
        assert ends[-1].bytes_sent == 6 * 8 * 4 * (2 if name == "gradient-tracking" else 1)


# Numbers that one client sends in rounds of its own, on average over six, of a model of one number.
SENT = {"fedprox": 1, "scaffold": 2, "fednova": 1, "fedcm": 1, "mime-lite": 2, "diloco": 1, "des-loc": 1.5}
SENT |= {"fedavgm": 1, "fedadam": 1, "slowmo": 2}


def test_what_they_send():
    for name, numbers in SENT.items():
        end = states_of({"algorithm.name": name, "run.num-rounds": 6})[-1]
        clocks = 6 / 6 * (1 / 3 + 1 / 6) if name == "des-loc" else 0  # one number beside m and v, in a model of one
        assert end.bytes_sent / (6 * 3 * 8) == pytest.approx(numbers + clocks), name


PRESETS_ON_DATA = {
    "fedprox": ({"algorithm.prox-mu": 0.3}, {"mu": 0.3}),
    "scaffold": ({}, {}),
    "fednova": ({"algorithm.beta": 0.5, "algorithm.nesterov": True}, {"beta": 0.5, "nesterov": True}),
    "fedcm": ({"algorithm.fedcm-alpha": 0.3}, {"alpha": 0.3}),
    "mime-lite": ({}, {"mime": 0.9}),
}


@backends("loop", "vmap", "stack", "flower", "workers")
def test_rounds_of_examples_are_the_naive_loops(backend):  # noqa: F811
    """One, two and five clients, a cohort, weights, and unequal numbers of steps."""
    here = backend.way.changes["engine.path"]
    few = backend.way.workers or here in ("vmap", "stack")
    for name in ("fednova", "fedprox") if here == "stack" else PRESETS_ON_DATA:
        for clients, size, rounds in ((5, 3, 3),) if few else ((1, 1, 2), (2, 2, 2), (5, 3, 3)):
            weights = "uniform" if clients == 2 else "samples"
            keys, numbers = PRESETS_ON_DATA[name]
            keys = keys | {"algorithm.name": name, "algorithm.cohort-size": size, "algorithm.client-weights": weights}
            keys |= {"algorithm.num-local-steps": 0, "algorithm.local-epochs": 1, "data.num-clients": clients}
            check_on_examples(backend(keys | {"run.num-rounds": rounds}), name, numbers, size, weights)


def check_on_examples(run, name, numbers, size, weights):
    problem, plan, data = run.problem, run.plan, oracle.examples()
    sizes = problem.sizes
    steps = [-(-n // BASE["data.batch-size"]) for n in sizes]
    weigh = sizes if weights == "samples" else np.ones(len(sizes))
    state = named_rounds.start(flattened(problem.start().params), len(sizes))
    for number, (new, record) in enumerate(run.rounds()):
        ids = cohort(len(sizes), size, plan.seed, number)
        draws = [problem.sampler.draw(*torch.tensor([[c], [number * steps[c]]]), steps[c])[0].numpy() for c in ids]
        losses = [[] for _ in ids]

        def gradient(place, k, x, draws=draws, losses=losses):
            rows = draws[place][k]
            g, loss = oracle.gradient(x, data["x_train"][rows], data["y_train"][rows])
            losses[place].append(loss)
            return g

        asked = named_rounds.Asked(number + 1, ids, [steps[c] for c in ids], weigh / weigh.sum(), gradient, 0.1, steps)
        state = named_rounds.one_round(name, state, asked, numbers)
        close(flattened(new.state.params), state["x"])
        told = {"scaffold": state["c"], "fedcm": state["D"], "mime-lite": state["m"]}
        if name in told:
            close(flattened(new.state.correction), told[name])
        if name == "scaffold":
            close(state["c"], np.tensordot(weigh / weigh.sum(), np.array(state["c_i"]), 1))
            assert set(new.client_correction) == {f"c {n}" for n in new.state.params}
        else:
            assert new.client_correction is None
        assert record["consensus_distance"] == pytest.approx(float(state["spread"]), rel=1e-9, abs=1e-15)
        p = weigh[ids] / weigh[ids].sum()
        assert record["train_loss"] == pytest.approx(float(p @ [np.mean(one) for one in losses]), rel=1e-10)
