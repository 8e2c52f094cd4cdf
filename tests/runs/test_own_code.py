"""What the user's own code raises, at whatever time: one line with the key and the round, and nothing done is lost."""

import re
import sys
from pathlib import Path

import pytest

import fedmom
from fedmom.errors import InputError
from fedmom.records.files import CHECKPOINT, read_about
from fedmom.records.history import read_rounds
from fedmom.records.status import read_status
from laws import table

CODE = """
import pathlib, torch

ARMED = pathlib.Path(__file__).with_name("armed")

def armed(where):
    return ARMED.exists() and ARMED.read_text() == where

class Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, g):
        if armed("backward"):
            raise KeyError("mine")
        return g

class Net(torch.nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.dense = torch.nn.Linear(shape.numel() if hasattr(shape, "numel") else 64, classes)
    def forward(self, x):
        if self.training and armed("forward"):
            raise IndexError("mine")
        if self.training and armed("exit"):
            raise SystemExit("mine")
        if not self.training and armed("evaluation"):
            raise AttributeError("mine")
        if self.training and armed("shape"):
            return self.dense(x)  # torch raises, in no line of this file
        return Raising.apply(self.dense(x.flatten(1)))

def net(shape, classes):
    return Net(shape, classes)

def correction(grads, params, start):
    if armed("correction"):
        raise ZeroDivisionError("mine")
    return grads
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_code", None)
    yield {
        "data.num-clients": 3,
        "data.batch-size": 4,
        "model.name": "own_code:net",
        "algorithm.correction": "own_code:correction",
        "algorithm.num-local-steps": 2,
        "run.num-rounds": 5,
        "run.checkpoint-every": 5,
        "engine.path": "loop",
        "engine.threads": 1,
    }
    sys.modules.pop("own_code", None)


class Arm(fedmom.Callback):
    def __init__(self, where):
        self.where = where

    def on_round(self, record, state):
        if record["round"] == 2:
            Path("armed").write_text(self.where)


PLACES = {
    "forward": ("model.name = 'own_code:net'", "IndexError: mine"),
    "backward": ("model.name = 'own_code:net'", "KeyError: 'mine'"),
    "shape": ("model.name = 'own_code:net'", "RuntimeError: "),
    "exit": ("model.name = 'own_code:net'", "SystemExit: mine"),
    "evaluation": ("model.name = 'own_code:net'", "AttributeError: mine"),
    "correction": ("algorithm.correction = 'own_code:correction'", "ZeroDivisionError: mine"),
}


def fails_in_round_3(sets, place):
    folder = Path(f"failed-{place}")
    with pytest.raises(InputError) as error:
        fedmom.run({}, sets=sets, out=folder, callbacks=[Arm(place)])
    key, what = PLACES[place]
    said = str(error.value)
    assert re.match("round 3: ", said)
    assert key in said
    assert what in said
    assert "\n" not in said
    status = read_status(folder)
    assert (status.status, status.reason, status.round) == ("failed", said, 2)
    assert read_about(folder / CHECKPOINT)["round"] == len(read_rounds(folder)) == 2
    Path("armed").unlink()
    assert fedmom.run(resume=folder, callbacks=[fedmom.Callback()]).status == "done"


@pytest.mark.slow
@table("place", PLACES)
def test_an_error_of_the_users_code_is_one_line_that_names_key_and_round(own, place):
    fails_in_round_3(own, place)


@pytest.mark.slow
@pytest.mark.xdist_group("Ray: messages")
@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("place", ["forward", "evaluation", "correction"])
@pytest.mark.parametrize("algorithm", ["pr-sgd-m", "d-sgd-m"])
def test_the_same_on_actors(own, place, algorithm):
    fails_in_round_3({**own, "engine.workers": 1, "algorithm.name": algorithm}, place)


def test_what_is_not_the_models_fault_is_not_blamed_on_it(own):
    class Broken(fedmom.Callback):
        def on_steps(self, client_steps):
            raise ValueError("of the callback")

    with pytest.raises(ValueError, match="of the callback") as error:
        fedmom.run({}, sets=own, out="run", callbacks=[Broken()])
    assert not isinstance(error.value, InputError)
    assert read_status(Path("run")).text == "failed: ValueError: of the callback"
