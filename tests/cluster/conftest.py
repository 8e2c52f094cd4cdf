"""One cluster for the tests of a process: a head and another machine, each in namespaces of its own on this one.

They are slow, and in three groups of pytest-xdist, so that each process starts a cluster of its own once.
"""

import pytest
from machines import Cluster, missing


@pytest.fixture(scope="session")
def machines(tmp_path_factory):
    """The cluster, with a head alone at first."""
    if why := missing():
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def cluster(machines):
    """The cluster with exactly one machine beside its head, whatever became of those of other tests."""
    there = machines.alive()
    for machine in there[1:]:
        machine.leave()
    if not there:
        machines.join()
    return machines
