"""Who may import what: on the syntax tree, and by running without the packages that are extras."""

import ast
import functools
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fedmom", "strategies", "clients")
MODULES = sorted((ROOT / "fedmom").rglob("*.py"))
# An extra is imported by these files only, and only when it is used.
EXTRAS = {
    "torchvision": {"datasets.py"},
    "sklearn": {"datasets.py"},
    "matplotlib": {"pictures.py"},
    "plotly": {"write.py"},
    "jinja2": {"write.py"},
    "mlflow": {"trackers.py"},
    "wandb": {"trackers.py"},
    "flwr": {"flower_app.py", "ray_client.py", "ray_grid.py", "ray_messages.py"},
    "ray": {"ray_start.py", "peers.py"},
}
IMPORT_CALLS = ("__import__", "import_module", "importlib.import_module")
MAY_BE_ABSENT = ("flwr", "ray", "torchvision", "matplotlib", "plotly")


def imports(node: ast.AST) -> list[str]:
    """Top-level packages that the node imports, by statement or by name: "fedmom" for fedmom.engine.engine."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module] if node.level == 0 and node.module else ["fedmom"]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORT_CALLS:
        names = [ast.literal_eval(argument) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    else:
        names = []
    return [name.partition(".")[0] for name in names]


@functools.cache
def imported(path: Path) -> dict[str, bool]:
    """{package: whether some import of it runs as soon as the file is imported}."""
    found: dict[str, bool] = {}

    def visit(node: ast.AST, lazy: bool) -> None:
        for name in imports(node):
            found[name] = found.get(name, False) or not lazy
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def test_the_walk_sees_every_kind_of_import(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "import ray.data as d\nif d:\n    from flwr import x\nclass A:\n    import b\n"
        "def f():\n    import torchvision\n    importlib.import_module('sklearn.svm')\nfrom .state import y\n"
    )
    eager, lazy = dict.fromkeys(["ray", "flwr", "b", "fedmom"], True), dict.fromkeys(["torchvision", "sklearn"], False)
    assert imported(path) == {**eager, **lazy}


@pytest.mark.parametrize("package", EXTRAS)
def test_an_extra_is_imported_in_one_file_and_only_when_used(package):
    users = {path.name: imported(path)[package] for path in MODULES if package in imported(path)}
    assert set(users) <= EXTRAS[package]
    assert not any(users.values()), f"{package} is imported as soon as fedmom is: {users}"
    if any(path.name in EXTRAS[package] for path in MODULES):
        assert users, f"the rule for {package} looks at nothing"


def test_the_library_knows_neither_strategies_nor_clients():
    assert MODULES
    for path in MODULES:
        assert not {"strategies", "clients", "tests", "benchmarks"} & set(imported(path)), path


def test_the_mathematics_does_not_know_the_configuration():
    for name in ("algorithms", "averaging", "engine", "train", "objective", "quadratic", "schedules"):
        source = (ROOT / "fedmom" / f"{name}.py").read_text(encoding="utf-8")
        modules = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        assert modules, name
        assert not {"fedmom.config.keys", "fedmom.config.resolve", "fedmom.runs.execute", "fedmom.cli.main"} & set(
            modules
        ), name


BARE = """
import sys
import zipfile
for name in {absent!r}:
    sys.modules[name] = None  # from now on `import name` raises ModuleNotFoundError
import fedmom
import fedmom.cli.main
small = {{"model.name": "logistic", "data.num-clients": 3, "engine.path": "vmap"}}
for name, rounds, keys in [("digits", 2, small), ("quadratic", 2, {{}}), ("tiny.npz", 1, small)]:
    config = {{"data.dataset": name, "run.num-rounds": rounds, **keys}}
    result = fedmom.run(config, out=f"run-{{name}}", callbacks=[fedmom.Callback()])
    assert result.status == "done" and len(result.rounds) == rounds, result
    assert (result.folder / "final.safetensors").is_file()
status = fedmom.cli.main.call(["run", "run-tiny.npz/config.toml", "--out", "by-command", "--quiet"])
assert status == 0, status
assert not [name for name in sys.modules if name.partition(".")[0] in {absent!r} and sys.modules[name]]
"""


def test_the_engine_runs_where_the_extras_are_missing(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)).astype(np.float32), np.arange(20) % 2
    np.savez(tmp_path / "tiny.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    code = BARE.format(absent=MAY_BE_ABSENT)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["by-command"]
    assert done.stderr == "fedmom: no picture was drawn: matplotlib is not installed\n"
    assert not list(tmp_path.rglob("*.png"))
    assert (tmp_path / "by-command" / "final.safetensors").is_file()


SIDES = {"strategies": "clients", "clients": "strategies"}


@pytest.mark.parametrize(("side", "other"), SIDES.items())
def test_the_two_sides_of_flower_never_meet(side, other):
    files = sorted((ROOT / side).rglob("*.py"))
    assert files
    for path in files:
        packages = set(imported(path))
        assert not {other, "tests", "benchmarks", "ray", "torchvision", "matplotlib"} & packages, path
    assert any("fedmom" in imported(path) and "flwr" in imported(path) for path in files)


OWN = """
import sys
import zipfile
sys.path.insert(0, "")
import clients.mine, strategies  # the user's, before ours and after
from fedmom.flower.app import load_components
from fedmom.flower.client import load_component
components = load_components({root!r})
for kind in ("ServerApp", "ClientApp"):
    load_component(kind, getattr(components, f"{{kind[:6].lower()}}_app"), __import__("pathlib").Path({root!r}))
import strategies.later
assert (clients.mine.whose, strategies.later.whose) == ("mine", "mine")
"""


def test_a_project_may_have_packages_called_clients_and_strategies(tmp_path):
    for name in ("clients/__init__", "clients/mine", "strategies/__init__", "strategies/later"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("whose = 'mine'\n")
    code = OWN.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_flowers_bundle_holds_every_file_of_code():
    """What git ignores stays out of a bundle without a word: so would a package runs/, were .gitignore not anchored."""
    from flwr.cli.build import build_fab_from_disk

    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT)))
    code = {path.relative_to(ROOT).as_posix() for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    assert len(code) > 100
    assert code <= set(bundle.namelist()), code - set(bundle.namelist())
