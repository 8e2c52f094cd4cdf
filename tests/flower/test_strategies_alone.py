"""Our strategies without fedmom's round loop: driven by Flower, started again, and what clients refuse them."""

import pytest
import torch
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

from both_sides import QUADRATIC, by_engine
from clients.client_app import app as client_app
from fedmom.backends.trainer import warm_node
from fedmom.errors import ClientsFailedError
from fedmom.flower.wire import pack, unpack
from fedmom.method.algorithms import Method
from fedmom.method.decentralized.topology import make_topology
from fedmom.method.outer import OuterNumbers, OuterRule
from fedmom.method.state import flatten
from fedmom.method.states.rules import StateRule
from grids import LocalGrid, run_config
from laws import table
from strategies.dsgdm import DSGDM
from strategies.prsgdm import PRSGDM

# From 0.5, for Flower's clipping divides by how far a client went.
FROM_HALF = {**QUADRATIC, "data.start": "0.5", "run.num-rounds": 2}
LOCAL = {**FROM_HALF, "algorithm.momentum-policy": "local"}


def started(strategy, changes, num_rounds=2):
    """(x, u) after `start`."""
    keys = run_config(changes)
    start = pack(flatten(warm_node(keys).begin[0]))
    result = strategy.start(LocalGrid(client_app, 5, keys), start, num_rounds=num_rounds)
    found = unpack(result.arrays)
    return torch.cat([value for name, value in found.items() if name.startswith(("params/", "momentum/"))])


def wrapped(strategy):
    """As Flower drives it: configure_train and aggregate_train; nothing is clipped, and the noise is 0."""
    return DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, 1e6, num_sampled_clients=5)


OUTER = {
    "slowmo": ({"algorithm.slow-momentum": 0.5}, lambda: PRSGDM(5, slow_momentum=0.5)),
    "fedadam of x and u": (
        {"algorithm.outer": "fedadam", "algorithm.outer-states": "x,u"},
        lambda: PRSGDM(5, outer=OuterRule("fedadam", OuterNumbers(0.1, 0.9), ("x", "u"))),
    ),
}


@table("name", OUTER)
def test_the_outer_step_is_taken_once_whoever_drives_the_rounds(name):
    keys, make = OUTER[name]
    right = by_engine({**FROM_HALF, **keys})
    right = torch.cat([right.state_dict["x"], right.momentum["x"]])
    strategy = make()
    driven = wrapped(strategy)
    for found in (started(make(), FROM_HALF), started(driven, FROM_HALF), started(driven, FROM_HALF)):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=0)


def test_flower_goes_on_with_the_memory_that_a_caller_has_set():
    """Of round 1 too, by which Flower's own rounds begin again; γ and the minibatches do not change here."""
    _, make = OUTER["slowmo"]
    whole, half, rest = make(), make(), make()
    right = started(whole, FROM_HALF, 4)
    grid, start = of(FROM_HALF)
    first = half.start(grid, start, num_rounds=2)
    rest.memory = half.memory
    found = wrapped(rest).start(grid, first.arrays, num_rounds=2)
    torch.testing.assert_close(unpack(found.arrays)["params/x"], right[:1], rtol=1e-10, atol=0)


def of(changes):
    keys = run_config(changes)
    return LocalGrid(client_app, 5, keys), pack(flatten(warm_node(keys).begin[0]))


def test_a_second_start_begins_anew():
    strategy = PRSGDM(5, momentum_policy="local")
    first, second = started(strategy, LOCAL), started(strategy, LOCAL)
    assert torch.equal(first, second)
    assert torch.equal(first[:1], by_engine(LOCAL).state_dict["x"])


def test_a_start_takes_the_rows_that_a_caller_has_set_and_leaves_them_as_they_are():
    rows = {client: {"momentum/x": torch.full((1,), float(client), dtype=torch.float64)} for client in range(5)}
    strategy = PRSGDM(5, momentum_policy="local")
    strategy.own = rows
    first, second = started(strategy, LOCAL), started(strategy, LOCAL)
    assert torch.equal(first, second)
    assert not torch.allclose(first, started(PRSGDM(5, momentum_policy="local"), LOCAL))
    assert [rows[client]["momentum/x"].item() for client in range(5)] == [0, 1, 2, 3, 4]


def test_gradient_tracking_alone_is_what_it_is_defined_by():
    """y is averaged and g stays, whatever is said of the states of other optimizers."""
    rules = Method(0.9, momentum_policy="local", optimizer="gradient-tracking").rules
    assert (rules.of("y"), rules.of("g")) == (StateRule("average"), StateRule("local"))
    changes = {**QUADRATIC, "algorithm.name": "gradient-tracking", "algorithm.topology": "ring", "run.num-rounds": 3}
    strategy = DSGDM(make_topology("ring", 5), Method(0.9, momentum_policy="local", optimizer="gradient-tracking"))
    found = strategy.start(*of(changes), num_rounds=3)
    torch.testing.assert_close(unpack(found.arrays)["params/x"], by_engine(changes).state_dict["x"])


REFUSED = {
    "several policies": (1, {"algorithm.optimizer": "adamw", "algorithm.states": "m: local; v: average"}, "states"),
    "a period": (2, {"algorithm.states": "u: average every 2"}, "states"),
    "an I that changes": (1, {"algorithm.interval": "decaying", "algorithm.interval-milestones": "0.5"}, "interval"),
}


@table("name", REFUSED)
def test_what_needs_the_round_loop_is_refused_by_key(name):
    number, changes, key = REFUSED[name]
    reason = rf"round {number}: client \d, .* algorithm\.{key} = .*round loop"
    for policy in ("average", "local") if number == 1 and key == "states" else ("average",):
        with pytest.raises(ClientsFailedError, match=reason):
            started(PRSGDM(5, momentum_policy=policy), {**FROM_HALF, **changes})


def test_another_policy_than_the_strategys_is_refused_by_key():
    with pytest.raises(ClientsFailedError, match=r"momentum-policy = 'local'; .* needs the same momentum_policy"):
        started(PRSGDM(5), LOCAL)
