"""`fedmom bench`: counts that can be checked by hand, and a table for every kind of run."""

import pytest
import torch

from fedmom.config.load import load, replace
from fedmom.config.resolve import resolve
from fedmom.experiments.bench import _flops, as_rows, bench, peaks
from laws import table
from runs import image_problem

DIGITS = {"data.num-clients": 4, "data.batch-size": 8, "run.num-rounds": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What the device can do is measured by one test: it takes 256 MB and most of the time."""
    monkeypatch.setattr("fedmom.experiments.bench.peaks", lambda *_: (1e9, 1e9))


def run(changes):
    return bench(resolve(load({**DIGITS, **changes})).config, seconds=0.05)


def test_operations_are_those_of_the_matrix_products():
    """Logistic regression: B × in × out multiplications and additions forward, as many for the weights' gradient."""
    problem = image_problem("logistic")
    assert _flops(problem, problem.start()) == 2 * (2 * 5 * 64 * 3)


@pytest.mark.parametrize("path", ["factors", "loop"])
@pytest.mark.slow
def test_every_path_is_measured(path):
    found = run({"model.name": "mlp", "model.hidden": 256, "engine.path": path, "engine.chunk-size": 4})
    rows = dict(as_rows(found))
    assert found.rate > 0
    assert found.bytes > 0
    assert found.config.engine.path == path
    assert sum(found.shares.values()) == pytest.approx(1)
    assert {"client-steps/s", "operations/s", "memory traffic/s", "most memory in use, this process"} <= rows.keys()


def test_weights_in_factors_are_no_traffic():
    changes = {"model.name": "mlp", "model.hidden": 512, "algorithm.num-local-steps": 1, "engine.chunk-size": 4}
    rows, factors = (run({**changes, "engine.path": path}) for path in ("stack", "factors"))
    assert factors.bytes < 0.2 * rows.bytes


@table(
    "changes",
    [
        {"algorithm.name": "d-sgd-m", "algorithm.topology": "ring"},
        {"data.dataset": "quadratic", "data.curvatures": "1;2;3;4", "data.centers": "0;1;2;3", "data.batch-size": 1},
    ],
)
def test_other_runs_are_measured_too(changes):
    assert run({"model.name": "logistic", **changes}).rate > 0


def test_nothing_is_remembered_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOM_CACHE", str(tmp_path))
    config = resolve(load({"data.dataset": "quadratic", "run.num-rounds": 1})).config
    for on, remember, kept in ((True, False, 0), (False, True, 0), (True, True, 1)):
        bench(replace(config, "engine", remember=on), seconds=0.01, remember=remember)
        assert len(list(tmp_path.iterdir())) == kept


def test_peaks_are_of_the_device():
    flops, traffic = peaks(torch.device("cpu"))
    assert 1e8 < flops < 1e15
    assert 1e8 < traffic < 1e14
