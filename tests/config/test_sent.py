"""What nodes settle from the run config that they are sent is what `fedmom run` settles from the user's own file."""

import re
import tomllib
from pathlib import Path

import pytest
from test_presets import Q

from fedmom import run
from fedmom.backends.trainer import settled
from fedmom.config.keys import KEYS
from fedmom.config.load import flat, load, to_toml
from fedmom.config.resolve import resolve
from fedmom.deploy.bundle import DATA, pack
from fedmom.errors import InputError
from fedmom.method.algorithms import ALGORITHMS
from fedmom.records.files import CONFIG

ROOT = Path(__file__).parents[2]
# Another value of each key that a name sets, or that has a say in what it sets.
OTHER = {
    "optimizer": "lion",
    "states": "x: average every 2",
    "outer": "fedadam",
    "beta": 0.5,
    "slow-momentum": 0.25,
    "fragments": 2,
    "momentum-policy": "reset",
}
# The keys of a place: they say where a run is, and which process runs it, not what it computes.
PLACES = {"data.data-dir", "run.backend", "run.out", "run.resume", "simulation.num-gpus"}


def cases():
    """(changes of a configuration) of every name: each key that it sets at the key's default, and at another value."""
    for name, row in ALGORITHMS.items():
        begin = {"algorithm.name": name, "algorithm.num-local-steps": 1}
        yield begin
        for key in dict.fromkeys([*row.sets, "optimizer", "momentum-policy", "beta"]):
            full = f"algorithm.{key}"
            yield begin | {full: KEYS[full].default}
            yield begin | {full: OTHER[key]}


def computed(config):
    return {name: value for name, value in flat(config).items() if name not in PLACES}


def by_deploy(cargo):
    """What nodes compute of what they are sent: a file that says every key, so that nothing is left of the app's."""
    tables = tomllib.loads(to_toml(cargo.config))
    run_config = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    assert run_config.keys() == KEYS.keys()
    return computed(settled(run_config).config)


def test_what_is_sent_to_nodes_settles_as_a_run_here(tmp_path, monkeypatch):
    class SentError(Exception):
        pass

    def simulate_app(folder, *, run_config, **rest):
        raise SentError(run_config)

    monkeypatch.setattr("fedmom.flower.app.simulate_app", simulate_app)
    file, optimizers, refused = tmp_path / "run.toml", set(), 0
    for changes in cases():
        keys = {**Q, **changes}
        file.write_text("\n".join(f"{k} = {v!r}".replace("True", "true") for k, v in keys.items()))
        send = lambda **more: pack(file, (), name="r", app=ROOT, num_nodes=1, **more)  # noqa: E731
        right = None
        try:
            right = computed(resolve(load(keys)).config)
        except InputError as error:
            words = re.escape(str(error))
        if right is None:
            with pytest.raises(InputError, match=words):
                send(resume=None)
            refused += 1
            continue
        optimizers.add((changes["algorithm.name"], right["algorithm.optimizer"]))
        assert by_deploy(send(resume=None)) == right, changes
        with pytest.raises(SentError) as sent:
            run(file, sets={"run.backend": "simulation"}, app=ROOT)
        assert computed(settled(sent.value.args[0]).config) == right, changes
        if changes.get("algorithm.optimizer") == KEYS["algorithm.optimizer"].default:  # going on by the same file
            (tmp_path / CONFIG).write_text(to_toml(resolve(load(keys, {"data.data-dir": DATA})).config))
            assert by_deploy(send(resume=tmp_path)) == right, changes
    assert {("diloco", "adamw"), ("diloco", "sgd"), ("diloco", "lion"), ("slowmo", "lion")} <= optimizers
    assert 5 < refused < 40
