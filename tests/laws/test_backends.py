"""The laws of a round, the same for every backend: whoever runs it, it comes to what a naive loop comes to."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from clients.client_app import app as client_app
from fedmom.backends.local import make_backend
from fedmom.config.build import make_plan, make_problem, pool_options
from fedmom.config.keys import Config
from fedmom.config.load import flat, load
from fedmom.config.resolve import resolve
from fedmom.errors import ClientsFailedError, DivergedError
from fedmom.flower.grid import RayGrid
from fedmom.method.states.policies import MOMENTUM_POLICIES
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, RunState, beginning, cohort
from fedmom.rounds.round import Backend, Outcome
from fedmom.tasks.problem import Problem
from grids import LocalGrid
from strategies.server_app import make_backend as flower_backend

ROOT = Path(__file__).parents[2]
BASE = {
    "data.dataset": "oracle:examples",
    "data.partition": "quantity",
    "data.num-clients": 5,
    "data.batch-size": 2,
    "model.name": "oracle:squares",
    "algorithm.num-local-steps": 3,
    "algorithm.lr": 0.1,
    "run.num-rounds": 2,
    "run.dtype": "float64",
    "run.seed": 4,  # with clients of a single example, and of 20
    "engine.chunk-size": 2,
    "simulation.num-actors": 2,
    "simulation.num-cpus": 0.25,
}
# W changes from round to round, is directed, and leaves somebody out.
GOSSIP = {"algorithm.name": "d-sgd-m", "algorithm.topology": "one-peer-exponential"}


def on_flower(config: Config, problem: Problem, plan: Plan, num_nodes: int) -> Backend:
    return flower_backend(LocalGrid(client_app, num_nodes, flat(config)), None, config, problem, plan)


def on_simulation(config: Config, problem: Problem, plan: Plan, num_nodes: int) -> Backend:
    grid = RayGrid(
        "clients.client_app:app",
        app_dir=ROOT,
        num_nodes=num_nodes,
        run_config=flat(config),
        options=pool_options(config),
    )
    backend = flower_backend(grid, None, config, problem, plan)
    backend.close = grid.close  # whoever made the Grid ends it
    return backend


def of_config(config: Config, problem: Problem, plan: Plan, num_nodes: int) -> Backend:
    return make_backend(config, problem, plan)


@dataclass(frozen=True)
class Way:
    """How a backend is made, and what it can."""

    changes: Mapping[str, Any]
    make: Callable[[Config, Problem, Plan, int], Backend] = of_config
    gossip: bool = False  # Algorithm 2
    blames: bool = False  # whether it refuses what a client answers, by the client's number
    workers: Callable[[Backend], list[int]] | None = None  # process ids of those that it works by
    replaces: bool = False  # whether a dead worker's work is done by another


def pool_pids(backend) -> list[int]:
    return backend.pool.worker_pids()


def grid_pids(backend) -> list[int]:
    return backend.grid._pool.worker_pids()


def peer_pids(backend) -> list[int]:
    import ray

    return ray.get([peer.__ray_call__.remote(lambda self: os.getpid()) for peer in backend.peers])


WORKERS = {"engine.path": "loop", "engine.workers": 2}
WAYS = {
    "loop": Way({"engine.path": "loop"}),
    "vmap": Way({"engine.path": "vmap"}),
    "stack": Way({"engine.path": "stack"}),
    "factors": Way({"engine.path": "factors"}),
    "gossip": Way({"engine.path": "vmap"}, gossip=True),
    "flower": Way({"engine.path": "loop", "server.own-rows": "server"}, on_flower, blames=True),
    "nodes": Way({"engine.path": "loop", "server.own-rows": "nodes"}, on_flower, blames=True),
    "relay": Way({"engine.path": "loop"}, on_flower, gossip=True, blames=True),
    "workers": Way(WORKERS, workers=pool_pids, replaces=True),
    "peers": Way(WORKERS, gossip=True, workers=peer_pids),
    "simulation": Way({"engine.path": "loop"}, on_simulation, blames=True, workers=grid_pids, replaces=True),
}
ON_RAY = [name for name, way in WAYS.items() if way.workers]
marked = {name: (pytest.mark.slow, pytest.mark.xdist_group("Ray: rounds")) for name in ON_RAY}


def backends(*names: str) -> pytest.MarkDecorator:
    """Those of these names run the test; left out, all do."""
    return pytest.mark.parametrize(
        "backend", [pytest.param(name, marks=marked.get(name, ())) for name in names or WAYS], indirect=True
    )


ALGORITHM_1 = [name for name, way in WAYS.items() if not way.gossip]


@dataclass
class Begun:
    """A run that waits for its first round."""

    config: Config
    problem: Problem
    plan: Plan
    backend: Backend
    outcomes: list[Outcome] = field(default_factory=list)

    def rounds(self, done: RunState | None = None, progress=None):
        """All rounds, each as the gathered state after it and its record; their outcomes are kept."""
        kept, run_round = self, self.backend.run_round

        class Kept(Backend):
            def run_round(self, start, job, progress=None):
                kept.outcomes.append(run_round(start, job, progress))
                return kept.outcomes[-1]

        for new, record in run_rounds(
            self.problem, self.plan, Kept(), done or beginning(self.problem, self.plan), progress
        ):
            yield new.gathered(), record


@pytest.fixture
def backend(request):
    """The backend of a name: f(changes, nodes of a Grid) begins a run on it, which ends with the next or the test."""
    way = WAYS[request.param]
    if way.workers:
        request.getfixturevalue("one_ray")
    with contextlib.ExitStack() as ends:

        def begin(changes: Mapping[str, Any] | None = None, num_nodes: int = 2) -> Begun:
            ends.close()  # of the one before
            keys = {**BASE, **way.changes, **(GOSSIP if way.gossip else {}), **(changes or {})}
            config = resolve(load(keys)).config
            problem, plan = make_problem(config, "cpu"), make_plan(config)
            made = way.make(config, problem, plan, min(num_nodes, config.data.num_clients))
            for _ in range(2):  # to close it twice does no harm
                ends.callback(made.close)
            assert made.settled.get("engine.path", keys["engine.path"]) == keys["engine.path"]
            return Begun(config, problem, plan, made)

        begin.way = way
        yield begin


def flattened(params: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Weights [..., K, d] and bias [..., K] as the oracle has them."""
    weight, bias = (params[name].numpy() for name in ("linear.weight", "linear.bias"))
    return np.concatenate([weight, bias[..., None]], -1)


def naive(begun: Begun):
    """What each round must come to: (who takes part, examples seen so far over all there are, oracle.Came)."""
    config, problem, plan = begun.config, begun.problem, begun.plan
    algorithm, sizes = config.algorithm, problem.sizes
    settings = oracle.Settings(algorithm.beta, algorithm.nesterov, algorithm.momentum_policy)
    steps = [algorithm.local_epochs * -(-n // config.data.batch_size) or algorithm.num_local_steps for n in sizes]
    state, data, seen = oracle.start(flattened(problem.start().params), len(sizes)), oracle.examples(), 0
    for number in range(config.run.num_rounds):
        ids = cohort(len(sizes), plan.cohort_size, plan.seed, number)
        draws = [problem.sampler.draw(*torch.tensor([[c], [number * steps[c]]]), steps[c])[0].numpy() for c in ids]
        weights = [sizes[c] if algorithm.client_weights == "samples" else 1.0 for c in ids]
        W = None if plan.topology is None else plan.topology.at(number).dense()
        came = oracle.one_round(settings, state, oracle.Round(ids, weights, draws, algorithm.lr, W), data)
        state = came.state
        seen += sum(steps[c] for c in ids) * config.data.batch_size
        yield ids, seen / sum(sizes), came


def close(got, want, tolerance=1e-12) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


def assert_naive(begun: Begun, rounds=None) -> None:
    """Model, momentum, the clients' own, losses and both distances, after every round."""
    wanted = list(naive(begun))
    done = list(begun.rounds() if rounds is None else rounds)
    for (ids, epochs, want), (new, record), outcome in zip(wanted, done, begun.outcomes, strict=True):
        close(flattened(new.state.params), want.state.x)
        close(flattened(new.state.momentum), want.state.u)
        if new.rows is not None:
            close(flattened(new.rows.params), want.state.own_x)
            close(flattened(new.rows.momentum), want.state.own_u)
        if new.own is not None:
            close(flattened(new.own.momentum), want.state.own_u)
        close(outcome.losses, want.losses)
        assert record["num_clients"] == len(ids)
        close(record["joint_epochs"], epochs)
        # Where nodes keep what is not sent, nobody knows how far apart it is.
        unseen = {"momentum_spread"} if begun.config.server.own_rows == "nodes" else set()
        assert {"train_loss", "consensus_distance", "momentum_spread"} - unseen <= record.keys()
        for name in ("train_loss", *({"consensus_distance", "momentum_spread"} & record.keys())):
            close(record[name], getattr(want, name), 1e-11)


@backends()
def test_rounds_are_the_naive_loops(backend):
    """Both options, several steps, and the smallest numbers of clients; on Ray, where each costs seconds, many."""
    for num_clients, nesterov in ((5, True),) if backend.way.workers else ((5, True), (1, True), (2, False)):
        assert_naive(backend({"data.num-clients": num_clients, "algorithm.nesterov": nesterov}))


@backends(*ALGORITHM_1)
def test_a_cohort_alone_trains_is_weighed_and_keeps_its_momentum(backend):
    """Cohorts that change, of which ids and places differ; whoever is away keeps the u it had."""
    for policy in ("local",) if backend.way.workers else ("local", "average"):
        changes = {"algorithm.cohort-size": 3, "algorithm.momentum-policy": policy, "run.num-rounds": 3}
        begun = backend({**changes, "algorithm.client-weights": "samples"})
        cohorts = [cohort(5, 3, begun.plan.seed, number).tolist() for number in range(3)]
        assert len({*map(tuple, cohorts)}) == 3
        assert [0, 1, 2] not in cohorts
        assert len({*begun.problem.sizes.tolist()}) > 2
        assert_naive(begun)


@backends(*ALGORITHM_1)
def test_clients_take_as_many_steps_as_their_epochs_have(backend):
    begun = backend({"algorithm.num-local-steps": 0, "algorithm.local-epochs": 1})
    assert len({*begun.plan.steps_of(begun.problem.sizes).tolist()}) > 2
    assert_naive(begun)


@backends()
def test_every_momentum_policy_means_the_same(backend):
    """But the first one, which has the rounds above."""
    gossip = backend.way.gossip
    policies = [name for name, policy in MOMENTUM_POLICIES.items() if gossip or not policy.gossip_only]
    assert policies == ["average", "local", "reset", *["quasi-global"] * gossip]
    for policy in policies[1:]:
        steps = 1 if MOMENTUM_POLICIES[policy].one_step else 2
        changes = {"algorithm.momentum-policy": policy, "algorithm.num-local-steps": steps}
        # Alone, and with a worker for each of two clients.
        num_clients = {"local": 5, "reset": 1 if gossip else 2, "quasi-global": 2}[policy]
        assert_naive(backend({**changes, "data.num-clients": num_clients, "algorithm.nesterov": policy == "local"}))


@backends()
def test_a_number_that_is_not_finite_stops_the_run_and_is_one_clients(backend):
    """A client whose numbers overflow in round 2 spoils no other's, and the error names it or the losses do."""
    begun = backend({"data.dataset": "oracle:poisoned"}, 5)
    draws = begun.problem.sampler.draw(torch.arange(5), torch.zeros(5, dtype=torch.int64), 6)
    ((spoiled, step, _),) = (draws == oracle.POISON).nonzero().tolist()
    assert step == 3  # its first in round 2; in round 1 a path that cannot be compared would be given up
    rounds = begun.rounds()
    next(rounds)
    if backend.way.blames:
        with pytest.raises(ClientsFailedError, match=rf"^round 2: client {spoiled}, .*NaN or infinite"):
            next(rounds)
        return
    with pytest.raises(DivergedError, match=r"became nan in round 2 at lr = 0\.1: try a smaller lr"):
        next(rounds)
    finite = begun.outcomes[-1].losses.isfinite().tolist()
    assert finite == [client != spoiled for client in range(5)]


@backends(*ON_RAY)
def test_killed_workers_change_nothing_or_stop_the_run_by_name(backend):
    """All of them, at the first answer of the second round, with the others' under way."""
    begun = backend()
    killed: list[int] = []

    def kill(steps: int) -> None:
        if len(begun.outcomes) == 1 and not killed:
            killed.extend(backend.way.workers(begun.backend))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    rounds = begun.rounds(progress=kill)
    first = next(rounds)
    while len(backend.way.workers(begun.backend)) < 2:  # or one might be killed that has yet to start
        time.sleep(0.05)
    if backend.way.replaces:
        assert_naive(begun, [first, *rounds])
    else:
        with pytest.raises(ClientsFailedError, match=r"^round 2: clients 0 … 2: their Ray actor died"):
            next(rounds)
    assert len(killed) == 2


@backends(*ON_RAY)
def test_who_ends_a_backend_ends_its_workers_and_not_the_ray_that_it_joined(backend):
    import ray

    begun = backend()
    next(begun.rounds())
    pids = backend.way.workers(begun.backend)
    assert pids
    for _ in range(2):
        begun.backend.close()
    assert ray.is_initialized()
    for pid in pids:
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)
