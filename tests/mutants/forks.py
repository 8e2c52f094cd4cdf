"""Every mutant in a process of its own, forked from one that has collected the tests: imports are paid for once.

pytest collects the right program; then a child per mutant changes it and runs some of the collected tests.
"""

import contextlib
import faulthandler
import gc
import io
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from change import Change, StaleError

ROOT = Path(__file__).parents[2]
# What a row with a slip of the pen raises, and what says nothing about a law.
TYPOS = (
    "AttributeError",
    "TypeError",
    "NameError",
    "UnboundLocalError",
    "SyntaxError",
    "ImportError",
    "ModuleNotFoundError",
    "StaleError",
)
ALL, FIRST = "all", "first"  # tests to run: all, or up to the first that fails


class Job(NamedTuple):
    """One child: a change, or none, and the tests that it runs, in this order, by the beginnings of their node ids."""

    name: str
    change: Change | None
    tests: Sequence[str]
    seconds: float = 300.0  # then it is ended, and the test that was running has failed


class Failure(NamedTuple):
    test: str
    error: str  # the exception's type
    message: str  # its first line


class Found(NamedTuple):
    """What came of a job."""

    run: int  # tests that ran
    failures: list[Failure]
    stale: str  # why the change could not be made; or ""
    seconds: float


class _Heard:
    """A plugin that writes down which tests ran and how those that failed did, at once: a child may be ended."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call" or report.failed:
            said = {"test": item.nodeid}
            if report.failed and call.excinfo is not None:
                message = str(call.excinfo.value).strip() or call.excinfo.exconly()
                said |= {"error": call.excinfo.type.__name__, "message": message.splitlines()[0][:200]}
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(said) + "\n")
        return report


class _Forks:
    """The plugin that takes the place of pytest's own loop over the tests."""

    def __init__(self, jobs: Sequence[Job], workers: int, until: str, tell: Callable[[str, Found], None]) -> None:
        self.jobs, self.workers, self.until, self.tell = list(jobs), workers, until, tell
        self.found: dict[str, Found] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        _warm()
        waiting, under_way, places = self.jobs[::-1], {}, itertools.count()
        with tempfile.TemporaryDirectory() as folder:
            while waiting or under_way:
                while waiting and len(under_way) < self.workers:
                    job = waiting.pop()
                    items = [item for test in job.tests for item in session.items if _wanted(item.nodeid, test)]
                    place = Path(folder) / str(next(places))
                    place.mkdir()
                    under_way[self._fork(job, items, place)] = job, place, time.monotonic()
                time.sleep(0.02)
                for pid, (job, place, begin) in list(under_way.items()):
                    seconds = time.monotonic() - begin
                    late = seconds > job.seconds
                    if late:
                        os.kill(pid, signal.SIGKILL)
                    if os.waitpid(pid, 0 if late else os.WNOHANG)[0]:
                        del under_way[pid]
                        found = self.found[job.name] = _read(place, seconds, late)
                        self.tell(job.name, found)
        return True

    def _fork(self, job: Job, items: list[pytest.Item], place: Path) -> int:
        if pid := os.fork():
            return pid
        try:
            silent = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(silent, stream)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            os.environ["PYTEST_DEBUG_TEMPROOT"] = str(place)  # every child has temporary folders of its own
            # What one that hangs leaves behind: where it stood when its time was nearly over.
            stood = open(place / "stood", "w", encoding="utf-8")  # noqa: SIM115
            faulthandler.dump_traceback_later(0.95 * job.seconds, file=stood)
            if items:
                items[0].config.pluginmanager.register(_Heard(place / "tests"))
            with pytest.MonkeyPatch.context() as patch:
                if job.change is not None:
                    job.change(patch)
                for place_in_line, item in enumerate(items):
                    after = items[place_in_line + 1] if place_in_line + 1 < len(items) else None
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                    if self.until == FIRST and any("error" in said for said in _lines(place)):
                        break
        except StaleError as error:
            (place / "stale").write_text(str(error))
        except BaseException:
            (place / "stale").write_text(traceback.format_exc())
        finally:
            os._exit(0)


def _warm() -> None:
    """What nearly every test would import on its first use, seconds each time: torch's functions of functions, data."""
    import networkx  # noqa: F401
    import safetensors.torch  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    torch.vmap(torch.func.grad_and_value(lambda x: (x * x).sum()))(torch.ones(2, 2))
    torch.ones(2, requires_grad=True).sum().backward()
    # What is there by now is no child's garbage: looking through it would copy every page of it for each of them.
    gc.collect()
    gc.freeze()


def _wanted(node: str, test: str) -> bool:
    return node == test or node.startswith((f"{test}[", f"{test}::", f"{test}/"))


def _lines(place: Path) -> list[dict]:
    file = place / "tests"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _read(place: Path, seconds: float, late: bool) -> Found:
    lines = _lines(place)
    failures = [Failure(s["test"], s["error"], s["message"]) for s in lines if "error" in s]
    if late:
        stood = place / "stood"
        where = " < ".join(stood.read_text(encoding="utf-8").split("\n")[1:7]) if stood.exists() else ""
        failures.append(Failure("the next one", "Timeout", f"no end after {seconds:.0f} s: {where}"))
    stale = place / "stale"
    return Found(len({s["test"] for s in lines}), failures, stale.read_text() if stale.exists() else "", seconds)


def run(
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    until: str = ALL,
    tell: Callable[[str, Found], None] = lambda name, found: None,
) -> dict[str, Found]:
    """{name: what came of it}. Raises RuntimeError, with what pytest says, where the tests cannot be collected."""
    plugin, said = _Forks(jobs, workers, until, tell), io.StringIO()
    paths = sorted({test for job in jobs for test in job.tests})
    files = sorted({test.partition("::")[0] for test in paths})
    words = ["-p", "no:cacheprovider", "-p", "no:xdist", "--capture=no", "--rootdir", str(ROOT), "-o", "addopts="]
    words += ["--tb=line", "-m", "not slow and not container", *(str(ROOT / file) for file in files)]
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(said):
            status = pytest.main(words, plugins=[plugin])
    finally:
        os.chdir(before)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) or len(plugin.found) < len(jobs):
        raise RuntimeError(f"pytest ended with {status}:\n{said.getvalue()[-4000:]}")
    return plugin.found
