"""One deployment of three clients for all tests of containers."""

import os

import pytest

from containers import Deployment, build_image, engine_answers, free_port


@pytest.fixture(scope="session")
def image():
    if not engine_answers():
        pytest.skip("no Docker engine answers (`docker info` fails)")
    build_image()


@pytest.fixture(scope="session")
def deployment(image, tmp_path_factory):
    made = Deployment(tmp_path_factory.mktemp("deployment"), f"fedmom-test-{os.getpid()}")
    made.call("init", "--clients", "3", "--port", str(free_port()), "--name", made.name)
    try:
        made.call("up")
        yield made
    finally:
        made.call("down", "--volumes")
