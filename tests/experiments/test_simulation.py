"""`fedmom run --backend simulation` on real Ray actors: the engine's result, also when actors die in mid-round."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fedmom
from fedmom.errors import InputError
from fedmom.records.files import read_tensors
from fedmom.records.history import read_rounds

pytestmark = pytest.mark.xdist_group("Ray: rounds")
ROOT = Path(__file__).parents[2]
DIGITS = {
    "data.num-clients": 5,
    "model.name": "logistic",
    "run.dtype": "float64",
    "run.num-rounds": 3,
    "algorithm.num-local-steps": 2,
    "engine.path": "loop",
    "simulation.num-actors": 2,
    "simulation.num-cpus": 0.5,
}


QUIET = fedmom.Callback()


def run(changes, **options):
    return fedmom.run(changes, callbacks=[QUIET], **options)


def assert_same(one, other, tolerance=1e-10):
    for a, b in ((one.state_dict, other.state_dict), (one.momentum, other.momentum)):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)
    assert [record["num_clients"] for record in one.rounds] == [record["num_clients"] for record in other.rounds]


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_the_simulation_is_the_engines_run_and_resumes(tmp_path):
    changes = {**DIGITS, "run.backend": "simulation", "algorithm.nesterov": True, "simulation.clients-per-node": 2}
    first = run({**changes, "run.num-rounds": 2}, out=tmp_path / "run")
    assert (first.status, first.config.run.backend) == ("done", "simulation")
    whole = run(None, sets={"run.num-rounds": 3}, resume=tmp_path / "run")
    assert [record["round"] for record in whole.rounds] == [1, 2, 3]
    engine = run({**DIGITS, "algorithm.nesterov": True}, out=tmp_path / "engine")
    assert_same(whole, engine)
    final, _ = read_tensors(tmp_path / "run" / "final.safetensors")
    right, _ = read_tensors(tmp_path / "engine" / "final.safetensors")
    assert final.keys() == right.keys()


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_workers_share_the_engines_clients():
    changes = {**DIGITS, "data.num-clients": 11, "algorithm.momentum-policy": "local", "algorithm.cohort-size": 7}
    engine = run({**changes, "engine.path": "vmap", "engine.chunk-size": 2})
    shared = run({**changes, "engine.path": "vmap", "engine.chunk-size": 2, "engine.workers": 2})
    assert_same(shared, engine)
    for mine, theirs in zip(shared.rounds, engine.rounds, strict=True):
        for key in ("train_loss", "consensus_distance", "momentum_spread", "test_loss", "bytes_sent"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-9), key


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_workers_find_their_own_way():
    changes = {**DIGITS, "engine.workers": 2, "engine.path": "auto"}
    assert_same(run(changes), run(DIGITS))


# Failures


@pytest.fixture
def faulty(tmp_path, one_ray):
    """A Flower app like ours whose client 3 fails in round 2 -> f(fault, how often) gives its folder."""
    folder = tmp_path / "app"
    folder.mkdir()
    text = (ROOT / "pyproject.toml").read_text()
    named = 'clientapp = "fedmom.flower.client_app:app"'
    assert named in text
    (folder / "pyproject.toml").write_text(text.replace(named, 'clientapp = "faulty_client:app"'))
    shutil.copy(ROOT / "tests" / "apps" / "faulty_client.py", folder)

    def make(fault, most=1):
        (tmp_path / "tries").write_text("")
        one_ray.write_text(json.dumps({"fault": fault, "most": most, "tries": str(tmp_path / "tries")}))
        return folder

    return make


SIMULATED = {**DIGITS, "run.backend": "simulation"}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "retry"])
def test_a_killed_actor_whose_message_is_not_tried_again(faulty, policy):
    keys = {**SIMULATED, "simulation.retries": 0, "server.on-failure": policy}
    result = run(keys, app=faulty("kill"))
    if policy == "stop":
        assert result.status == "failed"
        assert result.message.startswith("round 2: client 3, node ")
        assert "died" in result.message
        assert len(result.rounds) == 1
    else:
        assert_same(result, run(DIGITS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "policy", "reason"),  # every policy on every fault is test_flower's, on a Grid without actors
    [
        ("raise", "stop", "no more disk"),
        ("hang", "stop", "no reply within 15 s"),
        ("hang", "retry", ""),
    ],
)
def test_a_client_that_fails_by_itself(faulty, policy, fault, reason):
    keys = {**SIMULATED, "server.on-failure": policy}
    if fault == "hang":  # one actor: the message is not its first, which may take longer than that
        keys |= {"simulation.straggler-seconds": 15.0, "simulation.num-actors": 1}
    result = run(keys, app=faulty(fault))
    if policy == "stop":
        assert result.status == "failed"
        assert result.message.startswith("round 2: client 3, node ")
        assert reason in result.message
    else:
        assert_same(result, run(DIGITS))


def begun(tmp_path, how):
    """(a run's process, its folder, the processes below it), three rounds after its beginning."""
    changes = [f"--set={name}={value}" for name, value in {**DIGITS, "run.num-rounds": 5000}.items()]
    command = [sys.executable, "-m", "fedmom", "run", str(ROOT / "configs" / "quickstart.toml"), *changes]
    command += ["--set=run.eval-every=1000", *how, "--out", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, cwd=ROOT, start_new_session=True)
    while len(read_rounds(tmp_path / "run")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    return process, tmp_path / "run", below(process.pid)


def below(pid):
    """{process id: name} of a process's children and theirs."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            front, _, rest = stat.read_text().rpartition(")")
            number, _, name = front.partition(" (")
            names[int(number)], parents[int(number)] = name, int(rest.split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: names[child] for child in found - {pid}}


def assert_gone(pids):
    deadline = time.monotonic() + 600
    while alive := [pid for pid in pids if _runs(str(pid))]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)


WAYS = {
    "simulation": ["--backend=simulation"],
    "workers": ["--set=engine.workers=2"],
    "peers": ["--set=engine.workers=2", "--set=algorithm.name=d-sgd-m", "--set=algorithm.topology=ring"],
}


@pytest.mark.slow
@pytest.mark.xdist_group("Ray: fresh")
@pytest.mark.parametrize(("way", "number"), [("simulation", signal.SIGTERM), ("workers", signal.SIGINT)])
def test_a_signal_to_all_leaves_a_checkpoint_and_no_processes(tmp_path, way, number):
    """As Ctrl-C on a terminal sends it; SIGTERM too, for which Ray has a handler of its own: `docker stop` sends it."""
    process, folder, processes = begun(tmp_path, WAYS[way])
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 130, err
    assert err.startswith("fedmom: interrupted after round")
    assert len(err.splitlines()) == 2
    assert (folder / "checkpoint.safetensors").is_file()
    assert_gone(processes)


@pytest.mark.slow
@pytest.mark.xdist_group("Ray: fresh")
@pytest.mark.parametrize(("way", "part"), [("simulation", "gcs_server"), ("peers", "raylet")])
def test_a_run_whose_ray_was_killed_ends_with_a_line_and_goes_on(tmp_path, way, part):
    process, folder, processes = begun(tmp_path, WAYS[way])
    os.kill(next(pid for pid, name in processes.items() if name == part), signal.SIGKILL)
    _, err = process.communicate(timeout=1500)
    assert process.returncode == 4, err
    first, second = err.splitlines()
    assert "raylet" in first or "head" in first
    assert second == f"fedmom: go on with: fedmom run --resume {folder}"
    last = len(read_rounds(folder)) + 2

    class Until(fedmom.Callback):
        def on_round(self, record, state):
            if record["round"] == last:
                raise KeyboardInterrupt

    again = fedmom.run(None, resume=folder, callbacks=[Until()])
    assert [record["round"] for record in again.rounds] == [*range(1, last + 1)]
    own = dict(option[6:].split("=") for option in WAYS[way] if "algorithm." in option)
    changes = {**DIGITS, **own, "run.num-rounds": last}
    assert_same(again, fedmom.run(ROOT / "configs" / "quickstart.toml", sets=changes, callbacks=[QUIET]))
    assert_gone(processes)


def _runs(pid: str) -> bool:
    """Whether a process is there and no zombie, which only waits for its parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Bad input


@pytest.mark.usefixtures("one_ray")
def test_what_cannot_be_simulated_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"simulation\.num-gpus = 0\.5|num-gpus"):
        run({**SIMULATED, "simulation.num-gpus": 0.5})
    with pytest.raises(InputError, match=r"pyproject\.toml"):
        run(SIMULATED, app=tmp_path)
    with pytest.raises(InputError, match="'fedavg': is Flower's"):
        run({**DIGITS, "server.strategy": "fedavg"})
    with pytest.raises(InputError, match="start it with `flwr run`"):
        run({**DIGITS, "run.backend": "flower"})
