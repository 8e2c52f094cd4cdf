"""Two test processes share two cores (pytest -n 2): one torch thread each, or they spin waiting for one another."""

import functools
import gzip
import os
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["FEDMOM_CACHE"] = ""  # here and there nothing is remembered of other runs, and nothing of these is
os.environ.setdefault("HYPOTHESIS_NO_PLUGINS", "1")  # of which trio's takes a second of every process of tests
# A shell starts what runs in its background with Ctrl-C ignored; here and in the processes of tests it is heard.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Under nohup what a terminal's end would say is not heard; in the processes of tests it is.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# What tests share: helpers/ and laws/ by the names of their files, zoo/ as a package.
sys.path[:0] = [str(Path(__file__).parent / folder) for folder in (".", "helpers", "laws")]


def pytest_configure(config):
    """Torch as tests need it; the process that only hands tests out to others (pytest -n) does without."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch

    torch.set_num_threads(1)
    # Triton decides at its import whether its kernels are interpreted: so a machine without a GPU tests them.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_assertrepr_compare(left, right):
    """Where CI is set pytest writes out line by line how two values differ, which takes minutes for bytes of files."""
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(left, bytes | list | tuple) and len(left) > 100:
            for name in ("CI", "BUILD_NUMBER"):
                patch.delenv(name, raising=False)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def _asked_once():
    """What hundreds of runs ask for, each time with the same answer, is worked out once in a process of tests.

    The digits, the versions and the commit of environment.json, plotly.js as the page packs it, and the commands as
    typer reads them off their functions. No test can cut the power, so that nothing waits for the disk.
    """
    import typer.main

    from fedmom.data.sources import small
    from fedmom.records import environment
    from fedmom.results.page import write

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "read_digits", functools.cache(small.read_digits))
        for name in ("version_of", "_commit"):
            patch.setattr(environment, name, functools.cache(getattr(environment, name)))
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(write, "gzip", SimpleNamespace(compress=functools.cache(gzip.compress)))
        yield


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def one_ray(tmp_path_factory):
    """One Ray for all tests of this process that do not ask for a fresh one, as starting it takes seconds.

    -> the file that the faulty clients of tests/apps look into. Its tests are in one of two groups of pytest-xdist,
    "Ray: rounds", which has all fast ones, and "Ray: messages", so that no third process starts one, and among the
    fast tests no second. What needs a fresh Ray starts it in a process below the test's, and if slow is in the group
    "Ray: fresh".
    """
    ray = pytest.importorskip("ray")
    plan = tmp_path_factory.mktemp("faults") / "plan.json"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("FEDMOM_TEST_FAULTS", str(plan))  # the actors have the environment that Ray was started in
        warnings.simplefilter("ignore", FutureWarning)  # a tip about CUDA_VISIBLE_DEVICES
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield plan
    ray.shutdown()
