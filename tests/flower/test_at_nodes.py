"""Nodes that keep what is their clients' own: the engine's rounds, the method's bytes, and nothing lost in silence."""

import numpy as np
import pytest
import torch

from both_sides import DIGITS, QUADRATIC, assert_same, by_engine, by_flower
from fedmom.flower.wire import pack, unpack
from fedmom.records.files import CHECKPOINT, CLIENTS, FINAL, read_tensors
from fedmom.travel.table import CODECS
from laws import table

SPREADS = frozenset({"consensus_distance", "momentum_spread"})
MODEL = {**DIGITS, "model.hidden": 8}
KEYS = {
    "run.num-rounds": 5,
    "run.checkpoint-every": 2,
    "server.own-rows": "nodes",
    "algorithm.cohort-size": 3,
}
RARE = {"algorithm.states": "x: average every 2; u: average every 3"}
CASES = {
    "periods": RARE,
    "local": {"algorithm.momentum-policy": "local", "algorithm.client-weights": "samples"},
    "reset": {"algorithm.states": "u: reset every 2", "algorithm.beta": 0.5},
    "beta = 0": {"algorithm.beta": 0.0},
    "personal": {"algorithm.personal": "5.weight,5.bias", "algorithm.momentum-policy": "local"},
    "adamw": {"algorithm.name": "des-loc", "algorithm.lr": 0.002, "algorithm.outer": "nesterov"},
    "corrected": {"algorithm.name": "scaffold"},
    "by parts": {"algorithm.fragments": 3, "algorithm.outer": "fedadam"},
    "I that changes": {"algorithm.interval": "decaying", "algorithm.states": "u: average every 2"},
    "codecs": {
        "algorithm.codecs": "x: int8 16; u: topk 0.2",
        "algorithm.codecs-down": "x: lowrank 1; u: bfloat16",
        "algorithm.outer": "nesterov",
    },
    "adamw, v in bfloat16": {
        "algorithm.optimizer": "adamw",
        "algorithm.lr": 0.002,
        "algorithm.codecs": "x: randomk 0.3; m: int4; v: bfloat16",
        "algorithm.codecs-down": "x: topk 0.5",
    },
    "batch norm": {"model.name": "tests.apps.models:normed", "algorithm.states": "x: average every 2"},
}


SMALL = ["periods", "local", "reset", "beta = 0", "adamw", "corrected", "codecs"]  # those that need no model


def same_files(one, other):
    for name in (FINAL, CHECKPOINT, CLIENTS):
        got, want = (read_tensors(folder / name)[0] if (folder / name).exists() else {} for folder in (one, other))
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-10, atol=1e-12, msg=f"{name}: {key}")


def sent_bytes(message):
    """The numbers of all arrays of a message, without what frames them."""
    return sum(v.numel() * v.element_size() for r in message.content.array_records.values() for v in unpack(r).values())


class Scales:
    """A Grid's fault that breaks nothing: it writes down what clients send, and are sent, in which round."""

    def __init__(self):
        self.up, self.down, self.kinds = dict[int, int](), dict[int, int](), list[str]()

    def __call__(self, message, node):
        self.kinds.append(message.metadata.message_type)
        if message.metadata.message_type != "train":
            return None
        number = message.content["config"]["server-round"]
        self.down[number] = self.down.get(number, 0) + sent_bytes(message)

        def weigh(reply):
            self.up[number] = self.up.get(number, 0) + sent_bytes(reply)
            return reply

        return weigh


@table("case", SMALL)
def test_rounds_of_quadratics_are_the_engines_and_messages_carry_what_is_counted(tmp_path, case):
    is_the_engines_run(tmp_path, {**QUADRATIC, **KEYS, "algorithm.num-local-steps": 2, **CASES[case]})


@pytest.mark.slow
@table("case", CASES)
def test_rounds_of_models_are_the_engines_and_messages_carry_what_is_counted(tmp_path, case):
    is_the_engines_run(tmp_path, {**MODEL, **KEYS, **CASES[case]})


def is_the_engines_run(tmp_path, keys):
    """One client a node: every array's bytes. Blocks of clients: the same tensors, in the same files."""
    scales = Scales()
    right = by_engine(keys, out=tmp_path / "engine")
    found, _ = by_flower(keys, 5, {"fault": scales}, out=tmp_path / "nodes")
    assert_same(found, right, unseen=SPREADS)
    same_files(tmp_path / "nodes", tmp_path / "engine")
    for name, scale in (("bytes_sent", scales.up), ("bytes_received", scales.down)):
        if name in right.rounds[0]:
            assert scale == dict(enumerate(np.diff([0, *(record[name] for record in right.rounds)]), 1))
    if "algorithm.codecs" not in keys:  # where a mean of means, rounded, is cut off elsewhere
        by_flower(keys, 2, out=tmp_path / "blocks")
        same_files(tmp_path / "blocks", tmp_path / "engine")


def test_what_goes_down_is_what_clients_do_not_know():
    """u every 3: after the first round nobody is told u before it was averaged."""
    keys = {**QUADRATIC, **KEYS, "algorithm.states": "u: average every 3", "algorithm.cohort-size": 5}
    _, grid = by_flower(keys, 5)
    down = [sent_bytes(message) // 8 for message in grid.pushed if message.metadata.message_type == "train"]
    assert down == [2] * 5 + [1] * 10 + [2] * 5 + [1] * 5


def test_a_run_goes_on_from_the_servers_checkpoint_with_nodes_that_have_nothing(tmp_path):
    for case in ("periods", "corrected", "personal"):
        whole, parts = tmp_path / case / "whole", tmp_path / case / "parts"
        keys = {**(MODEL if case == "personal" else QUADRATIC), **KEYS, **CASES[case]}
        by_flower(keys, 5, out=whole)
        by_flower({**keys, "run.num-rounds": 3}, 5, out=parts)
        by_flower(keys, 5, resume=parts)
        for name in (FINAL, CHECKPOINT, CLIENTS):
            if (whole / name).exists():
                assert (whole / name).read_bytes() == (parts / name).read_bytes()
        # Whoever kept the rows before, they may lie elsewhere from now on.
        by_flower({**keys, "run.num-rounds": 6}, 2, resume=parts)
        by_flower({**keys, "run.num-rounds": 7, "server.own-rows": "server"}, 5, resume=parts)
        by_engine({**keys, "run.num-rounds": 7}, out=tmp_path / case / "engine")
        same_files(parts, tmp_path / case / "engine")


def test_nothing_is_asked_of_nodes_but_for_a_checkpoint_and_the_end(tmp_path):
    scales = Scales()
    by_flower({**MODEL, **KEYS, **RARE, "run.eval-every": 4}, 5, {"fault": scales}, out=tmp_path / "run")
    first = scales.kinds.index("train")
    # Rounds 2 and 4 have checkpoints, round 5 is the last.
    asked = "".join(kind[0] for kind in scales.kinds[first:])
    assert asked.replace("t", " ").split() == [one for one in asked.replace("t", " ").split() if set(one) == {"q"}]
    assert len(asked.replace("t", " ").split()) == 3


def test_a_message_that_nobody_can_have_encoded_is_refused_by_its_clients_name():
    keys = {**QUADRATIC, **KEYS, **CASES["codecs"], "algorithm.cohort-size": 5}

    def fault(message, node):
        if message.metadata.message_type != "train" or node["partition-id"] != 2:
            return None

        def spoil(reply):
            arrays = unpack(reply.content["arrays"])
            arrays["coded/indices/momentum/x"] += 1
            reply.content["arrays"] = pack(arrays, bundled=True)
            return reply

        return spoil

    result, _ = by_flower(keys, 5, {"fault": fault})
    assert result.status == "failed"
    assert "round 1: client 2, " in result.message
    assert "in coded/indices/momentum/x" in result.message


def test_runs_in_bfloat16_have_the_engines_bits():
    """NumPy has no bfloat16: its bits travel, half as many as of float32."""
    keys = {**MODEL, **KEYS, "run.dtype": "bfloat16", "run.num-rounds": 2}
    for changes in ({"server.own-rows": "server"}, CASES["codecs"], {"algorithm.states": "u: local"}):
        right, scales = by_engine({**keys, **changes}), Scales()
        found, _ = by_flower({**keys, **changes}, 5, {"fault": scales})
        for name, value in right.state_dict.items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, found.state_dict[name])
        if "server.own-rows" not in changes:
            assert sum(scales.up.values()) == right.rounds[-1]["bytes_sent"]


@pytest.mark.slow
@pytest.mark.xdist_group("Ray: rounds")
def test_every_codec_means_the_same_in_a_simulation(tmp_path, one_ray):
    """On Ray's actors, whoever keeps e; what is not told of is in test_rounds_of_models."""
    pairs = [
        "x: int8; u: int4",
        "x: topk; u: randomk 0.2",
        "x: lowrank 2; u: bfloat16",
        "x: float16; u: randomk scaled plain",
    ]
    assert {word for pair in pairs for word in pair.replace(":", "").replace(";", "").split()} >= {*CODECS} - {
        "float32"
    }
    for number, codecs in enumerate(pairs):
        keys = {**MODEL, **KEYS, "algorithm.codecs": codecs, "algorithm.codecs-down": "x: int8"}
        keys["server.own-rows"] = "nodes" if number % 2 else "auto"
        right = by_engine(keys, out=tmp_path / f"{number}")
        found = by_engine({**keys, "run.backend": "simulation"}, out=tmp_path / f"{number} simulated")
        assert_same(found, right)
        same_files(tmp_path / f"{number}", tmp_path / f"{number} simulated")
