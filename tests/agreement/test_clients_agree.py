"""Every client's own results on Ray's actors and in a simulation: those of the engine. All slow."""

import pytest

import fedmom
from both_sides import same_clients
from runs import LOCAL, give_digits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.xdist_group("Ray: messages")]

BASE = {
    "data.num-clients": 5,
    "data.batch-size": 4,
    "data.client-test-share": 0.3,
    "model.name": "tests.apps.models:normed",
    "algorithm.num-local-steps": 3,
    "algorithm.cohort-size": 3,
    "algorithm.client-weights": "samples",
    "run.num-rounds": 3,
    "run.client-eval-every": 2,
    "run.dtype": "float64",
    "run.checkpoint-every": 1,
    "engine.threads": 1,
}
PERSONAL = {"algorithm.personal": "norm", "run.personal-steps": 2}
RUNS = {
    "average": {**PERSONAL, "algorithm.lr-schedule": "cosine", "algorithm.nesterov": True},
    "local": {**PERSONAL, "algorithm.momentum-policy": "local", "run.metrics": "accuracy,f1"},
    "d-sgd-m": {"algorithm.name": "d-sgd-m", "algorithm.topology": "ring"},
}
WAYS = {"workers": {"engine.workers": 2}, "simulation": {"run.backend": "simulation"}}
RAY = {"simulation.num-actors": 2, "simulation.num-cpus": 0.5}
QUIET = {"callbacks": [fedmom.Callback()]}


class Stops(fedmom.Callback):
    def on_round(self, record, state):
        if record["round"] == 2:
            raise KeyboardInterrupt


def test_actors_and_a_simulation_find_what_the_engine_finds(one_ray, tmp_path):
    """And so does, under `local`, each of them when it is stopped after a round that looked, and goes on."""
    for name, changes in RUNS.items():
        keys = {**BASE, **changes}
        if name == "d-sgd-m":
            keys |= {"algorithm.cohort-size": 0, "algorithm.client-weights": "uniform"}
        fedmom.run(keys, out=tmp_path / name / "engine", **QUIET)
        for way, more in WAYS.items():
            out = tmp_path / name / way
            stops = name == "local"
            fedmom.run({**keys, **more, **RAY}, out=out, callbacks=[Stops() if stops else fedmom.Callback()])
            if stops:
                assert fedmom.run(resume=out, **QUIET).status == "done"
            found = same_clients(out, tmp_path / name / "engine")
            assert [one.round for one in found.results] == [2, 3]
            whose = {name.partition("_")[0] for name in found.results[-1].values}
            assert whose == {"own", "personal"}, (name, way)


def test_a_simulation_of_clients_own_data_finds_what_the_engine_finds(one_ray, tmp_path):
    """Where nobody but a client has its examples: brought test examples, and held-out ones."""
    for share in (0.0, 0.3):
        folder = tmp_path / str(share)
        folder.mkdir()
        give_digits(folder, 3, server=False, clients=not share)
        keys = {**LOCAL, **RUNS["local"], "data.data-dir": str(folder), "data.client-test-share": share}
        keys |= {"model.name": BASE["model.name"], "run.client-eval-every": 1}
        for way, more in {"engine": {}, "simulation": {**WAYS["simulation"], **RAY}}.items():
            fedmom.run({**keys, **more}, out=folder / way, **QUIET)
        found = same_clients(folder / "simulation", folder / "engine")
        assert [one.round for one in found.results] == [1, 2, 3]
