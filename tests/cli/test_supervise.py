"""How a command ends whose own process cannot say so, and who hears Ctrl-C. Nothing here needs Ray."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laws import table

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs fork and sigwaitinfo")

SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
from fedmom.cli import supervise

def call():
    supervise.stand_by(Path(__file__), "go on with: this")
    return act()

def say(*words):
    print(*words, flush=True)

def act():
    {body}

sys.exit(supervise.main(call))
"""


@pytest.fixture
def start(tmp_path):
    """f(what the command does) -> its process."""
    begun = []

    def make(body):
        path = tmp_path / "command.py"
        path.write_text(SCRIPT.format(body=body.replace("\n", "\n    ")))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, path], **pipes, env=environment, start_new_session=True)
        begun.append(process)
        return process

    yield make
    for process in begun:
        process.kill()
        process.communicate()


@table(
    "body, status, said",
    [
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("raise ValueError('ours')", 1, "ValueError: ours\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 4, "killed (signal 9), perhaps for want of memory\n"),
        ("os._exit(1)", 4, "Ray ended the run's process: its raylet or its head was killed"),
    ],
)
def test_every_end_has_its_status_and_one_line(start, body, status, said):
    process = start(body)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert said in err
    assert ("fedmom: go on with: this" in err) == (status == 4)
    assert ("Traceback" in err) == (status == 1)
    assert status == 1 or len(err.splitlines()) == 2 * (status == 4)


def test_ctrl_c_is_heard_once_and_by_the_run_alone(start):
    """A terminal sends it to the whole group: helpers of the run, such as Ray's processes, must not hear of it."""
    process = start("""helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
try:
    say("ready")
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    say("heard", helper.poll())
    helper.kill()
return 130""")
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("heard None\n", "", 130)


def test_a_second_ctrl_c_ends_it_at_once(start):
    process = start("""signal.signal(signal.SIGINT, lambda *_: say("heard"))
say("ready")
while True:
    time.sleep(60)""")
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "heard\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "fedmom: interrupted\nfedmom: go on with: this\n")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a child that its parent was killed")
def test_a_killed_command_leaves_no_run_behind(start):
    process = start("say(os.getpid())\ntime.sleep(60)")
    child = int(process.stdout.readline())
    assert child != process.pid
    process.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}/stat").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
