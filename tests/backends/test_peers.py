"""Algorithm 2 on Ray actors that exchange rows directly: the engine's result, and none of the model in the driver."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmom
from fedmom.backends.peer import senders, without_blocks
from fedmom.backends.peers import Peers
from fedmom.config.build import make_plan, make_problem
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.errors import ClientsFailedError, InputError
from fedmom.method.decentralized.topology import make_topology
from fedmom.records.files import read_about, read_tensors
from fedmom.records.history import read_rounds
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("Ray: rounds")
on_ray = pytest.mark.usefixtures("one_ray")
BASE = {
    "algorithm.name": "d-sgd-m",
    "data.num-clients": 5,
    "data.batch-size": 5,
    "model.name": "mlp",
    "model.hidden": 8,
    "run.num-rounds": 4,
    "run.eval-every": 2,
    "run.checkpoint-every": 2,
    "run.dtype": "float64",
    "engine.path": "vmap",
    "engine.chunk-size": 5,
    "simulation.num-cpus": 0.25,
}
TIMED = {"wall_seconds", "client_steps_per_second"}


class Quiet(fedmom.Callback):
    wants_state = False


def settled(changes):
    config = resolve(load({**BASE, "engine.workers": 2, **changes})).config
    return config, make_problem(config, "cpu"), make_plan(config)


CASES = [
    {"algorithm.topology": "ring"},
    {"algorithm.topology": "complete", "model.name": "resnet20", "run.num-rounds": 2, "data.num-clients": 3},
]


class Look(fedmom.Callback):
    """Has the state gathered in every round."""

    def __init__(self):
        self.seen = []

    def on_round(self, record, state):
        self.seen.append(next(iter(state.params.values())).clone())


@on_ray
@pytest.mark.slow
@pytest.mark.parametrize("changes", CASES, ids=lambda c: c["algorithm.topology"])
def test_peers_give_the_engines_result(tmp_path, changes):
    engine = fedmom.run(BASE, sets=changes, out=tmp_path / "engine", callbacks=[Quiet()])
    look = Look() if changes["algorithm.topology"] == "ring" else Quiet()
    peers = fedmom.run(BASE, sets={"engine.workers": 2, **changes}, out=tmp_path / "peers", callbacks=[look])
    assert peers.status == "done", peers.message
    if isinstance(look, Look):
        assert len(look.seen) == 4
        assert not torch.equal(look.seen[0], look.seen[1])
        assert torch.equal(look.seen[-1], next(iter(peers.state_dict.values())))
    for name in ("final.safetensors", "clients.safetensors"):
        ours, theirs = (read_tensors(tmp_path / which / name)[0] for which in ("engine", "peers"))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-10, atol=1e-10, msg=key)
    for mine, other in zip(engine.rounds, peers.rounds, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() - TIMED:
            np.testing.assert_allclose(other[key], mine[key], rtol=1e-7, atol=1e-12, err_msg=key)


@on_ray
@pytest.mark.slow
def test_what_passes_through_the_driver_is_small_and_an_actor_that_cannot_work_is_named():
    """Rows of 1.5 MB, some kB per round."""
    config, problem, plan = settled({"model.hidden": 500, "run.eval-every": 2, "algorithm.topology": "ring"})
    rounds = Peers(config, problem, plan)
    try:
        seen = [rounds.driver_bytes for _ in run_rounds(problem, plan, rounds, beginning(problem, plan))]
        assert max(seen[1:]) < 4000  # the first round loads the start into the actors
        with pytest.raises(ClientsFailedError, match="round 1: clients 0 … 2"):
            rounds._all([rounds.peers[0].collect.remote(7)], [0], 0)
    finally:
        rounds.close()


OWN_DATA = """
import numpy as np
import ray

def data():
    if ray.get_runtime_context().worker.mode == 1:  # in an actor
        raise OSError("not on this machine")
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    return {"x_train": x, "y_train": np.arange(20) % 2, "x_test": x, "y_test": np.arange(20) % 2}
"""


@on_ray
@pytest.mark.slow
def test_data_that_an_actor_alone_cannot_read_are_a_line_of_their_key(tmp_path, monkeypatch):
    (tmp_path / "actors_data.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"engine.workers": 2, "data.dataset": "actors_data:data", "data.partition": "iid"}
    with pytest.raises(InputError, match=r"^data\.dataset = 'actors_data:data': .*OSError: not on this machine$"):
        fedmom.run(BASE, sets=changes, callbacks=[Quiet()])


class KillAfter(Quiet):
    """SIGKILL an actor after the second round."""

    def on_round(self, record, state):
        if record["round"] == 3:
            import ray
            from ray.util.state import list_actors

            del list_actors
            peers = self.rounds.peers
            self.pid = ray.get(peers[1].__ray_call__.remote(lambda self: os.getpid()))
            os.kill(self.pid, signal.SIGKILL)


@on_ray
@pytest.mark.slow
def test_a_dead_actor_stops_the_run_by_name_and_the_checkpoint_goes_on(tmp_path, monkeypatch):
    killer = KillAfter()
    original = Peers.__init__

    def remember(self, *arguments):
        original(self, *arguments)
        killer.rounds = self

    monkeypatch.setattr(Peers, "__init__", remember)
    changes = {"engine.workers": 2, "algorithm.topology": "ring"}
    result = fedmom.run(BASE, sets=changes, out=tmp_path / "part", callbacks=[killer])
    assert result.status == "failed"
    assert "round 4: clients 3 … 4: their Ray actor died" in result.message
    resumed = fedmom.run(resume=tmp_path / "part", callbacks=[Quiet()])
    assert resumed.status == "done"
    fedmom.run(BASE, sets=changes, out=tmp_path / "whole", callbacks=[Quiet()])
    for name in ("final.safetensors", "clients.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes()
    assert [record["round"] for record in read_rounds(tmp_path / "part")] == [1, 2, 3, 4]


def lose_rows(monkeypatch, link, in_round):
    """Free the rows of one link before they are fetched: a true loss in Ray's store."""
    import ray

    original = Peers._gather

    def gather(self, stepped, number):
        if number == in_round:
            ray._private.internal_api.free([stepped[link[0]]["out"][link[1]]])
        return original(self, stepped, number)

    monkeypatch.setattr(Peers, "_gather", gather)


@on_ray
@pytest.mark.slow
def test_a_lost_link_stops_the_run_by_name(tmp_path, monkeypatch):
    lose_rows(monkeypatch, (0, 1), 1)
    changes = {"engine.workers": 2, "algorithm.topology": "ring", "simulation.straggler-seconds": 60.0}
    result = fedmom.run(BASE, sets=changes, out=tmp_path / "run", callbacks=[Quiet()])
    assert result.status == "failed"
    assert "round 2: rows from clients 0 … 2 to clients 3 … 4 did not arrive" in result.message


@on_ray
@pytest.mark.slow
def test_a_lost_link_can_be_skipped_where_w_is_symmetric(monkeypatch):
    """Both diagonals take the pair's weight: the result is the engine's with that W, and the mean is kept."""
    lose_rows(monkeypatch, (0, 1), 0)
    changes = {"algorithm.topology": "ring", "simulation.on-link-failure": "skip", "simulation.straggler-seconds": 60.0}
    config, problem, plan = settled({**changes, "run.num-rounds": 1})
    rounds = Peers(config, problem, plan)
    try:
        ((done, record),) = run_rounds(problem, plan, rounds, beginning(problem, plan))
        rows = done.gathered().rows
    finally:
        rounds.close()
    assert record["num_skipped_links"] == 1
    ring = make_topology("ring", 5).matrices[0]
    fewer = without_blocks(ring, [np.array([0, 1, 2]), np.array([3, 4])], [(0, 1)])
    from fedmom.engine.engine import Engine
    from fedmom.engine.gossip import GossipRounds
    from fedmom.method.decentralized.topology import Topology

    alone = plan._replace(topology=Topology("fewer", [fewer]))
    engine = GossipRounds(Engine(problem, plan.method, path="vmap", chunk_size=5), alone.topology, "cpu")
    ((want, _),) = run_rounds(problem, alone, engine, beginning(problem, alone))
    for name, value in want.rows.params.items():
        torch.testing.assert_close(rows.params[name], value, rtol=1e-12, atol=1e-12)


def test_skipping_needs_a_symmetric_matrix():
    config, problem, plan = settled({"algorithm.topology": "directed-ring", "simulation.on-link-failure": "skip"})
    with pytest.raises(InputError, match=r"on-link-failure = 'skip': topology 'directed-ring' is directed"):
        Peers(config, problem, plan)


def test_who_sends_to_whom():
    ring = make_topology("ring", 6).matrices[0]
    blocks = np.array_split(np.arange(6), 3)
    assert senders(ring, blocks[0], blocks[1]).tolist() == [1]
    assert senders(ring, blocks[1], blocks[0]).tolist() == [2]
    assert without_blocks(ring, blocks, []) is ring


@pytest.mark.slow
@pytest.mark.xdist_group("Ray: fresh")
def test_a_hung_actor_is_late_by_name_and_nobody_waits_for_it(tmp_path):
    """Its rows cannot be had for the last checkpoint either: the one before it stays."""
    config = ROOT / "configs" / "decentralized" / "ring.toml"
    command = [
        sys.executable,
        "-m",
        "fedmom",
        "run",
        str(config),
        "--set=engine.workers=2",
        "--out",
        str(tmp_path / "x"),
    ]
    command += ["--set=run.num-rounds=100000", "--set=run.checkpoint-every=5", "--set=simulation.straggler-seconds=30"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        while len(read_rounds(tmp_path / "x")) < 8:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        (hung, *_) = actors_of(process.pid)
        os.kill(hung, signal.SIGSTOP)
        _, err = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 4, err
    assert "no answer within 30 s (simulation.straggler-seconds)" in err
    assert read_about(tmp_path / "x" / "checkpoint.safetensors")["round"] >= 5


def actors_of(pid):
    """Process ids of a driver's Peer actors, as Ray names them: children of its children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            number, words = int(path.parent.name), path.read_bytes()
            if words.startswith(b"ray::Peer") and pid in ancestors(number):
                found.append(number)
        except OSError:
            continue
    return found


def ancestors(pid):
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found
