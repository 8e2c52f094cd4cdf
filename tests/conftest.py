"""Two test processes share two cores (pytest -n 2): one torch thread each, or they spin waiting for one another."""

import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["FEDMOM_CACHE"] = ""  # here and there nothing is remembered of other runs, and nothing of these is
torch.set_num_threads(1)
# A shell starts what runs in its background with Ctrl-C ignored; here and in the processes of tests it is heard.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Under nohup what a terminal's end would say is not heard; in the processes of tests it is.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Triton decides at its import whether its kernels are interpreted, which is how a machine without a GPU tests them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What tests share: helpers/ and laws/ by the names of their files, zoo/ as a package.
sys.path[:0] = [str(Path(__file__).parent / folder) for folder in (".", "helpers", "laws")]


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def one_ray(tmp_path_factory):
    """One Ray for all tests of this process that do not ask for a fresh one, as starting it takes seconds.

    -> the file that the faulty clients of tests/apps look into. Its tests are in one of two groups of pytest-xdist,
    "Ray: rounds" and "Ray: messages", which take about as long, so that no third process starts one. What needs a
    fresh Ray starts it in a process below the test's, and if slow is in the group "Ray: fresh".
    """
    ray = pytest.importorskip("ray")
    plan = tmp_path_factory.mktemp("faults") / "plan.json"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("FEDMOM_TEST_FAULTS", str(plan))  # the actors have the environment that Ray was started in
        warnings.simplefilter("ignore", FutureWarning)  # a tip about CUDA_VISIBLE_DEVICES
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield plan
    ray.shutdown()
