"""The keys of states, optimizers and outer steps: what is wrong is one line: the key, the value and what is right."""

import random
import re

import pytest

from fedmom.config.build import make_plan
from fedmom.config.load import flat, load
from fedmom.config.method.states import parse_states, written
from fedmom.config.resolve import resolve
from fedmom.errors import InputError
from fedmom.method.states.rules import StateRule
from laws import table

FORM = 'must be "STATE: POLICY every ROUNDS" by semicolons'
GOSSIP = {"name": "d-sgd-m"}
ADAMW = {"optimizer": "adamw"}
WRONG = [
    ({"states": "w: average"}, "states = 'w: average': optimizer 'sgd' has no state 'w'; it has x, u"),
    ({"states": "m: average"}, "states = 'm: average': optimizer 'sgd' has no state 'm'; it has x, u"),
    ({**ADAMW, "states": "u: local"}, "states = 'u: local': optimizer 'adamw' has no state 'u'; it has x, m, v"),
    ({"states": "u: mean"}, "states: the policy of u = 'mean' is not known: choose one of average, local, reset"),
    ({"states": "u: averag"}, "states: the policy of u = 'averag' is not known: did you mean average?"),
    ({"states": "u"}, f"states = 'u': 'u' {FORM}"),
    ({"states": "x: average; u every 2"}, f"states = 'x: average; u every 2': 'u every 2' {FORM}"),
    ({"states": "u: average every"}, f"states = 'u: average every': 'u: average every' {FORM}"),
    ({"states": "u: average every 1.5"}, f"'u: average every 1.5' {FORM}"),
    ({"states": "u: average every -1"}, f"'u: average every -1' {FORM}"),
    ({"states": "u: average every 0"}, "u every 0: a period must be a number of rounds from 1 to 2147483647"),
    ({"states": f"u: average every {2**31}"}, f"u every {2**31}: a period must be a number of rounds from 1 to"),
    (
        {"states": f"u: average every {'9' * 5000}"},
        "u every 9999999999…: a period must be a number of rounds",
    ),
    (
        {"states": f"u: average every {'0' * 19}1{'0' * 5000}"},
        "u every 0000000000…: a period must be a number of rounds",
    ),
    ({"states": " ; "}, "states = ' ; ': names no state"),
    ({"states": "u: local; u: reset"}, "states = 'u: local; u: reset': names u twice; name it once"),
    ({"states": "x: local"}, "states = 'x: local': x is local; x can be averaged alone"),
    ({"states": "x: reset every 2"}, "x is reset; x can be averaged alone, as in 'x: average every 2'"),
    ({"states": "u: local every 2"}, "u: local is never exchanged, so it has no period; leave 'every' out"),
    ({"states": "u: quasi-global"}, "states = 'u: quasi-global': needs algorithm.name = 'd-sgd-m'"),
    (
        {**ADAMW, **GOSSIP, "states": "v: quasi-global"},
        "quasi-global is of u, the momentum of SGD; v has average, local",
    ),
    (
        {**GOSSIP, "states": "x: average every 2; u: quasi-global"},
        "quasi-global follows x, which must be mixed in every",
    ),
    (
        {"momentum-policy": "local", "states": "u: reset"},
        "states = 'u: reset': u is reset, and algorithm.momentum-policy = 'local' says otherwise; give one",
    ),
    ({**ADAMW, "nesterov": True}, "nesterov = True: is option II of SGD, and optimizer = 'adamw' has none; set false"),
    ({"optimizer": "gradient-tracking"}, "optimizer = 'gradient-tracking': needs algorithm.name = 'd-sgd-m'"),
    (
        {**GOSSIP, "optimizer": "gradient-tracking", "states": "y: local"},
        "gradient-tracking is defined by y: average every 1; g: local; leave it out",
    ),
    ({**GOSSIP, "outer": "nesterov"}, "outer = 'nesterov': with d-sgd-m there is no server; leave it 'none'"),
    ({"outer": "nesterov", "slow-momentum": 0.5}, "outer = 'nesterov': slow-momentum and slow-lr are SlowMo's"),
    ({"outer": "slowmo", "slow-lr": 0.5}, "outer = 'slowmo': slow-momentum and slow-lr are SlowMo's"),
    ({"outer": "sgd"}, "outer = 'sgd' is not known: choose one of none, slowmo, fedavgm, nesterov, fedadam, fedyogi"),
    ({"outer": "fedadam", "outer-states": ""}, "outer-states = '': must name states by commas, such as 'x'"),
    ({"outer": "fedadam", "outer-states": " , "}, "outer-states = ' , ': must name states by commas, such as 'x'"),
    (
        {"outer": "fedadam", "outer-states": "x, m"},
        "outer-states = 'x, m': optimizer 'sgd' has no state 'm'; name x, u",
    ),
    ({**ADAMW, "outer": "fedavgm", "outer-states": "x,v"}, "outer-states = 'x,v': v must stay positive"),
    ({"optimizer": "adagrad", "outer": "fedavgm", "outer-states": "v"}, "v must stay positive, which no outer step"),
    (
        {**ADAMW, "states": "m: local", "outer": "fedavgm", "outer-states": "m"},
        "outer-states = 'm': m is local, and an outer step moves an average",
    ),
    (
        {"momentum-policy": "reset", "outer": "fedavgm", "outer-states": "x,u"},
        "outer-states = 'x,u': u is reset, and an outer step moves an average",
    ),
    ({"outer": "fedadam", "outer-tau": 0.0}, "outer-tau = 0.0: must be a number > 0"),
    ({"outer": "fedadam", "outer-beta2": 1.0}, "outer-beta2 = 1.0: must be in [0, 1)"),
    ({"outer": "fedadam", "outer-momentum": -0.1}, "outer-momentum = -0.1: must be in [0, 1)"),
    ({"outer": "fedadam", "outer-lr": 1e39}, "outer-lr = 1e+39: in run.dtype = 'float32' it must be at most 3.4e+38"),
]
FLOWERS = [
    (ADAMW, "server.strategy = 'fedadam': its step would move what adamw remembers too, and v must stay positive"),
    ({"states": "u: average every 2"}, "'fedadam': algorithm.states = 'x: average every 1; u: average every 2' lets"),
    ({"states": "x: average every 2"}, "'fedadam': algorithm.states = 'x: average every 2; u: average every 1' lets"),
    ({"momentum-policy": "local"}, "algorithm.momentum-policy = 'local' lets clients keep states of their own"),
    ({"outer": "nesterov"}, "has a server step of its own; algorithm.outer, slow-momentum and slow-lr need pr-sgd-m"),
    ({"slow-momentum": 0.5}, "has a server step of its own; algorithm.outer, slow-momentum and slow-lr need pr-sgd-m"),
]


def resolved(keys, **more):
    return resolve(load({f"algorithm.{key}": value for key, value in keys.items()} | more))


@table("keys, why", WRONG)
def test_what_is_wrong_is_said_in_one_line(keys, why):
    with pytest.raises(InputError, match=re.escape(why)) as error:
        make_plan(resolved(keys).config)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@table("keys, why", FLOWERS)
def test_flowers_own_strategies_take_no_states_of_other_kinds(keys, why):
    with pytest.raises(InputError, match=re.escape(why)) as error:
        resolved(keys, **{"server.strategy": "fedadam", "model.norm": "group"})
    assert "\n" not in str(error.value)


IDLE = [
    ({**ADAMW, "eps": 1e-4, "lr": 0.002}, ""),
    ({"eps": 1e-4}, "algorithm.optimizer = 'sgd' does not read algorithm.eps: it changes nothing"),
    ({"beta2": 0.5}, "algorithm.optimizer = 'sgd' does not read algorithm.beta2: it changes nothing"),
    ({"optimizer": "adagrad", "beta": 0.5}, "'adagrad' does not read algorithm.beta: it changes nothing"),
    ({"outer-lr": 0.5}, "algorithm.outer = 'none': there is no outer step, so algorithm.outer-lr changes nothing"),
    ({"outer-lr": 0.5, "outer-tau": 1e-3}, "so algorithm.outer-lr changes nothing"),
    ({"outer": "nesterov", "outer-tau": 1e-2}, "algorithm.outer = 'nesterov' does not read algorithm.outer-tau"),
    ({"outer": "slowmo", "outer-beta2": 0.5}, "algorithm.outer = 'slowmo' does not read algorithm.outer-beta2"),
    ({"outer": "fedadam", "outer-tau": 1e-2, "outer-beta2": 0.5, "outer-states": "x,u"}, ""),
]


@table("keys, note", IDLE)
def test_what_changes_nothing_is_said(keys, note):
    notes = resolved(keys).notes
    assert len(notes) == (note != "")
    assert all(note in text for text in notes)


RIGHT = [
    ("u: average every 4", {"u": StateRule("average", 4)}),
    ("  x :average   every 2;u: local ;", {"x": StateRule("average", 2), "u": StateRule("local", 1)}),
    ("m: reset; v: average every 007", {"m": StateRule("reset", 1), "v": StateRule("average", 7)}),
    (f"u: average every {2**31 - 1}", {"u": StateRule("average", 2**31 - 1)}),
    ("", {}),
]


@table("text, rules", RIGHT)
def test_what_is_right_is_read_and_written_back(text, rules):
    assert parse_states(text) == rules
    assert parse_states(written(rules)) == rules


def test_resolving_once_more_changes_nothing():
    """Also from the keys alone, where those at their defaults count as not given: so Flower's clients resolve."""
    for keys in (
        {"states": "u: average every 3"},
        {**ADAMW, "states": "x: average every 2; v: reset"},
        {**ADAMW, "momentum-policy": "local"},
        {**GOSSIP, "optimizer": "gradient-tracking"},
        {"outer": "nesterov", "outer-states": "x, u"},
    ):
        config = resolved(keys).config
        assert resolve(load(config)).config == config
        assert resolve(load(load(flat(config)).config)).config == config
        assert make_plan(config).method == make_plan(resolve(load(flat(config))).config).method


def test_any_text_is_read_or_refused_in_one_line():
    """Pieces of right texts and anything else, in any order."""
    rng = random.Random(5)
    pieces = ["x", "u", "m", "v", "average", "local", "reset", "quasi-global", "every", "1", "2", "0", "-3", "1e3", "١"]
    pieces += [
        ":",
        ";",
        " ",
        "  ",
        "\n",
        "\t",
        "\x00",
        "é",
        "：",
        "'",
        '"',
        "{",
        "every 2",
        "x: average every 2; ",
        "9" * 60,
    ]
    read = 0
    for _ in range(4000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        found, refused = None, ""
        try:
            found = parse_states(text)
        except InputError as error:
            refused = str(error)
        assert "\n" not in refused
        if found is not None:
            read += bool(found)
            assert parse_states(written(found)) == found
            assert all(0 < rule.period < 2**31 for rule in found.values())
    assert read > 20
