"""A run with periods, other optimizers and outer steps goes on from every round to the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_resume import StopAfter, same_run, wait_for_round

import fedmom
from fedmom.records.files import CHECKPOINT, CLIENTS, read_about, read_tensors
from laws import table

QUIET = [fedmom.Callback()]
QUADRATIC = {
    "data.dataset": "quadratic",
    "data.curvatures": "1,2;3,1;2,2;0.5,1",
    "data.centers": "4,1;-2,0;1,-3;0,2",
    "data.start": "1,-1",
    "algorithm.num-local-steps": 2,
    "run.num-rounds": 4,
    "engine.path": "vmap",
    "engine.chunk-size": 3,
    "engine.threads": 1,
}
NET = {
    "data.dataset": "oracle:examples",
    "data.num-clients": 3,
    "data.batch-size": 4,
    "model.name": "tests.apps.models:normed",
    "algorithm.num-local-steps": 2,
    "run.num-rounds": 4,
    "engine.path": "loop",
    "engine.threads": 1,
}
X = {**NET, "algorithm.states": "x: average every 2", "algorithm.cohort-size": 2}  # and the buffers
ADAMW = {"algorithm.optimizer": "adamw", "algorithm.beta2": 0.9}
CASES = {
    "u": {**QUADRATIC, "algorithm.states": "u: average every 3", "algorithm.cohort-size": 2},
    "x": {**QUADRATIC, "algorithm.states": "x: average every 3; u: average every 2", "algorithm.cohort-size": 2},
    "adamw": {**NET, **ADAMW, "algorithm.momentum-policy": "local", "algorithm.personal": "norm"},
    "outer": {
        **NET,
        **ADAMW,
        "algorithm.states": "x: average every 2; m: average; v: average every 4",
        "algorithm.outer": "fedadam",
        "algorithm.outer-states": "x, m",
    },
    "algorithm 2": {
        **QUADRATIC,
        **ADAMW,
        "algorithm.name": "d-sgd-m",
        "algorithm.topology": "ring",
        "algorithm.states": "x: average every 2; m: average every 3; v: local",
    },
}


@table("case", CASES)
def test_a_run_goes_on_from_every_round_to_the_same_bytes(tmp_path, case):
    """Stopped after each round, once all is exchanged and between."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fedmom.run(CASES[case], out=whole, callbacks=QUIET)
    fedmom.run(CASES[case], out=parts, callbacks=[StopAfter(1)])
    for number in range(2, 4):
        assert fedmom.run(resume=parts, callbacks=[StopAfter(number)]).status == "interrupted"
        assert read_about(parts / CHECKPOINT)["round"] == number
    assert fedmom.run(resume=parts, callbacks=QUIET).status == "done"
    same_run(whole, parts)


def test_a_longer_run_keeps_what_its_clients_had_at_the_end(tmp_path):
    """The short run ends between two exchanges, where its mean is shown and its clients have their own."""
    short = {**X, "run.num-rounds": 3}
    fedmom.run(short, out=tmp_path / "run", callbacks=QUIET)
    rows, _ = read_tensors(tmp_path / "run" / CLIENTS)
    assert not all(torch.equal(rows[name][0], rows[name][1]) for name in rows)
    fedmom.run(resume=tmp_path / "run", sets={"run.num-rounds": 4}, callbacks=QUIET)
    fedmom.run(X, out=tmp_path / "long", callbacks=QUIET)
    same_run(tmp_path / "long", tmp_path / "run")


CHILD = """
import json, sys, time
import fedmom
class Stays(fedmom.Callback):
    def on_round(self, record, state):
        if record["round"] == int(sys.argv[3]):
            time.sleep(600)
config = json.loads(sys.argv[1])
fedmom.run(config, out=sys.argv[2], callbacks=[Stays()])
"""


def start_child(config: dict, out: Path, stays: int) -> subprocess.Popen:
    """The run in a process of its own, which stays in a round."""
    words = [json.dumps(config), str(out), str(stays)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *words], stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_run_killed_between_two_exchanges_goes_on_from_its_last_checkpoint(tmp_path):
    """In round 4, after a checkpoint of round 3: x is exchanged after rounds 2, 4, …"""
    config = {**X, "data.dataset": "digits", "run.num-rounds": 6, "run.checkpoint-every": 3}
    child = start_child(config, tmp_path / "killed", stays=4)
    try:
        wait_for_round(tmp_path / "killed", 4, lambda: child.poll() is None)
    finally:
        os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert read_about(tmp_path / "killed" / CHECKPOINT)["round"] == 3
    assert (tmp_path / "killed" / CLIENTS).exists()
    fedmom.run(resume=tmp_path / "killed", callbacks=QUIET)
    fedmom.run(config, out=tmp_path / "whole", callbacks=QUIET)
    same_run(tmp_path / "whole", tmp_path / "killed")


def test_rows_that_belong_to_no_checkpoint_do_not_stay(tmp_path):
    """After an exchange of everything nobody has anything of its own."""
    keys = {**QUADRATIC, "algorithm.states": "x: average every 2; u: average every 2", "run.checkpoint-every": 1}
    fedmom.run(keys, out=tmp_path / "run", callbacks=[StopAfter(3)])
    assert (tmp_path / "run" / CLIENTS).exists()
    fedmom.run(resume=tmp_path / "run", callbacks=QUIET)
    assert not (tmp_path / "run" / CLIENTS).exists()
