"""One run twice: by the engine, and through the Flower app's two sides on a Grid in this process."""

import numpy as np
import torch
from flwr.app import Context, RecordDict

import fedmom
from clients.client_app import app as client_app
from fedmom.errors import RunStoppedError
from fedmom.records.history import read_clients
from fedmom.runs.callbacks import Listener
from grids import LocalGrid, run_config
from strategies.server_app import app as server_app

QUADRATIC = {
    "data.dataset": "quadratic",
    "data.curvatures": "1;3;2;0.5;1.5",
    "data.centers": "4;-2;1;0;3",
    "algorithm.num-local-steps": 3,
    "run.num-rounds": 20,
    "engine.path": "loop",
}
DIGITS = {
    "data.num-clients": 5,
    "model.name": "mlp",
    "model.hidden": 16,
    "run.dtype": "float64",
    "run.num-rounds": 3,
    "algorithm.num-local-steps": 2,
    "engine.path": "loop",
}
RESNET = {**DIGITS, "model.name": "tests.apps.models:normed", "data.num-clients": 3}


class Quiet(fedmom.Callback):
    """Reads no state, as the command's own callbacks do: nothing is brought for it after every round."""

    wants_state = False


def by_engine(changes, **options):
    return fedmom.run(changes, callbacks=[fedmom.Callback()], **options)


def by_flower(changes, num_nodes, grid_options=None, **where):
    """The same run through both apps -> (Result, the Grid); RunStoppedError passes through."""
    keys = run_config({**changes, **{f"run.{name}": str(path) for name, path in where.items()}})
    grid = LocalGrid(client_app, num_nodes, keys, **(grid_options or {}))
    grid.listener = Listener([Quiet()])
    try:
        server_app(grid, Context(1, 0, {}, RecordDict(), keys))
    except RunStoppedError:
        assert grid.listener.result.status != "done"
    return grid.listener.result, grid


def assert_same(one, other, tolerance=1e-10, *, unseen=frozenset()):
    """Equal models, momenta and records; unseen: measures that `one` may lack, as not all of it travelled there."""
    for a, b in ((one.state_dict, other.state_dict), (one.momentum, other.momentum)):
        assert list(a) == list(b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)
    for mine, theirs in zip(one.rounds, other.rounds, strict=True):
        assert theirs.keys() - unseen <= mine.keys() <= theirs.keys()
        for key in mine.keys() - {"wall_seconds", "client_steps_per_second"}:
            mine_and_theirs = (np.asarray(numbers(record[key]), dtype=float) for record in (mine, theirs))
            np.testing.assert_allclose(*mine_and_theirs, rtol=1e-8, atol=1e-10, err_msg=key)


def same_clients(folder, other):
    """Two run folders say the same of who the clients are, and to 1e-10 of what each got; -> the first's."""
    one, two = read_clients(folder), read_clients(other)
    for name in ("examples", "test_examples"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert [found.round for found in one.results] == [found.round for found in two.results]
    for mine, theirs in zip(one.results, two.results, strict=True):
        assert mine.values.keys() == theirs.values.keys()
        for name, values in mine.values.items():
            np.testing.assert_allclose(values, theirs.values[name], rtol=1e-10, atol=1e-12, err_msg=name)
    return one


def numbers(value):
    """A record's value as numbers: a histogram is a small table."""
    return [value["low"], value["high"], *value["counts"]] if isinstance(value, dict) else value


def fails(client, what, *, rounds=(2,), tries=99):
    """A fault: the node that holds `client` (of 5) fails in some rounds, at its first `tries` tries."""
    seen = dict.fromkeys(rounds, 0)

    def fault(message, node_config):
        if message.metadata.message_type != "train":
            return None
        number, num_nodes = message.content["config"]["server-round"], node_config["num-partitions"]
        if client * num_nodes // 5 != node_config["partition-id"] or number not in seen:
            return None
        seen[number] += 1
        return what if seen[number] <= tries else None

    return fault
