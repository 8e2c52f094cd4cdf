"""What an installation without extras does; and what each command says of the one that it lacks."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.toml")
# What the extras install, directly or along the way, and the base does not.
ABSENT = (
    *("flwr", "ray", "cryptography", "grpc", "yaml", "requests", "psutil"),
    *("torchvision", "plotly", "sklearn", "scipy", "pandas", "tqdm"),
    *("optuna", "tensorboard", "mlflow", "wandb"),
)
QUICK = ("--set", "run.num-rounds=2", "--set", "engine.path=vmap")
CALLS = """
import contextlib, io, json, sys
for name in {absent!r}:
    sys.modules[name] = None  # from now on `import name` raises ModuleNotFoundError
import fedmom, fedmom.actors.pool, fedmom.flower.grid  # rooms about extras can be imported without them
from fedmom.cli.main import call
for words in {commands!r}:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        status = call(list(words))
    print(json.dumps([status, err.getvalue()]))
assert not [name for name in sys.modules if name.partition(".")[0] in {absent!r} and sys.modules[name]]
"""


def called(absent: tuple[str, ...], commands: list[tuple[str, ...]], folder: Path) -> list[tuple[int, str]]:
    """(exit status, standard error) of each command, where `absent` cannot be imported."""
    code = CALLS.format(absent=absent, commands=commands)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [(status, error) for status, error in map(json.loads, done.stdout.splitlines())]


def test_all_is_every_extra_of_a_users():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert extras["all"] == [
        f"fedmom[{','.join(name for name in extras if name not in ('all', 'docs', 'dev', 'tests'))}]"
    ]


@pytest.mark.slow
def test_the_base_alone_trains_draws_and_compares(tmp_path):
    commands = [
        ("run", CONFIG, "--out", "run", "--quiet", *QUICK),
        ("sweep", CONFIG, "--grid", "algorithm.lr=0.05,0.1", "--out", "sweep", *QUICK),
        ("compare", "sweep"),
        ("partition", CONFIG, "--out", "partition.png"),
        ("topology", CONFIG, "--set", "algorithm.name=d-sgd-m", "--set", "algorithm.topology=erdos-renyi"),
        *((name,) for name in ("keys", "datasets", "models", "algorithms")),
    ]
    for (status, error), words in zip(called(ABSENT, commands, tmp_path), commands, strict=True):
        assert status == 0, (words, error)
        assert not error or words[0] in ("sweep", "compare"), (words, error)
    assert (tmp_path / "run" / "final.safetensors").is_file()
    assert (tmp_path / "run" / "curves.png").is_file()
    assert list((tmp_path / "sweep" / "comparison").glob("*.png"))


TRACKERS = ("tensorboard", "mlflow", "wandb")
TRACKED = ", ".join(TRACKERS)
# {extra: (what is absent, the package that is named, {command: what it begins with})}
LACKING = {
    "flower": (
        ("flwr", "ray", "cryptography"),
        {
            ("run", CONFIG, "--backend", "simulation", "--out", "new"): "run.backend = 'simulation' needs flwr",
            ("run", CONFIG, "--set", "engine.workers=2", "--out", "new"): "engine.workers = 2 needs ray",
            ("sweep", CONFIG, "--grid", "data.alpha=1,2", "--ray", "local", "--out", "new"): "--ray local needs ray",
            ("simulate-app", str(ROOT), "--num-clients", "2"): f"the Flower app in {ROOT} needs flwr",
            ("deploy", "init", "--dir", "new"): "fedmom deploy needs cryptography",
            ("deploy", "up", "--dir", "new", "--app", str(ROOT)): "fedmom deploy needs cryptography",
            ("deploy", "run", CONFIG, "--dir", "new", "--app", str(ROOT)): "fedmom deploy needs cryptography",
        },
    ),
    "vision": (
        ("torchvision", "PIL"),
        {
            ("datasets", "--download", "cifar10"): "data.dataset = 'cifar10' needs torchvision",
            (
                "run",
                CONFIG,
                "--set",
                "data.dataset=cifar10",
                "--out",
                "new",
            ): "data.dataset = 'cifar10' needs torchvision",
            (
                *("run", CONFIG, "--set", "data.dataset=local", "--set", "data.data-dir=images", "--out", "new"),
                *("--set", "data.num-clients=1"),
            ): "data.dataset = 'local'",
        },
    ),
    "report": (("plotly",), {("report", "run"): "no page was drawn: the page needs plotly"}),
    # All three are absent in one process: each is missed by its own name.
    TRACKED: (
        TRACKERS,
        {("run", CONFIG, "--track", name, "--out", "new"): f"tracker {name!r} needs {name}" for name in TRACKERS},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", LACKING)
def test_a_command_names_the_extra_that_it_lacks(extra, tmp_path):
    """In one line with the command that installs it, exit status 2, before anything is written or trained."""
    absent, said = LACKING[extra]
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    picture = tmp_path / "images" / "client-0" / "data" / "train" / "0" / "1.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"")
    before = [("run", CONFIG, "--out", "run", "--quiet", *QUICK)] if extra == "report" else []
    ended = called(absent, [*before, *said], tmp_path)
    assert all(status == 0 for status, _ in ended[: len(before)])
    for (status, error), (words, begins) in zip(ended[len(before) :], said.items(), strict=True):
        package = extra if extra != TRACKED else words[words.index("--track") + 1]
        assert status == 2, (words, error)
        assert error.startswith(f"fedmom: {begins}"), (words, error)
        assert error.endswith(f"which is not installed: pip install 'fedmom[{package}]'\n"), (words, error)
        assert error.count("\n") == 1, (words, error)
    assert not (tmp_path / "new").exists()
