"""Which room may import which, on the syntax trees; and how large a room may be."""

import ast
import functools
import io
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from sources import tree_of

pytestmark = pytest.mark.xdist_group("sources")  # one process parses them
ROOT = Path(__file__).parents[2]
FOLDERS = ("fedmom", "strategies", "clients")
FILES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))

# Every room of the house and what it imports: only what stands above it. docs/design.md says what each is for.
LAYERS = {
    "errors": "",
    "user_code": "errors",
    "machine": "errors",
    "method": "errors machine",
    "travel": "method",
    "actors": "errors user_code machine",
    "data": "errors user_code machine method",
    "tasks": "errors user_code machine method data",
    "rounds": "errors method travel tasks",
    "engine": "errors user_code machine method data tasks rounds",
    "config": "errors user_code machine method travel actors data tasks rounds engine",
    "records": "errors user_code machine method data tasks rounds config",
    "backends": "errors user_code machine method travel actors data tasks rounds engine config records",
    "results": "errors user_code machine method data tasks rounds config records",
    "runs": "errors user_code machine method travel tasks rounds config records results",
    "flower": "errors user_code method actors",
    "deploy": "errors user_code machine method config records runs",
    "experiments": "errors user_code machine method actors data tasks rounds engine config backends records runs "
    "flower",
    "cli": "errors user_code machine method actors data tasks rounds config records runs flower deploy experiments "
    "results",
    "strategies": "errors machine method travel data tasks rounds engine config backends records runs flower results",
    "clients": "errors machine method config data tasks backends flower",
}
# What every installation has, and what any file may import.
BASE = {"click", "numpy", "safetensors", "torch"}
# What is not every user's, or not every command's: the one or two places that import it.
EXTRAS = {
    "flwr": ("fedmom/flower/", "strategies/", "clients/"),
    "cryptography": ("fedmom/deploy/certificates.py",),
    "ray": ("fedmom/actors/cluster.py", "fedmom/backends/peers.py", "fedmom/backends/peer.py"),
    "torchvision": ("fedmom/data/shipped.py",),
    "PIL": ("fedmom/data/sources/images.py",),
    "datasets": ("fedmom/data/sources/hugging_face.py",),
    "networkx": ("fedmom/method/decentralized/graphs.py",),
    "matplotlib": ("fedmom/results/pictures/",),
    "plotly": ("fedmom/results/page/write.py",),
    "jinja2": ("fedmom/results/page/write.py",),
    "typer": ("fedmom/cli/",),
    "rich": ("fedmom/cli/", "fedmom/runs/progress.py", "fedmom/runs/bars.py", "strategies/server_app.py"),
    "triton": ("fedmom/engine/stacked/kernels/",),
    "optuna": ("fedmom/experiments/search/study.py",),
    "sklearn": ("fedmom/data/sources/small.py",),
    "IPython": ("fedmom/runs/bars.py",),
    "mlflow": ("fedmom/runs/trackers.py",),
    "wandb": ("fedmom/runs/trackers.py",),
}
# With the file that needs them; as flwr comes with the apps of strategies/ and clients/.
AT_ONCE = ("cryptography", "typer", "rich", "triton")
IMPORT_CALLS = ("__import__", "import_module")


def called(node: ast.Call) -> str:
    """`import_module` of importlib.import_module(…)."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def imports(node: ast.AST, package: str) -> list[str]:
    """Modules that the node imports, by statement or by name; of `from a import b` a.b, which may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        start = ".".join(package.split(".")[: -node.level + 1 or None]) if node.level else ""
        base = ".".join(filter(None, (start, node.module)))
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and called(node) in IMPORT_CALLS:
        return [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


@functools.cache
def imported(path: Path) -> dict[str, bool]:
    """{module or module.name: whether some import of it runs as soon as the file is imported}."""
    found: dict[str, bool] = {}
    package = ".".join(path.relative_to(ROOT).parent.parts) if path.is_relative_to(ROOT) else "here"

    def visit(node: ast.AST, lazy: bool) -> None:
        for name in imports(node, package):
            found[name] = found.get(name, False) or not lazy
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(tree_of(path), False)
    return found


@functools.cache
def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def room_of(module: str) -> str:
    """fedmom.method.state -> method, strategies.fleet -> strategies; "" for fedmom itself and its command."""
    parts = module.split(".")
    room = parts[1] if parts[0] == "fedmom" and len(parts) > 1 else parts[0]
    return "" if room in ("fedmom", "__main__") else room


def of_house(name: str) -> str | None:
    """The module of ours that an imported name means or lies in; None for somebody else's."""
    return name if name in MODULES else name.rpartition(".")[0] if name.partition(".")[0] in FOLDERS else None


def test_the_walk_sees_every_kind_of_import(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "import ray.data as d\nif d:\n    from flwr import x\nclass A:\n    import b\n"
        "def f():\n    import torchvision\n    importlib.import_module('sklearn.svm')\nfrom .state import y\n"
    )
    eager = dict.fromkeys(["ray.data", "flwr.x", "b", "here.state.y"], True)
    assert imported(path) == {**eager, **dict.fromkeys(["torchvision", "sklearn.svm"], False)}


def test_a_room_imports_only_what_stands_above_it():
    order = list(LAYERS)
    for room, may in LAYERS.items():
        assert all(order.index(other) < order.index(room) for other in may.split()), room
    found: dict[str, set[str]] = {room: set() for room in LAYERS}
    for path in FILES:
        room = room_of(module_of(path))
        others = {room_of(module) for name in imported(path) if (module := of_house(name))}
        assert not others & {"tests", "benchmarks"}, path
        if room:
            assert "" not in others, f"{path} imports fedmom itself, which imports everything"
            found[room] |= others - {room}
    assert {room: set(may.split()) for room, may in LAYERS.items()} == found


def test_no_file_imports_itself_by_way_of_others():
    names = {module_of(path): path for path in FILES if path.name != "__init__.py"}
    graph = {name: {of_house(other) for other in imported(path)} & {*names} - {name} for name, path in names.items()}
    assert len([*TopologicalSorter(graph).static_order()]) == len(names)  # CycleError names the circle


# Flower's documented modules, which hold classes alone; the rest of it may move with its next version. In the image of
# deploy/ there is no fedmom: the names that it changes there are strings, which tests/flower/test_private.py reads.
FLOWERS = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy")
PRIVATE = {
    "fedmom/flower/private.py": "the one place",
    "tests/apps/older_app/": "an app of Flower's older, documented kind",
    "tests/config/test_config.py": "how `flwr run` reads a run config",
    "tests/deployment/": "what the image changes of Flower, and what its gate lets through",
    "tests/flower/test_private.py": "",
    "tests/repository/test_layers.py": "what Flower bundles",
}


@pytest.mark.slow
def test_flowers_private_names_are_imported_in_one_place():
    files = [path for path in ROOT.glob("[!.]*/**/*.py") if "build" not in path.parts]
    found = {}
    for path in files:
        names = [name for name in imported(path) if name.partition(".")[0] == "flwr"]
        private = [
            name for name in names if name.rpartition(".")[0] not in FLOWERS or name.rpartition(".")[2].islower()
        ]
        if private:
            found[path.relative_to(ROOT).as_posix()] = private
    outside = {name: names for name, names in found.items() if not name.startswith(tuple(PRIVATE))}
    assert not outside, f"of Flower's private names, only fedmom/flower/private.py imports any: {outside}"
    unused = [place for place in PRIVATE if not any(name.startswith(place) for name in found)]
    assert not unused


def test_an_extra_is_imported_in_its_place_and_only_when_used():
    named = {name.partition(".")[0] for path in FILES for name in imported(path)}
    assert named - {"__future__", *sys.stdlib_module_names, *FOLDERS} <= BASE | {*EXTRAS, "markupsafe"}
    for extra, places in EXTRAS.items():
        users = {path.relative_to(ROOT).as_posix(): path for path in FILES}
        users = {
            name: path for name, path in users.items() if any(f"{i}.".startswith(f"{extra}.") for i in imported(path))
        }
        outside = [name for name in users if not name.startswith(places)]
        assert users, f"the rule for {extra} looks at nothing"
        assert not outside, f"{extra} is imported by {outside}"
        for name, path in users.items():
            if name.startswith("fedmom/") and extra not in AT_ONCE:
                at_once = [i for i, eager in imported(path).items() if eager and f"{i}.".startswith(f"{extra}.")]
                assert not at_once, f"{name} imports {extra} as soon as it is imported"


def test_a_room_is_looked_through_at_a_glance():
    """At most 22 rooms, nine files in each, 320 lines in a file, 50 in a function."""
    inside = [path for path in (ROOT / "fedmom").iterdir() if path.name != "__pycache__"]
    assert len(inside) <= 22
    for folder in {path.parent for path in FILES}:
        files = [path.name for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
        assert len(files) <= 9, f"{folder}: {sorted(files)}"
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 320, f"{path}: {text.count(chr(10))} lines"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 50, f"{path}: {node.name} has {lines} lines"


OWN = """
import sys
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


@pytest.mark.slow
def test_a_project_may_have_packages_called_clients_and_strategies(tmp_path):
    for name in ("clients/__init__", "clients/mine", "strategies/__init__", "strategies/later"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("whose = 'mine'\n")
    code = OWN.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_flowers_bundle_holds_every_file_of_code(tmp_path):
    """What git ignores stays out of a bundle without a word: so would a package runs/, were .gitignore not anchored."""
    from flwr.cli.build import build_fab_from_disk

    # Without what else lies in a checkout, all of which Flower would look at.
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path)))
    code = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert len(code) > 100
    code.add("fedmom/data/sources/digits.json")
    assert code <= set(bundle.namelist()), code - set(bundle.namelist())
