"""Laws of the pool of Ray actors: every message is answered once, whatever becomes of the worker that has it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fedmom.actors.actor import Failure
from fedmom.actors.cluster import PoolOptions
from fedmom.actors.pool import Pool
from fedmom.errors import InputError
from laws import table

# Ray itself is imported by the process that has its tests.
pytestmark = [
    pytest.mark.xdist_group("Ray: rounds"),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]


def make_worker():
    """Handles (what to do, a value)."""
    import os
    import signal
    import time
    from pathlib import Path

    def handle(payload, *shared):
        what, value = payload
        if what == "raise":
            raise ValueError("no\nmore")
        if what == "exit":
            raise SystemExit(3)
        if what == "die":
            with Path(value).open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "die once" and not Path(value).exists():
            Path(value).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(60)
        if what == "sleep":
            time.sleep(value)
        if what == "function":
            return lambda: 0
        if what == "sum":
            return [float(array.sum()) for array in shared], [array.flags.writeable for array in shared]
        if what == "double":
            return 2 * value
        return value, os.getpid()

    return handle


@pytest.fixture(scope="module")
def pool(one_ray):
    with Pool(make_worker, PoolOptions(num_workers=2, num_cpus=0.5, straggler_seconds=3.0)) as pool:
        yield pool


def take_all(pool, number):
    """{key: answer} of `number` messages: no key twice, and nothing more."""
    taken = [pool.take(timeout=60) for _ in range(number)]
    assert None not in taken
    assert pool.take(timeout=0.05) is None
    assert len(dict(taken)) == number
    return dict(taken)


def wait_for_both(pool):
    deadline = time.monotonic() + 30
    while len(pool.worker_pids()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)


def warm_both(pool):
    """Until both have answered: before that the limit of a late message is a longer one."""
    deadline = time.monotonic() + 60
    while len(pool._workers) < 2 or not all(worker.warm for worker in list(pool._workers)):
        assert time.monotonic() < deadline
        submit_all(pool, [("sleep", 0.05) for _ in range(4)])


def submit_all(pool, payloads):
    for key, payload in enumerate(payloads):
        pool.submit(key, payload)
    return take_all(pool, len(payloads))


@table("number", [0, 1, 2, 3, 500])
def test_every_message_is_answered_once_with_its_own_answer(pool, number):
    answers = submit_all(pool, [("echo", value) for value in range(number)])
    assert {key: answer[0] for key, answer in answers.items()} == {key: key for key in range(number)}
    assert {answer[1] for answer in answers.values()} <= set(pool.worker_pids())


def test_both_workers_work_and_batches_form(pool):
    wait_for_both(pool)
    answers = submit_all(pool, [("sleep", 0.001) for _ in range(200)])
    shares = Counter(pid for _, pid in answers.values())
    assert len(shares) == 2
    assert min(shares.values()) > 40


@table("what", ["raise", "exit", "function"])
def test_a_handler_that_fails_fails_alone(pool, what):
    answers = submit_all(pool, [(what if key == 7 else "echo", key) for key in range(20)])
    failure = answers.pop(7)
    assert isinstance(failure, Failure)
    assert failure.kind == "raised"
    if what == "raise":  # where it came from is told, for the traceback stays in the worker
        assert re.fullmatch(r"ValueError: no more \(.*test_pool\.py:\d+\)", failure.reason)
    assert "\n" not in failure.reason
    assert all(answer[0] == key for key, answer in answers.items())


@pytest.mark.slow
def test_a_message_whose_worker_dies_is_tried_again(pool, tmp_path):
    answers = submit_all(pool, [("die once", str(tmp_path / f"{key}")) for key in range(3)])
    assert not any(isinstance(answer, Failure) for answer in answers.values())


@pytest.mark.slow
def test_a_worker_killed_from_outside_costs_no_message(pool):
    for key in range(20):
        pool.submit(key, ("sleep", 0.05))
    assert pool.take(timeout=20) is not None
    killed = pool.worker_pids()[0]
    os.kill(killed, signal.SIGKILL)
    answers = take_all(pool, 19)
    assert not any(isinstance(answer, Failure) for answer in answers.values())
    assert killed not in pool.worker_pids()


@pytest.mark.slow
def test_a_worker_killed_while_idle_costs_no_message(pool):
    os.kill(pool.worker_pids()[0], signal.SIGKILL)
    answers = submit_all(pool, [("echo", key) for key in range(10)])
    assert not any(isinstance(answer, Failure) for answer in answers.values())


@pytest.mark.slow
def test_a_message_that_always_kills_its_worker_fails_and_the_others_do_not(pool, tmp_path):
    payloads = [("die", str(tmp_path / "tries")) if key == 5 else ("echo", key) for key in range(12)]
    answers = submit_all(pool, payloads)
    assert answers.pop(5) == Failure("died", "its Ray actor died 3 times")
    assert all(answer[0] == key for key, answer in answers.items())
    assert (tmp_path / "tries").read_text() == "xxx"


@pytest.mark.slow
def test_a_message_that_hangs_is_late_and_its_worker_replaced(pool):
    warm_both(pool)
    before = set(pool.worker_pids())
    answers = submit_all(pool, [("hang", 0), *[("echo", key) for key in range(1, 8)]])
    assert answers.pop(0) == Failure("late", "no reply within 3 s")
    assert all(answer[0] == key for key, answer in answers.items())
    wait_for_both(pool)
    assert len(set(pool.worker_pids()) - before) >= 1


@pytest.mark.slow
def test_what_waits_behind_a_long_message_goes_elsewhere(pool):
    wait_for_both(pool)
    submit_all(pool, [("echo", 0)] * 200)  # so that batches are large
    for key in range(60):
        pool.submit(key, ("sleep", 2.5 if key == 20 else 0.0005))  # less than what makes it late
    early: set[int] = set()
    while not early >= set(range(21, 60)):
        early.add(pool.take(timeout=60)[0])
    assert 20 not in early
    # Those before it in its batch come with it.
    assert take_all(pool, 60 - len(early)).keys() == set(range(60)) - early


def test_shared_values_and_large_answers_are_views_of_the_store(pool):
    ones = pool.share(np.ones(50_000))
    twos = pool.share(np.full(50_000, 2.0))
    pool.submit("both", ("sum", None), (twos, ones))
    pool.submit("one", ("sum", None), (ones,))
    assert take_all(pool, 2) == {
        "both": ([100_000.0, 50_000.0], [False, False]),
        "one": ([50_000.0], [False]),
    }
    large = np.arange(100_000)
    pool.submit("large", ("double", large))
    answer = take_all(pool, 1)["large"]
    np.testing.assert_array_equal(answer, 2 * large)
    assert not answer.flags.owndata


def test_what_is_forgotten_is_not_taken(pool):
    for key in range(40):
        pool.submit(key, ("sleep", 0.02))
    pool.forget(range(1, 40))
    seen = set()
    while (taken := pool.take(timeout=1.0)) is not None:
        seen.add(taken[0])
    assert 0 in seen
    assert len(seen) <= 3  # what was finished before the pool heard of it
    assert submit_all(pool, [("echo", key) for key in range(40)]).keys() == set(range(40))


def test_take_without_messages_ends_at_its_timeout(pool):
    begun = time.monotonic()
    assert pool.take(timeout=0.1) is None
    assert 0.1 <= time.monotonic() - begun < 5


@table(
    "options, key, right",
    [
        (PoolOptions(num_gpus=0.5), "simulation.num-gpus = 0.5", "Ray sees no GPU here"),
        (PoolOptions(num_cpus=1000), "simulation.num-cpus = 1000", "on one machine"),
        (PoolOptions(num_workers=10_000), "simulation.num-actors = 10000", "fit"),
    ],
)
def test_resources_that_do_not_fit_are_one_line(pool, options, key, right):  # the pool's Ray is joined
    with pytest.raises(InputError, match=key) as caught:
        Pool(make_worker, options)
    assert right in str(caught.value)
    assert "\n" not in str(caught.value)
    assert submit_all(pool, [("echo", 1)])


def broken_worker():
    raise KeyError("nothing\nhere")


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_one_line(pool):
    with pytest.raises(InputError, match="a worker could not start: KeyError") as caught:
        Pool(broken_worker, PoolOptions(num_workers=1, num_cpus=0.01))
    assert "\n" not in str(caught.value)


def dying_worker():
    import os

    os._exit(1)


@pytest.mark.slow
def test_workers_that_die_at_start_again_and_again_are_an_error(pool):
    with pytest.raises(InputError, match="3 Ray actors in a row did not start"):
        Pool(dying_worker, PoolOptions(num_workers=1, num_cpus=0.01))


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from fedmom.actors.cluster import PoolOptions
from fedmom.actors.pool import Pool
def make_worker():
    import time
    return time.sleep
def children():
    import subprocess
    out = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    parents = dict(zip(map(int, out[::2]), map(int, out[1::2])))
    mine = {os.getpid()}
    for _ in range(8):
        mine |= {pid for pid, parent in parents.items() if parent in mine}
    return mine - {os.getpid()}
pool = Pool(make_worker, PoolOptions(num_workers=2))
try:
    pool.submit(0, 60)
    pids = children() | set(pool.worker_pids())
    os.kill(os.getpid(), signal.SIGINT)
    pool.take()
except KeyboardInterrupt:
    begun = time.monotonic()
    pool.close()
    pool.close()
    print(time.monotonic() - begun, *pids)
"""


@pytest.mark.slow
def test_ctrl_c_and_close_leave_no_process():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    seconds, *pids = done.stdout.split()
    assert float(seconds) < 15
    assert len(pids) >= 4  # gcs, raylet, actors
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive
    assert "Started a local Ray" not in done.stdout + done.stderr


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs ray.*pip install 'fedmom\[flower\]'"):
        Pool(lambda: None, PoolOptions())
