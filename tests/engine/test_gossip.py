"""The laws of Algorithm 2 on any doubly stochastic W; that every named topology is one is test_topology's."""

import numpy as np
import pytest
import torch

import fedmom
import laws
from fedmom.engine.engine import Engine
from fedmom.engine.gossip import GossipRounds, mean_of
from fedmom.errors import InputError
from fedmom.method.algorithms import Method
from fedmom.method.decentralized.graphs import TOPOLOGIES
from fedmom.method.decentralized.mixing import Block, mix_buffers, spread
from fedmom.method.decentralized.topology import Mixing, Topology, make_topology
from fedmom.method.schedules import LearningRate
from fedmom.method.state import ClientState
from fedmom.method.states.policies import MOMENTUM_POLICIES, exchange_average, start_average
from fedmom.records.files import read_tensors
from fedmom.records.history import read_rounds
from fedmom.rounds.evaluation import chosen_clients, evaluate_rows
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, beginning, round_job
from fedmom.tasks.quadratic import Quadratic, X
from laws import Trajectory, close, sample_problem, table
from runs import engine_runner, image_problem

OPTIONS = table("nesterov", [False, True])
PATHS = table("path", ["vmap", "loop"])


def gossip(
    problem, topology, *, beta=0.9, lr=0.05, rounds=10, interval=1, path="vmap", chunk_size=64, start=None, **method
):
    """[rounds + 1] rows of every client, from x⁰ or from `start` rows, after every exchange."""
    plan = Plan(
        Method(beta, **method),
        LearningRate(lr),
        rounds,
        cohort_size=len(problem.sizes),
        batch_size=1,
        num_local_steps=interval,
        topology=topology,
    )
    rounds_ = GossipRounds(Engine(problem, plan.method, path=path, chunk_size=chunk_size), topology, "cpu")
    done = beginning(problem, plan)
    done = done if start is None else done._replace(rows=start)
    states = [done.rows]
    for new, _ in run_rounds(problem, plan, rounds_, done):
        states.append(new.rows)
    return states


def trajectory(states) -> Trajectory:
    return Trajectory(*(np.stack([getattr(s, part)[X].numpy() for s in states]) for part in ("params", "momentum")))


def quadratic(p, **options) -> Quadratic:
    return Quadratic(p.h, p.c, p.start, **options)


def dense(*matrices) -> Topology:
    return Topology("given", [Mixing.of(np.asarray(matrix, dtype=np.float64)) for matrix in matrices])


def doubly_stochastic(num_clients: int, period: int) -> list[np.ndarray]:
    """W_t of each round of a period, each a convex mean of permutations (Birkhoff): directed, uneven, with zeros."""
    rng, one = np.random.default_rng([num_clients, period]), np.eye(num_clients)
    return [
        sum(share * one[rng.permutation(num_clients)] for share in rng.dirichlet(np.ones(3))) for _ in range(period)
    ]


def test_a_policy_is_one_row_of_one_table(monkeypatch):
    """Averaging with everybody, one step, is Algorithm 1 under every policy, and under one that nobody knew."""
    halved = MOMENTUM_POLICIES["average"]._replace(
        start=lambda mean: {n: u / 2 for n, u in start_average(mean).items()},
        exchange=lambda rows: {n: u / 2 for n, u in exchange_average(rows).items()},
    )
    monkeypatch.setitem(MOMENTUM_POLICIES, "halved", halved)
    p = sample_problem(3, False, interval=1, lrs=[0.1] * 5)
    for name in [name for name, policy in MOMENTUM_POLICIES.items() if not policy.gossip_only]:
        rows = gossip(quadratic(p), make_topology("complete", 3), lr=0.1, rounds=5, momentum_policy=name)
        plan = Plan(Method(0.9, momentum_policy=name), LearningRate(0.1), 5, 3, 1, num_local_steps=1)
        problem = quadratic(p)
        engine = Engine(problem, plan.method, path="vmap", chunk_size=64)
        *_, (done, _) = run_rounds(problem, plan, engine, beginning(problem, plan))
        torch.testing.assert_close(rows[-1].params[X].mean(0), done.state.params[X], rtol=1e-12, atol=1e-12, msg=name)


def step_by_step(p, matrices, *, rounds, lr, nesterov, policy) -> Trajectory:
    """Algorithm 2 with I = 1 in plain numpy, W as a double loop; `policy` of those that need x for nothing."""
    h, c, N = np.array(p.h), np.array(p.c), len(p.h)
    x, u = np.tile(np.array(p.start), (N, 1)), np.zeros_like(h)
    xs, us = [x], [u]
    for t in range(rounds):
        W = matrices[t % len(matrices)]
        g = h * (x - c)
        u = 0.9 * u + g
        x = x - lr * ((0.9 * u + g) if nesterov else u)
        x, mixed = (np.array([sum(r[j] * W[j, i] for j in range(N)) for i in range(N)]) for r in (x, u))
        u = {"average": mixed, "local": u, "reset": np.zeros_like(u)}[policy]
        xs.append(x)
        us.append(u)
    return Trajectory(np.stack(xs), np.stack(us))


@table(
    "num_clients, period, chunk_size, path, policy, nesterov",
    [
        (1, 1, 64, "vmap", "average", False),
        (2, 1, 1, "vmap", "average", True),
        (3, 3, 2, "vmap", "average", True),
        (9, 2, 4, "vmap", "average", False),
        (4, 3, 64, "loop", "average", True),
        (3, 2, 64, "loop", "average", False),
    ],
)
def test_the_engine_is_algorithm_2_step_by_step(num_clients, period, chunk_size, path, policy, nesterov):
    """N = 1 and 2, W that change, chunks that N is no multiple of, both paths."""
    p, matrices = sample_problem(num_clients, nesterov, interval=1, lrs=[]), doubly_stochastic(num_clients, period)
    options = {"lr": 0.07, "rounds": 7, "nesterov": nesterov}
    got = trajectory(
        gossip(quadratic(p), dense(*matrices), path=path, chunk_size=chunk_size, momentum_policy=policy, **options)
    )
    want = step_by_step(p, matrices, policy=policy, **options)
    close(got.x, want.x)
    close(got.u, want.u)


def test_a_directed_ring_tells_w_from_its_transpose_and_the_order():
    """One step of g = e_0, γ = 1, from 0: adapt, then combine, with W_ji."""
    problem = Quadratic([[1.0], [1.0], [1.0], [1.0]], [[-1.0], [0.0], [0.0], [0.0]], [0.0])
    matrix = make_topology("directed-ring", 4).matrices[0].dense()
    right, turned = (trajectory(gossip(problem, dense(w), lr=1.0, rounds=1)).x[1, :, 0] for w in (matrix, matrix.T))
    assert right.tolist() == [-0.5, -0.5, 0, 0]  # combine-then-adapt would give −1, 0, 0, 0
    assert turned.tolist() == [-0.5, 0, 0, -0.5]


@OPTIONS
def test_averaging_with_everybody_is_algorithm_1_with_one_step(nesterov):
    """W = 11ᵀ/N: every client's x and u are large-batch momentum SGD's, by torch's own optimizer."""
    p = sample_problem(3, nesterov, interval=1, lrs=[0.1] * 12)
    got = trajectory(gossip(quadratic(p), make_topology("complete", 3), lr=0.1, rounds=12, nesterov=nesterov))
    want = laws.torch_sgd(p.h, p.c, p.start, p.lrs, p.beta, nesterov)
    close(got.x, want.x)
    close(got.u, want.u)


@OPTIONS
@table("policy", ["average", "local"])
def test_means_obey_the_mean_recursion(policy, nesterov):
    """ū and x̄ as if one client had all gradients, whatever W: its rows sum to 1."""
    p = sample_problem(5, nesterov, interval=1, lrs=[])
    W = dense(*doubly_stochastic(5, 2))
    got = trajectory(gossip(quadratic(p), W, rounds=8, nesterov=nesterov, momentum_policy=policy))
    g = (np.array(p.h) * (got.x - np.array(p.c))).mean(1)
    x, u = got.x.mean(1), got.u.mean(1)
    close(u[1:], 0.9 * u[:-1] + g[:-1])
    close(x[1:], x[:-1] - 0.05 * ((0.9 * u[1:] + g[:-1]) if nesterov else u[1:]))


def test_consensus_is_kept():
    """Clients with one objective stay equal: columns of W sum to 1."""
    problem = Quadratic([[1.0, 2.0]] * 5, [[3.0, -1.0]] * 5, [0.0, 1.0])
    got = trajectory(gossip(problem, dense(*doubly_stochastic(5, 2)), rounds=10))
    close(got.x, got.x[:, :1])
    close(got.u, got.u[:, :1])


@table("name", TOPOLOGIES)
def test_every_named_topology_runs_by_its_own_matrices(name):
    p, topology = sample_problem(16, False, interval=1, lrs=[]), make_topology(name, 16)
    got = trajectory(gossip(quadratic(p), topology, rounds=5, chunk_size=16))
    matrices = [mixing.dense() for mixing in topology.matrices]
    close(got.x, step_by_step(p, matrices, rounds=5, lr=0.05, nesterov=False, policy="average").x)


FLAT = 1e-300  # curvature: no gradient to speak of


@table("name", ["torus", "star", "directed-ring"])
def test_without_gradients_x_contracts_like_lambda_and_u_like_beta_lambda(name):
    """From random rows, the rate over late rounds is |λ₂| for x and β|λ₂| for u."""
    topology = make_topology(name, 16)
    value, rng = topology.second_eigenvalue, np.random.default_rng(0)
    problem = Quadratic([[FLAT]] * 16, [[0.0]] * 16, [0.0])
    for part, start, rate in (("x", rng.normal(size=(16, 1)), value), ("u", np.zeros((16, 1)), 0.9 * value)):
        u = rng.normal(size=(16, 1)) if part == "u" else np.zeros((16, 1))
        rows = ClientState({X: torch.from_numpy(start)}, {X: torch.from_numpy(u)}, {})
        got = getattr(trajectory(gossip(problem, topology, rounds=60, start=rows)), part)[:, :, 0]
        away = np.linalg.norm(got - got.mean(1, keepdims=True), axis=1)
        # Eigenvalues may be complex pairs, so that single rounds swing about the rate.
        assert (away[60] / away[40]) ** (1 / 20) == pytest.approx(rate, rel=0.02)


def stationary(topology, c, lr, beta, h, mixed_momentum):
    """Root mean square disagreement from the closed forms, mode by mode of a symmetric W."""
    values, modes = np.linalg.eigh(topology.matrices[0].dense())
    b = modes.T @ (h * (c - c.mean()))
    keep = values < 1 - 1e-9
    inner = (1 - values * beta) if mixed_momentum else (1 - beta)
    x = lr * values * b / ((1 - values) * inner + lr * values * h)
    return float(np.sqrt((x[keep] ** 2).mean() * keep.sum() / len(c)))


@table("name, policy", [("star", "average"), ("torus", "average"), ("ring", "local")])
def test_stationary_disagreement_is_the_closed_form(name, policy):
    """One curvature, different centers; per mode γλb/((1−λ)(1−λβ)+λγh), or with 1−β where u is not mixed."""
    topology = make_topology(name, 16)
    c = np.random.default_rng(1).normal(size=16)
    problem = Quadratic([[1.0]] * 16, [[v] for v in c], [0.0])
    x = trajectory(gossip(problem, topology, beta=0.5, lr=0.2, rounds=150, momentum_policy=policy)).x[-1, :, 0]
    want = stationary(topology, c, 0.2, 0.5, 1.0, policy == "average")
    assert np.sqrt(((x - x.mean()) ** 2).mean()) == pytest.approx(want, rel=1e-8)


def test_mixing_the_momentum_makes_clients_agree_better():
    c = np.random.default_rng(2).normal(size=16)
    for name in ("ring", "torus", "hypercube"):
        topology = make_topology(name, 16)
        assert stationary(topology, c, 0.05, 0.9, 1.0, True) < stationary(topology, c, 0.05, 0.9, 1.0, False)


def test_disagreement_from_noise_is_the_closed_form():
    """Σ = λ²(AΣAᵀ + σ²bbᵀ) per mode; ring of 8 gives .00548."""
    topology, beta, lr = make_topology("ring", 8), 0.9, 0.05
    A, b = np.array([[beta, 1.0], [-lr * beta, 1 - lr]]), np.array([1.0, -lr])
    want = 0.0
    for value in np.linalg.eigvalsh(topology.matrices[0].dense())[:-1]:
        left = np.eye(4) - value**2 * np.kron(A, A)
        want += np.linalg.solve(left, value**2 * np.outer(b, b).ravel())[3] / 8
    assert want == pytest.approx(0.00548, abs=5e-6)
    problem = Quadratic([[1.0] * 400] * 8, [[0.0] * 400] * 8, [0.0] * 400, noise_sigma=1.0)
    x = trajectory(gossip(problem, topology, rounds=300)).x[100::10]
    assert ((x - x.mean(1, keepdims=True)) ** 2).mean() == pytest.approx(want, rel=0.03)


@OPTIONS
def test_several_local_steps_between_exchanges(nesterov):
    """I = 4 with everybody is Algorithm 1 with I = 4, after every exchange."""
    p = sample_problem(3, nesterov, interval=4, lrs=[0.07] * 12)
    want = engine_runner("vmap")(p)
    got = trajectory(
        gossip(quadratic(p), make_topology("complete", 3), lr=0.07, rounds=3, interval=4, nesterov=nesterov)
    )
    close(got.x, want.x[::4])
    close(got.u, want.u[::4])


def test_quasi_global_momentum_is_the_published_recursion():
    """Lin et al. (2021), Algorithm 1: m = βm̂ + g, x½ = x − ηm, x = W x½, m̂ = βm̂ + (1 − β)(x_before − x)/η."""
    p = sample_problem(5, False, interval=1, lrs=[])
    W = make_topology("ring", 5).matrices[0].dense()
    got = trajectory(gossip(quadratic(p), make_topology("ring", 5), rounds=9, momentum_policy="quasi-global"))
    h, c = np.array(p.h), np.array(p.c)
    x, m = np.tile(np.array(p.start), (5, 1)), np.zeros_like(h)
    for t in range(9):
        before = x
        x = W.T @ (x - 0.05 * (0.9 * m + h * (x - c)))
        m = 0.9 * m + 0.1 * (before - x) / 0.05
        close(got.x[t + 1], x)
        close(got.u[t + 1], m)


# --- the product -----------------------------------------------------------------------------------------


@table("dtype", [torch.float32, torch.float64])
def test_sparse_and_dense_products_agree(dtype):
    mixing = make_topology("directed-ring", 100).matrices[0]
    block, rows = Block(mixing), torch.randn(100, 3, 4, dtype=dtype)
    assert block.is_sparse()
    want = torch.einsum("ji,jab->iab", torch.from_numpy(mixing.dense()).to(dtype), rows)
    torch.testing.assert_close(block(rows), want)
    assert not Block(make_topology("complete", 100).matrices[0]).is_sparse()
    assert not Block(make_topology("ring", 8).matrices[0]).is_sparse()


def test_blocks_of_receivers_give_their_part_of_the_product():
    for name in TOPOLOGIES:
        mixing = make_topology(name, 16).matrices[0]
        rows = torch.randn(16, 7, dtype=torch.float64)
        whole = Block(mixing)(rows)
        for receivers in np.array_split(np.arange(16), 3):
            senders = np.unique(mixing.sources[np.isin(mixing.targets, receivers)])
            part = Block(mixing, receivers, senders)(rows[torch.from_numpy(senders)])
            torch.testing.assert_close(part, whole[torch.from_numpy(receivers)], rtol=1e-14, atol=1e-14)


def test_disagreement_is_the_mean_squared_distance_from_the_mean():
    """Two clients at (0, 0) and (2, 0) in x and at 1 and 3 in y are √2 from their mean each."""
    rows = {"x": torch.tensor([[0.0, 0.0], [2.0, 0.0]]), "y": torch.tensor([[1.0], [3.0]])}
    assert spread(rows) == pytest.approx(2.0)


def test_a_thousand_clients_are_no_problem():
    """With sparse products: by the mean, which is the same on every topology of one curvature."""
    problem = Quadratic([[1.0] * 3] * 1024, np.random.default_rng(0).normal(size=(1024, 3)).tolist(), [0.0] * 3)
    got = trajectory(gossip(problem, make_topology("exponential", 1024), rounds=3))
    assert got.x.shape == (4, 1024, 3)
    close(got.x[-1].mean(0), trajectory(gossip(problem, make_topology("torus", 1024), rounds=3)).x[-1].mean(0))


def test_buffers_are_mixed_with_their_variance_pooled():
    """running_var of what comes in: Σ w (var + mean²) − (Σ w mean)²; counts stay; agreeing clients add nothing."""
    mixing = make_topology("star", 4).matrices[0]
    W = torch.from_numpy(mixing.dense())
    rows = {
        "bn.running_mean": torch.randn(4, 3, dtype=torch.float64) + 100,
        "bn.running_var": torch.rand(4, 3, dtype=torch.float64),
        "bn.num_batches_tracked": torch.full((4,), 7),
    }
    got = mix_buffers(Block(mixing), rows, rows, True)
    mean = W.T @ rows["bn.running_mean"]
    torch.testing.assert_close(got["bn.running_mean"], mean)
    second = W.T @ (rows["bn.running_var"] + rows["bn.running_mean"] ** 2)
    torch.testing.assert_close(got["bn.running_var"], second - mean**2, rtol=1e-8, atol=1e-8)
    assert got["bn.num_batches_tracked"].tolist() == [7] * 4
    plain = mix_buffers(Block(mixing), rows, rows, False)
    torch.testing.assert_close(plain["bn.running_var"], W.T @ rows["bn.running_var"])
    same = {name: value[:1].expand_as(value).clone() for name, value in rows.items()}
    torch.testing.assert_close(mix_buffers(Block(mixing), same, same, True), same)


@PATHS
def test_a_network_with_batch_norm_mixes_all_it_has(path):
    """With everybody x, u and the statistics of all clients become one; on a ring they stay apart."""
    problem = image_problem("resnet20", 4, norm="batch", dtype=torch.float64)
    one, apart = (gossip(problem, make_topology(name, 4), rounds=1, path=path)[-1] for name in ("complete", "ring"))
    assert any(name.endswith("running_var") for name in one.buffers)
    for tree in one:
        for name, rows in tree.items():
            torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-10, atol=1e-12, msg=name)
    for tree in (apart.params, apart.momentum, {n: b for n, b in apart.buffers.items() if b.is_floating_point()}):
        assert all(bool((rows != rows[0]).any()) for rows in tree.values())
    assert all(torch.isfinite(v).all() for tree in mean_of(apart) for v in tree.values())


def test_clients_own_models_are_measured():
    problem = image_problem(num_clients=4, dtype=torch.float64)
    rows = gossip(problem, make_topology("path", 4), rounds=3)[-1]
    assert chosen_clients(4, 0) == chosen_clients(4, 9) == [0, 1, 2, 3]
    assert chosen_clients(10, 4) == [0, 2, 5, 7]  # evenly spread
    measured = evaluate_rows(problem, rows, [0, 1, 2, 3])
    each = [problem.evaluate(ClientState(*({n: v[i] for n, v in tree.items()} for tree in rows))) for i in range(4)]
    assert measured["worst_client_loss"] == max(m["test_loss"] for m in each)
    assert measured["worst_client_accuracy"] == min(m["test_accuracy"] for m in each)
    assert measured["mean_client_accuracy"] == pytest.approx(np.mean([m["test_accuracy"] for m in each]))


# --- runs ------------------------------------------------------------------------------------------------

SMALL = {
    "algorithm.name": "d-sgd-m",
    "algorithm.topology": "ring",
    "data.num-clients": 4,
    "model.name": "logistic",
    "run.num-rounds": 6,
    "run.eval-every": 2,
    "run.checkpoint-every": 2,
    "engine.path": "vmap",
    "engine.chunk-size": 4,
}


def quiet_run(changes=None, **places):
    return fedmom.run(
        None if "resume" in places else SMALL, sets=changes or {}, callbacks=[fedmom.Callback()], **places
    )


def test_a_run_records_what_it_did(tmp_path):
    result = quiet_run(out=tmp_path / "run")
    last = result.rounds[-1]
    assert last["steps"] == 6
    assert 0 < last["consensus_distance_after"] < last["consensus_distance"]
    assert 0 < last["momentum_spread_after"] < last["momentum_spread"]
    assert last["worst_client_accuracy"] <= last["mean_client_accuracy"]
    assert "worst_client_accuracy" not in result.rounds[0]
    size = sum(v.numel() * 4 for v in result.state_dict.values())
    assert last["bytes_sent"] == 6 * 4 * 2 * 2 * size  # rounds, clients, neighbours, x and u
    local = quiet_run({"algorithm.momentum-policy": "local"})
    assert local.rounds[-1]["bytes_sent"] == last["bytes_sent"] // 2
    rows, _ = read_tensors(tmp_path / "run" / "clients.safetensors")
    final, _ = read_tensors(tmp_path / "run" / "final.safetensors")
    assert rows.keys() == final.keys()
    for name, value in rows.items():
        torch.testing.assert_close(value.double().mean(0).float(), final[name])


@table("policy", ["local", "quasi-global"])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, policy):
    changes = {"algorithm.momentum-policy": policy}
    whole = quiet_run(changes, out=tmp_path / "whole")
    quiet_run({**changes, "run.num-rounds": 3}, out=tmp_path / "part")
    resumed = quiet_run({"run.num-rounds": 6}, resume=tmp_path / "part")
    for name in ("final.safetensors", "clients.safetensors", "checkpoint.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes()
    timed = {"wall_seconds", "client_steps_per_second"}
    for mine, other in zip(whole.rounds, read_rounds(tmp_path / "part"), strict=True):
        assert {k: v for k, v in mine.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    assert resumed.status == "done"


def test_rows_of_another_model_are_refused_on_resume(tmp_path):
    quiet_run(out=tmp_path / "run")
    (tmp_path / "run" / "clients.safetensors").unlink()
    with pytest.raises(InputError, match="rows of round 6 are missing"):
        quiet_run({"run.num-rounds": 8}, resume=tmp_path / "run")


@table(
    "changes, words",
    [
        ({"algorithm.cohort-size": 2}, "algorithm.cohort-size = 2: with d-sgd-m every client takes part"),
        ({"algorithm.client-weights": "samples"}, "algorithm.client-weights = 'samples'"),
        ({"algorithm.local-epochs": 1}, "algorithm.local-epochs = 1"),
        ({"algorithm.slow-momentum": 0.5}, "there is no server"),
        ({"algorithm.topology": "rnig"}, "did you mean ring"),
        ({"algorithm.topology": "torus", "data.num-clients": 7}, "near: 4, 6, 8, 9"),
        ({"algorithm.topology": "no.npy"}, "no such file"),
        ({"algorithm.momentum-policy": "quasi-global", "algorithm.num-local-steps": 2}, "is published for 1 step"),
        (
            {"algorithm.name": "pr-sgd-m", "algorithm.momentum-policy": "quasi-global"},
            "needs algorithm.name = 'd-sgd-m'",
        ),
        ({"algorithm.topology-p": 1.5}, "must be in [0, 1]"),
        ({"algorithm.interval": "theory-iid"}, "the theorem is Algorithm 1's"),
    ],
)
def test_what_does_not_go_together_is_one_line(changes, words):
    with pytest.raises(InputError) as error:
        quiet_run(changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_topology_without_algorithm_2_is_noted():
    with pytest.warns(UserWarning, match="pr-sgd-m has no topology: algorithm.topology changes nothing"):
        fedmom.run({**SMALL, "algorithm.name": "pr-sgd-m", "run.num-rounds": 1})


def test_a_disconnected_graph_warns(tmp_path):
    (tmp_path / "g.edges").write_text("0 1\n2 3\n")
    with pytest.warns(UserWarning, match="disconnected"):
        fedmom.run({**SMALL, "algorithm.topology": str(tmp_path / "g.edges"), "run.num-rounds": 1})


def test_bytes_are_those_of_the_rounds_own_links():
    """A ring that is directed has 4 links, everybody with everybody 12; each carries x and, where it is mixed, u."""
    ring, everybody = np.roll(np.eye(4), 1, axis=1) / 2 + np.eye(4) / 2, np.full((4, 4), 0.25)
    x = {X: torch.zeros(3, dtype=torch.float64)}
    for policy, each in (("average", 48), ("local", 24), ("reset", 24), ("quasi-global", 24)):
        method = Method(0.9, momentum_policy=policy)
        plan = Plan(method, LearningRate(0.1), 2, 4, 1, topology=dense(ring, everybody))
        sent = [plan.bytes_sent(t, 4, ClientState(x, x, {})) for t in range(3)]
        assert sent == [4 * each, 12 * each, 4 * each], policy


def test_round_job_carries_the_rows():
    problem = image_problem(num_clients=3)
    plan = Plan(Method(0.9), LearningRate(0.1), 2, 3, 5, topology=make_topology("ring", 3))
    job = round_job(problem, plan, beginning(problem, plan))
    assert all(len(v) == 3 for v in job.rows.params.values())
