"""A named method among the other keys: what it sets, what wins over it, and what has no meaning beside it."""

import pytest
from test_presets import Q

from fedmom.backends.trainer import settled
from fedmom.config.build import make_plan
from fedmom.config.load import Loaded, flat, load
from fedmom.config.resolve import resolve
from fedmom.errors import InputError
from fedmom.method.algorithms import ALGORITHMS
from laws import table


def resolved(changes):
    return resolve(load({**Q, **changes}))


def test_a_resolved_preset_stays_as_it_is_also_through_flowers_run_config():
    for name in ALGORITHMS:
        for more in ({}, {"algorithm.beta": 0.5}, {"algorithm.momentum-policy": "reset"}, {"algorithm.cohort-size": 2}):
            changes = {"algorithm.name": name, "algorithm.num-local-steps": 1, **more}
            if ALGORITHMS[name].decentralized and more:
                continue
            once = resolved(changes).config
            assert resolve(load(once)).config == once, (name, more)
            assert settled(flat(once)).config == once, (name, more)


def test_a_preset_with_another_optimizer_stays_so_whoever_resolves_it_again():
    """A recorded configuration is resolved with nothing given."""
    for name in [name for name, row in ALGORITHMS.items() if row.sets and not row.decentralized]:
        for optimizer in ("adamw", "adam", "lion", "adagrad"):
            try:
                once = resolved({"algorithm.name": name, "algorithm.optimizer": optimizer}).config
            except InputError:
                assert name in ("fednova", "fedcm", "mime-lite")
                continue
            again = resolve(Loaded(once, frozenset())).config
            assert again == once, (name, optimizer)
            assert again.algorithm.optimizer == optimizer


def test_a_name_without_momentum_leaves_adams_beta_alone():
    assert resolved({"algorithm.name": "scaffold", "algorithm.optimizer": "adamw"}).config.algorithm.beta == 0.9
    assert resolved({"algorithm.name": "fedadam", "algorithm.optimizer": "adamw"}).config.algorithm.beta == 0.9
    states = resolved({"algorithm.name": "des-loc", "algorithm.optimizer": "sgd"}).config.algorithm.states
    assert states == "x: average every 1; u: average every 3"
    found = resolved({"algorithm.name": "slowmo", "algorithm.outer": "nesterov"})
    assert (found.config.algorithm.slow_momentum, "outer = 'nesterov' over slow-momentum" in found.notes[0]) == (
        0,
        True,
    )
    notes = resolved({"algorithm.name": "slowmo", "algorithm.outer-lr": 0.5}).notes
    assert "SlowMo's short form reads slow-momentum and slow-lr alone" in notes[0]


def test_an_lr_that_is_sgds_is_said():
    keys = {"algorithm.name": "local-adam", "data.num-clients": 3}
    assert "algorithm.lr = 0.05: is SGD's default" in resolve(load(keys)).notes[0]
    assert not resolve(load({**keys, "algorithm.lr": 0.05})).notes


@table(
    "changes, words",
    [
        ({"algorithm.name": "local-sgd", "algorithm.optimizer": "adamw"}, "local-sgd is SGD with β = 0"),
        ({"algorithm.name": "d-sgd-m-qg", "algorithm.optimizer": "adamw"}, "d-sgd-m-qg is an optimizer itself"),
        (
            {"algorithm.name": "gradient-tracking", "algorithm.momentum-policy": "local"},
            "gradient-tracking is defined by y: average every 1; g: local",
        ),
        ({"algorithm.name": "mime-lite", "algorithm.codecs": "u: int8"}, "u is the gradient and does not travel"),
        (
            {"algorithm.name": "fedavgm", "algorithm.outer-states": "x,u"},
            "with β = 0 u is the last gradient and does not travel",
        ),
    ],
)
def test_what_a_name_leaves_no_room_for_is_one_line(changes, words):
    with pytest.raises(InputError, match=words):
        resolved({"algorithm.num-local-steps": 1, **changes})


def test_what_wins_over_a_name_is_told():
    rows = [
        ("fedprox", {}, {"beta": 0.0, "prox_mu": 0.01}, ""),
        ("fedprox", {"algorithm.beta": 0.5}, {"beta": 0.5}, "the configuration's beta = 0.5 over 0.0 wins"),
        (
            "scaffold",
            {"algorithm.beta": 0.9},
            {"beta": 0.0},
            "has beta = 0.0: beta = 0.9 is the key's default",
        ),
        ("fedcm", {"algorithm.beta": 0.5}, {"beta": 0.0}, "fedcm is β = 0: it overrules beta = 0.5"),
        ("mime-lite", {"algorithm.beta": 0.5}, {"beta": 0.5}, ""),
        ("fednova", {}, {"beta": 0.0, "states": "x: average every 1; u: reset every 1"}, ""),
        ("local-adam", {"algorithm.optimizer": "adam"}, {"optimizer": "adam"}, "optimizer = 'adam' over 'adamw' wins"),
        ("des-loc", {"algorithm.states": "v: average every 4"}, {"optimizer": "adamw"}, "v: average every 4 over"),
        ("local-sgd", {"algorithm.prox-mu": 1.0}, {}, "local-sgd does not read algorithm.prox-mu: it changes nothing"),
        ("fedprox", {"algorithm.fedcm-alpha": 1.0}, {}, "fedprox does not read algorithm.fedcm-alpha"),
        (
            "gradient-tracking",
            {"algorithm.beta": 0.5},
            {"optimizer": "gradient-tracking"},
            "does not read algorithm.beta",
        ),
    ]
    for name, changes, keys, words in rows:
        found = resolved({"algorithm.name": name, "algorithm.num-local-steps": 1, **changes})
        assert all(getattr(found.config.algorithm, key) == value for key, value in keys.items()), name
        assert any(words in note for note in found.notes) if words else not found.notes, (name, found.notes)


SIMULATED = {"run.backend": "simulation", "server.strategy": "fedavg"}
REFUSED = [
    ("scaffold", {"algorithm.correction": "memory:Scaffold"}, "scaffold is a correction itself"),
    ("fedprox", {"algorithm.correction": "memory:proximal"}, "fedprox is a correction itself"),
    ("fedprox", {"algorithm.prox-mu": 0}, "algorithm.prox-mu = 0.*must be a number > 0"),
    ("fedcm", {"algorithm.fedcm-alpha": 0}, r"algorithm.fedcm-alpha = 0.*must be in \(0, 1\]"),
    ("scaffold", {"algorithm.states": "x: average every 2"}, "x every 2: scaffold"),
    ("fednova", {"algorithm.states": "x: average every 2"}, "x every 2: fednova"),
    ("fedcm", {"algorithm.optimizer": "adamw"}, "algorithm.optimizer = 'adamw': fedcm needs 'sgd'"),
    ("mime-lite", {"algorithm.optimizer": "lion"}, "algorithm.optimizer = 'lion': mime-lite needs 'sgd'"),
    ("mime-lite", {"algorithm.nesterov": True}, "algorithm.nesterov = True: mime-lite"),
    ("fednova", {"algorithm.optimizer": "adam"}, "algorithm.optimizer = 'adam': fednova needs 'sgd'"),
    ("fednova", {"algorithm.beta": 0.5, "algorithm.momentum-policy": "local"}, "fednova counts steps from u = 0"),
    ("fednova", {"algorithm.beta": 0.5, "algorithm.states": "u: average every 1"}, "fednova counts steps from u = 0"),
    ("fedcm", SIMULATED, "server.strategy = 'fedavg': fedcm has a state at the server"),
    ("fednova", SIMULATED, "server.strategy = 'fedavg': fednova is an average of its own"),
    ("gradient-tracking", {"algorithm.optimizer": "adamw"}, "gradient-tracking is an optimizer itself"),
    ("gradient-tracking", {"algorithm.outer": "fedavgm"}, "there is no server"),
]


@table("name, changes, words", REFUSED)
def test_what_has_no_meaning_is_one_line(name, changes, words):
    with pytest.raises(InputError, match=words) as error:
        make_plan(resolved({"algorithm.name": name, "algorithm.num-local-steps": 1, **changes}).config)
    assert "\n" not in str(error.value)
