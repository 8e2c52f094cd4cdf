"""What every client gets is the same on the engine and by Flower's apps; test_clients_agree has Ray's actors."""

import numpy as np
import pytest

from both_sides import by_engine, by_flower, same_clients
from runs import LOCAL, give_digits

RUN = {
    "data.num-clients": 5,
    "data.client-test-share": 0.3,
    "data.batch-size": 4,
    "model.name": "mlp",
    "model.hidden": 8,
    "algorithm.num-local-steps": 3,
    "run.num-rounds": 2,
    "run.client-eval-every": 2,
    "run.dtype": "float64",
    "engine.path": "loop",
}
OF_ALGORITHM_1 = {"algorithm.personal": "head", "run.personal-steps": 2, "algorithm.cohort-size": 3}
OF_ALGORITHM_2 = {"algorithm.name": "d-sgd-m", "algorithm.topology": "ring"}


def same_for_every_client(folder, other, names):
    """Both runs looked at the same clients in round 2, and every client got the same of `names`."""
    for found in same_clients(folder, other).results:
        assert (found.round, found.values.keys()) == (2, set(names))
        for name in filter(lambda name: name.endswith("_loss"), names):
            assert len(np.unique(found.values[name])) == len(found.values[name]), "who got whose would not show"


ALL = ("own_loss", "own_accuracy", "personal_loss", "personal_accuracy")


@pytest.mark.slow
def test_flowers_apps_tell_what_the_engine_does(tmp_path):
    """Of five clients on two nodes, with models of their own after steps and by rows, and by a strategy of Flower's."""
    for name, more in {"1": OF_ALGORITHM_1, "2": OF_ALGORITHM_2, "plain": {}}.items():
        by_engine(RUN | more, out=tmp_path / f"engine-{name}")
        by_flower(RUN | more, 2, out=tmp_path / f"flower-{name}")
        same_for_every_client(tmp_path / f"flower-{name}", tmp_path / f"engine-{name}", ALL if more else ALL[:2])


def test_clients_with_data_of_their_own_tell_what_one_machine_measures(tmp_path):
    """By test examples that they bring, beside a server with some or without, or by those that they hold out."""
    cases = [(3, False, True), (2, True, True), (1, False, False)]
    for case, (num_clients, server, clients) in enumerate(cases):
        data = tmp_path / str(case)
        data.mkdir()
        give_digits(data, num_clients, server=server, clients=clients)
        keys = (
            RUN
            | LOCAL
            | {"run.num-rounds": 2, "data.data-dir": str(data), "data.num-clients": num_clients}
            | OF_ALGORITHM_1
        )
        keys |= {"data.client-test-share": 0.0 if clients else 0.3, "algorithm.cohort-size": min(2, num_clients)}
        by_engine(keys, out=data / "engine")
        by_flower(keys, num_clients, out=data / "flower")
        same_for_every_client(data / "flower", data / "engine", ALL)
