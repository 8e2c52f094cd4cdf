"""States with a period each, other optimizers and outer steps: every backend comes to what a plain loop comes to."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from test_backends import (  # noqa: F401  # a fixture
    BASE,
    WAYS,
    Begun,
    backend,
    backends,
    close,
    flattened,
    on_flower,
)

import oracle
import periods
from both_sides import QUADRATIC, by_engine
from clients.client_app import app as client_app
from fedmom.config.build import make_plan, make_problem
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.errors import ClientsFailedError
from fedmom.flower.wire import pack
from fedmom.method.outer import OuterNumbers, OuterRule
from fedmom.rounds.plan import cohort
from grids import LocalGrid, run_config
from strategies.prsgdm import PRSGDM

GOSSIP = [name for name, way in WAYS.items() if way.gossip]
OUTERS = {
    "nesterov": periods.nesterov(0.7, 0.9),
    "fedadam": periods.adaptive(0.1, 0.9, 0.99, 1e-3, yogi=False),
    "slowmo": periods.slowmo(1.0, 0.9),
}


def world_of(begun):
    """The plain loop's words for a run of the oracle's squares."""
    config, problem, plan = begun.config, begun.problem, begun.plan
    keys, sizes, data = config.algorithm, problem.sizes, oracle.examples()
    steps = plan.steps_of(sizes).tolist()

    def gradient(x, buffers, client, t):
        rows = problem.sampler.draw(torch.tensor([client]), torch.tensor([t]), 1)[0, 0].numpy()
        g, loss = oracle.gradient(x["w"], data["x_train"][rows], data["y_train"][rows])
        return {"w": g}, loss, buffers

    rules = dict.fromkeys(("u", "m", "v"), periods.Rule(keys.momentum_policy))
    rules |= {state: periods.Rule(rule.policy, rule.period) for state, rule in plan.method.states.items()}
    return periods.World(
        {"w": flattened(problem.start().params)},
        sizes.tolist() if keys.client_weights == "samples" else [1.0] * len(sizes),
        steps,
        gradient,
        lambda number: keys.lr,
        rules,
        keys.beta,
        keys.beta2,
        keys.eps,
        keys.weight_decay,
        keys.nesterov,
        keys.optimizer,
        outer=OUTERS.get(keys.outer),
        outer_states=[word.strip() for word in keys.outer_states.split(",")],
        W=None if plan.topology is None else lambda number: plan.topology.at(number - 1).dense(),
    )


def of_state(tree, state):
    """A state's tensors as the oracle has them; a clock has the weight's and the bias's, which are equal."""
    if state.endswith(".clock"):
        both = [tree[f"{state}/linear.{name}"].numpy() for name in ("weight", "bias")]
        assert (both[0] == both[1]).all()
        return both[0]
    prefix = "" if state in ("x", "u") else f"{state}/"
    return flattened({name: tree[prefix + name] for name in ("linear.weight", "linear.bias")})


def assert_periods(begun, absent=()):
    """x of everybody, and all that clients go on with, after every round; losses and both distances.

    absent: (round, client) of whoever was asked and did not answer.
    """
    world, plan, rounds = world_of(begun), begun.plan, list(begun.rounds())
    sizes = begun.problem.sizes
    ids = [cohort(len(sizes), plan.cohort_size, plan.seed, number).tolist() for number in range(plan.num_rounds)]
    assert all(client in ids[number - 1] for number, client in absent)
    ids = [[c for c in some if (number, c) not in absent] for number, some in enumerate(ids, 1)]
    for number, (want, (new, record)) in enumerate(zip(periods.rounds(world, ids), rounds, strict=True), 1):
        close(flattened(new.state.params), want.mean["x", "w"])
        own = new.rows or new.own
        for state, _ in want.mean:
            part, right = "params" if state == "x" else "momentum", np.array([row[state, "w"] for row in want.clients])
            prefix = "" if state in ("x", "u") else f"{state}/"
            rule = world.rules.get(state.partition(".")[0], periods.Rule())
            if own is not None and f"{prefix}linear.bias" in getattr(own, part):
                close(of_state(getattr(own, part), state), right)
                continue
            assert number % rule.every == 0
            common = of_state(getattr(new.state, part), state)
            close(np.broadcast_to(common if rule.policy != "reset" else 0 * common, right.shape), right)
        weights = np.array([world.weights[c] for c in ids[number - 1]])
        close(record["train_loss"], weights @ np.array(want.losses) / weights.sum(), 1e-11)
        if world.W is None or len(ids[number - 1]) == len(sizes):  # under Algorithm 2 it is of all rows, old ones too
            told = dict(zip(("consensus_distance", "momentum_spread"), want.spreads, strict=True))
            missing = told.keys() - record.keys()  # of what did not travel nobody knows it
            assert not missing or begun.config.server.own_rows == "nodes"
            for name in told.keys() & record.keys():
                close(record[name], told[name], 1e-11)
    return rounds


ADAMW = {"algorithm.optimizer": "adamw", "algorithm.beta2": 0.9, "algorithm.weight-decay": 0.1, "algorithm.eps": 1e-3}
SOME = {"algorithm.cohort-size": 3, "algorithm.client-weights": "samples", "run.num-rounds": 4}
PERIODS = {"algorithm.states": "x: average every 2; u: average every 3", **SOME}
STEPPED = {"algorithm.states": "x: average every 2; u: reset every 2", **SOME, "algorithm.outer": "fedadam"}
AVERAGED = [
    {"algorithm.states": "u: average every 2", **SOME},
    PERIODS,
    {**ADAMW, "run.num-rounds": 3, "algorithm.states": "m: average every 2; v: local", "data.num-clients": 2},
    {**ADAMW, **SOME, "algorithm.momentum-policy": "local"},
    {**ADAMW, **SOME, "run.num-rounds": 2, "algorithm.beta2": 0.99},  # all averaged
    STEPPED,
    {"algorithm.outer": "nesterov", "algorithm.outer-states": "x, u", "run.num-rounds": 3},
]
MIXED = [
    {"algorithm.states": "x: average every 2; u: average every 2", "run.num-rounds": 3},  # a round with nothing to send
    {**ADAMW, "algorithm.states": "m: average every 2; v: average", "run.num-rounds": 3, "data.num-clients": 2},
    {**ADAMW, "algorithm.states": "x: average every 2; m: local; v: reset every 3", "run.num-rounds": 4},
]


@backends("loop", "flower", "nodes", "workers", "simulation")
def test_averages_by_policy_and_period(backend):  # noqa: F811
    """Cohorts that change, with weights. The engine's other paths are held to the same loop in test_states.py."""
    for changes in AVERAGED:
        begun = backend(changes)
        rounds = assert_periods(begun)
        assert any(new.own is not None for new, _ in rounds) == begun.plan.method.rules.has_rows


@backends(*GOSSIP)
def test_mixing_by_policy_and_period(backend):  # noqa: F811
    for changes in MIXED:
        assert_periods(backend(changes))


def test_who_does_not_answer_goes_on_from_where_it_was():
    """Under `proceed`, between two exchanges of x and of u, in one and after it; likewise when the server relays."""
    for name, changes, absent in (
        (
            "flower",
            {**PERIODS, "algorithm.cohort-size": 5, "run.num-rounds": 6},
            [(1, 2), (2, 4), (3, 2), (4, 0), (6, 1)],
        ),
        ("nodes", {**STEPPED, "algorithm.cohort-size": 5}, [(1, 0), (2, 1), (3, 1)]),
        ("relay", {**MIXED[2], "algorithm.topology": "ring"}, [(2, 3), (3, 3)]),
    ):
        keys = {**BASE, **WAYS[name].changes, **changes, "server.on-failure": "proceed"}
        keys |= {"algorithm.name": "d-sgd-m"} if name == "relay" else {}
        config = resolve(load(keys)).config
        problem, plan = make_problem(config, "cpu"), make_plan(config)
        made = on_flower(config, problem, plan, 5)

        def fault(message, node, absent=absent):
            if message.metadata.message_type != "train":
                return None
            gone = (message.content["config"]["server-round"], node["partition-id"]) in absent
            return ValueError("broken") if gone else None

        made.grid.fault = fault
        begun = Begun(config, problem, plan, made)
        if plan.topology is not None:
            whole = plan.topology.at

            def without(number, whole=whole, absent=absent):
                gone = {client for when, client in absent if when == number + 1}
                links = zip(whole(number).sources.tolist(), whole(number).targets.tolist(), strict=True)
                return whole(number).without([(j, i) for j, i in links if j != i and {i, j} & gone])

            begun.plan = plan._replace(topology=SimpleNamespace(at=without))
        rounds = assert_periods(begun, absent)
        assert [record.get("num_failed", 0) for _, record in rounds] == [
            sum(when == number for when, _ in absent) for number in range(1, plan.num_rounds + 1)
        ]


def test_what_a_client_has_of_its_own_is_refused_where_nobody_asked_for_it():
    """In round 2 all is exchanged: whose reply has a row all the same would go on from it."""
    keys = {**BASE, **WAYS["flower"].changes, "algorithm.states": "x: average every 2; u: average every 2"}
    config = resolve(load(keys)).config
    problem, plan = make_problem(config, "cpu"), make_plan(config)
    made = on_flower(config, problem, plan, 5)

    def fault(message, node):
        second = message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2

        def stray(reply):
            reply.content["own"] = pack({"momentum/linear.bias": torch.zeros(1, 3, dtype=torch.float64)})
            return reply

        return stray if second and node["partition-id"] == 3 else None

    made.grid.fault = fault
    rounds = Begun(config, problem, plan, made).rounds()
    next(rounds)
    with pytest.raises(ClientsFailedError, match=r"client 3, .*own tensors has an unknown momentum/linear\.bias"):
        next(rounds)


def test_the_strategy_alone_takes_the_outer_step():
    """PRSGDM.start without fedmom's round loop: x and u, each moved; and with what it remembers it goes on."""
    keys = {**QUADRATIC, "run.num-rounds": 5}
    numbers = {"algorithm.outer": "fedadam", "algorithm.outer-states": "x,u", "algorithm.outer-lr": 0.5}
    right = by_engine({**keys, **numbers})
    rule = OuterRule("fedadam", OuterNumbers(0.5, 0.9, 0.99, 1e-3), ("x", "u"))
    one, memory = ArrayRecord({f"{part}/x": Array(np.zeros(1)) for part in ("params", "momentum")}), None
    for first, last in ((1, 2), (3, 5)):
        strategy = PRSGDM(5, outer=rule)
        grid = LocalGrid(client_app, 2, run_config(keys))
        one = strategy.start(grid, one, num_rounds=last, first_round=first, memory=memory).arrays
        memory = strategy.memory
    found = one.to_torch_state_dict()
    close(found["params/x"], right.state_dict["x"])
    close(found["momentum/x"], right.momentum["x"])
