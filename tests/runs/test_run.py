"""fedmom.run and the configs, end to end: the numbers of docs/method.md out of the run folder."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import fedmom
import laws
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.engine.paths import PATHS
from fedmom.errors import InputError
from fedmom.records.environment import _command
from fedmom.records.files import read_tensors
from fedmom.records.history import read_rounds
from laws import table

ROOT = Path(__file__).parents[2]
QUIET = [fedmom.Callback()]


@table("nesterov, path, dtype", [(False, "auto", "auto"), (True, "vmap", "float32"), (True, "loop", "auto")])
def test_quadratic_config_gives_the_golden_run_bit_for_bit(tmp_path, nesterov, path, dtype):
    sets = {"algorithm.nesterov": nesterov, "engine.path": path, "run.dtype": dtype}
    result = fedmom.run(ROOT / "configs/quadratic.toml", sets=sets, out=tmp_path / "run", callbacks=QUIET)
    lines = read_rounds(tmp_path / "run")
    means = [point for line in lines for (point,) in line["x_path"]]
    assert means == laws.numbers(laws.GOLDEN_X[nesterov])[1:]
    assert [line["u"] for line in lines] == [[u] for u in laws.numbers(laws.GOLDEN_U[nesterov])]
    assert [line["x"] for line in lines] == [[x] for x in means[1::2]]
    assert result.state_dict["x"].dtype == (torch.float32 if dtype == "float32" else torch.float64)


@table("policy", laws.FIXED_POINTS)
def test_fixed_point_configs(policy):
    result = fedmom.run(ROOT / f"configs/fixed-point/{policy}.toml", callbacks=QUIET)
    want = laws.fixed_point(laws.FIXED_H, laws.FIXED_C, 0.05, 0.9, 5, False, policy)
    assert result.rounds[-1]["x"][0] == pytest.approx(want, abs=1e-9)
    assert result.rounds[-1]["x"][0] - laws.FIXED_OPTIMUM == pytest.approx(laws.FIXED_POINTS[policy], abs=5e-7)


def test_paper_configs_are_the_papers_grid():
    grid = set()
    for path in (ROOT / "configs/paper").glob("*.toml"):
        c = resolve(load(path)).config
        assert (c.model.name, c.data.dataset, c.data.batch_size, c.algorithm.beta) == ("resnet56", "cifar10", 64, 0.9)
        assert c.run.num_steps * c.data.num_clients * 64 == 160 * 50_000
        grid.add((c.data.num_clients, c.algorithm.num_local_steps, c.algorithm.lr_schedule))
    assert grid == {(n, i, s) for n in (2, 4, 8) for i in (1, 4, 8, 16) for s in ("constant", "step")}


def test_run_from_python_returns_what_the_folder_holds(tmp_path):
    seen = []

    class Watch(fedmom.Callback):
        def on_start(self, start):
            seen.append(("start", start.first_round, start.client_steps))

        def on_round(self, record, state):
            seen.append(("round", record["round"]))
            assert set(state.params) == set(state.momentum)

        def on_end(self, result):
            seen.append(("end", result.status))

    config = {"data": {"num_clients": 5}, "model": {"name": "logistic"}, "run": {"num_rounds": 3}}
    result = fedmom.run(config, sets=["algorithm.num-local-steps=2"], out=tmp_path / "run", callbacks=[Watch()])
    assert seen == [("start", 1, 10), ("round", 1), ("round", 2), ("round", 3), ("end", "done")]
    assert result.rounds == read_rounds(tmp_path / "run")
    tensors, _ = read_tensors(tmp_path / "run/final.safetensors")
    assert {f"params/{name}" for name in result.state_dict} == {n for n in tensors if n.startswith("params/")}
    about = json.loads((tmp_path / "run/environment.json").read_text())
    assert about["versions"]["torch"] == torch.__version__.partition("+")[0]
    resolved = tomllib.loads((tmp_path / "run/config.toml").read_text())
    assert resolved["engine"]["path"] in PATHS
    again = fedmom.run(tmp_path / "run/config.toml", callbacks=QUIET)
    for name, value in result.state_dict.items():
        assert torch.equal(value, again.state_dict[name])


def test_state_dict_loads_into_the_model():
    from fedmom.tasks.models import build_model

    config = {"data": {"num_clients": 2, "batch_size": 4}, "model": {"name": "resnet20"}}
    sets = {"run.num-rounds": 1, "algorithm.num-local-steps": 1, "engine.path": "loop"}
    result = fedmom.run(config, sets=sets, callbacks=QUIET)
    model = build_model("resnet20", (1, 8, 8), 10, seed=1)
    model.load_state_dict(result.state_dict)
    counts = [value for name, value in result.state_dict.items() if name.endswith("num_batches_tracked")]
    assert len(counts) == 19
    assert all(count.dtype == torch.int64 and int(count) == 1 for count in counts)


def test_own_data_and_model_by_name(in_tmp):
    (in_tmp / "mine.py").write_text(
        "import numpy as np, torch\n"
        "def data():\n"
        "    rng = np.random.default_rng(0)\n"
        "    x, y = rng.normal(size=(90, 5)).astype('float32'), np.arange(90) % 3\n"
        "    x[np.arange(90), y] += 3\n"
        "    return x[:60], y[:60], x[60:], y[60:]\n"
        "def net(input_shape, num_classes):\n"
        "    return torch.nn.Sequential(torch.nn.Linear(input_shape[0], 8), torch.nn.Dropout(0.1),\n"
        "                               torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, num_classes))\n"
    )
    config = {"data": {"dataset": "mine:data", "num_clients": 3, "batch_size": 8}, "model": {"name": "mine:net"}}
    result = fedmom.run(config, sets={"run.num-rounds": 25, "data.alpha": 5.0}, callbacks=QUIET)
    assert result.rounds[-1]["test_accuracy"] > 0.8


@table("num_clients", [1, 2, 1437])
def test_from_one_client_to_one_example_each(num_clients):
    sets = {"run.num-rounds": 1, "algorithm.num-local-steps": 2, "model.name": "logistic", "data.partition": "iid"}
    sets["engine.path"] = "stack"  # a busy machine may time the loop as the faster one, and it takes 4 s
    result = fedmom.run({"data": {"num_clients": num_clients}}, sets=sets, callbacks=QUIET)
    assert result.rounds[0]["num_clients"] == num_clients
    assert (result.rounds[0]["consensus_distance"] == 0) == (num_clients == 1)


def test_parallel_sgd_m_and_local_sgd_are_the_methods_special_cases():
    base = {"data": {"num_clients": 3}, "model": {"name": "logistic"}, "run": {"num_rounds": 4}}
    one = fedmom.run(base, sets={"algorithm.num-local-steps": 1}, callbacks=QUIET)
    named = fedmom.run(base, sets={"algorithm.name": "parallel-sgd-m"}, callbacks=QUIET)
    for name, value in one.state_dict.items():
        torch.testing.assert_close(value, named.state_dict[name], rtol=1e-5, atol=1e-6)
    assert named.config.algorithm.num_local_steps == 1
    plain = fedmom.run(base, sets={"algorithm.name": "local-sgd"}, callbacks=QUIET)
    reset = fedmom.run(base, sets={"algorithm.beta": 0.0}, callbacks=QUIET)
    assert plain.config.algorithm.beta == 0
    for name, value in plain.state_dict.items():
        torch.testing.assert_close(value, reset.state_dict[name], rtol=1e-5, atol=1e-6)


def test_warning_when_steps_are_unequal():
    config = {"data": {"num_clients": 4, "partition": "quantity", "batch_size": 16}, "model": {"name": "logistic"}}
    stops = fedmom.EarlyStopping("train_loss", target=0.0)  # which does not show what should be known
    with pytest.warns(UserWarning, match="not the paper's"):
        fedmom.run(config, sets={"algorithm.local-epochs": 1, "run.num-rounds": 1}, callbacks=[stops])


@pytest.mark.slow
def test_quickstart_config_reaches_what_it_says(tmp_path):
    """Through the command, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "fedmom",
        "run",
        str(ROOT / "configs/quickstart.toml"),
        "--out",
        str(tmp_path / "q"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(tmp_path / "q")
    assert read_rounds(tmp_path / "q")[-1]["test_accuracy"] > 0.95
    assert (tmp_path / "q/curves.png").stat().st_size > 10_000


def test_a_token_on_the_command_line_does_not_get_into_the_folder():
    words = ["/usr/bin/flwr-serverapp", "--token", "s3cret", "--run-id", "7", "--insecure"]
    assert _command(words) == ["flwr-serverapp", "--token", "…", "--run-id", "7", "--insecure"]
    assert _command(["x", "--token=s3cret"]) == ["x", "--token=…"]
    assert _command(["fedmom", "run", "a.toml"]) == ["fedmom", "run", "a.toml"]


def test_what_the_method_multiplies_by_must_be_a_number_of_the_runs_dtype():
    sets = {"data.num-clients": 2, "model.name": "logistic", "run.num-rounds": 1, "run.dtype": "float32"}
    for key in ("lr", "weight-decay"):
        with pytest.raises(
            InputError, match=rf"algorithm\.{key} = 1e\+39: in run\.dtype = 'float32' .* at most 3\.4e\+38"
        ):
            fedmom.run({**sets, f"algorithm.{key}": 1e39})
