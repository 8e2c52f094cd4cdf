"""What a run takes along to its nodes: its configuration and the app's own files, nothing that lies elsewhere here."""

import ast
import dataclasses
import importlib.util
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from fedmom.config.keys import KEYS, Config
from fedmom.config.load import flat, load, parse_sets, replace
from fedmom.config.resolve import Resolved, resolve
from fedmom.deploy.remote_runs import VOLUME
from fedmom.errors import InputError
from fedmom.machine.files import write_text
from fedmom.records.files import CONFIG
from fedmom.records.resume import resume_config
from fedmom.user_code import HUB, is_spec

DATA = "/data"  # where every container has its own
_PACKAGE = Path(__file__).absolute().parents[1]
# What Flower's bundles take of files, and the names that they leave out without a word (flwr.common.constant).
_TAKEN = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")
_LEFT_OUT = ("build", "eggs", "lib", "lib64", "parts", "env", "venv", "ENV")


class Travels(NamedTuple):
    """The user's own code that a configuration names."""

    needs: dict[str, str]  # {package: "key = value"} of what is installed here, and the image must have
    own: dict[str, Path]  # {path in the bundle: file} of what lies where the command was started


class Cargo(NamedTuple):
    """What goes to the nodes for a run, once it was checked here."""

    config: Config  # as the app gets it, resolved here
    travels: Travels
    notes: tuple[str, ...] = ()  # what was overruled; nodes, who do not see what was given, cannot say all of it


def pack(
    source: Path | None, sets: Iterable[str], *, name: str, resume: Path | None, app: Path, num_nodes: int
) -> Cargo:
    """Settle what to send for the run `name`, before a node is asked for anything.

    source: a TOML file, or None for what the folder `resume` recorded. Raises InputError for a configuration that is
    wrong, has fewer clients than there are nodes, or names what no container would find.
    """
    settled = _settled(source, sets, resume=resume)
    config = settled.config
    # 0: all natural clients; the nodes count them, for the data are there.
    if 0 < config.data.num_clients < num_nodes:
        raise InputError(
            f"data.num-clients = {config.data.num_clients}: the deployment has {num_nodes} nodes, and every "
            "one needs a client"
        )
    place = f"{VOLUME}/{name}"
    where = {"out": "", "resume": place} if resume is not None else {"out": place, "resume": ""}
    # What was recorded of a run names its backend; the nodes must see the keys that a new run gave them.
    sent = replace(config, "run", backend="engine", **where)
    return Cargo(sent, check_travels(config, app), settled.notes)


def _settled(source: Path | None, sets: Iterable[str], *, resume: Path | None) -> Resolved:
    """The resolved configuration of the run.

    It is resolved here, where it is known which keys were given. A run config has all keys, so that resolving it again
    tells none that was given its default; of a resolved one it changes nothing.
    """
    if resume is not None and source is None:
        source = resume / CONFIG
    if source is None:
        raise InputError("CONFIG is missing: name a TOML file, or one of fedmom's own (quickstart), or --resume DIR")
    changes = {**parse_sets(sets), "data.data-dir": DATA}
    loaded = load(source, changes)
    if resume is None:
        return resolve(loaded, here=False)
    settled = resume_config(resume, source, changes)
    # What `auto` chose is the server's to keep, whose run it is; the nodes' devices may be others.
    return settled._replace(config=dataclasses.replace(settled.config, engine=loaded.config.engine))


def check_travels(config: Config, app: Path) -> Travels:
    """The user's code that goes along with the app, and the packages that the image must have.

    Raises InputError for a file, or code, that a config names and that no container would find.
    """
    found = Travels({}, {})
    for name, value in flat(config).items():
        if not KEYS[name].also:
            continue
        text = str(value)
        if text in KEYS[name].choices or text in ("", "none"):
            continue
        start, path = f"{name} = {text!r}", text.removeprefix(HUB)
        if is_spec(text):
            _check_module(start, text.partition(":")[0], app, found)
        elif not Path(path).is_absolute() or Path(DATA) not in Path(os.path.normpath(path)).parents:
            raise InputError(
                f"{start}: lies on this machine, and nodes see {DATA} alone; put it into the data folders of the "
                f"server and of every client (deployment/server/data, client-0/data, …) and write "
                f"'{text[: len(text) - len(path)]}{DATA}/{Path(path).name}'"
            )
    return found


def _check_module(start: str, module: str, app: Path, found: Travels) -> None:
    """Add a module to `found`, unless it is the app's; InputError where it is nowhere, or Flower would leave it out."""
    path = Path(*module.split("."))
    files = {path.with_suffix(".py").as_posix(), (path / "__init__.py").as_posix()}
    if files & {*bundled(app)}:
        return
    package, here = path.parts[0], Path.cwd()
    if not any((here / file).is_file() for file in files):
        if not _is_installed(package):
            raise InputError(
                f"{start}: does not travel to the nodes; what does are modules in {here}, where the command was "
                f"started, and packages that the image has: put {path.parts[-1]}.py there"
            )
        found.needs[package] = start
        return
    own = modules_beside(package, here)
    if package == "fedmom" or any(_is_left_out(file) for file in files if (here / file).is_file()):
        raise InputError(f"{start}: does not travel to the nodes: Flower leaves out what has such a name; take another")
    found.own.update(own)


def modules_beside(package: str, folder: Path) -> dict[str, Path]:
    """{path in `folder`: file} of a module or package there, and of all there that its code imports.

    What is imported under the name of a module of Python's own is that one, though a secrets.py lie there.
    """
    found: dict[str, Path] = {}
    waiting, seen = [package], {"fedmom", *sys.stdlib_module_names} - {package}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for path in _files_of(name, folder):
            relative = path.relative_to(folder)
            if not any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
                found[relative.as_posix()] = path
                waiting += _imported(path) if path.suffix == ".py" else []
    return found


def _files_of(name: str, folder: Path) -> list[Path]:
    """The files that `import name` means, as Python chooses: a package, else a module, else a folder of modules.

    A package brings its data along, but for what is a link; a mere folder its code alone: the rest is not the code's.
    """
    is_package, module = (folder / name / "__init__.py").is_file(), folder / f"{name}.py"
    if module.is_file() and not is_package:
        return [module]
    inside = [path for path in sorted((folder / name).rglob("*")) if path.is_file() and path.suffix in _TAKEN]
    return [path for path in inside if path.suffix == ".py" or (is_package and not path.is_symlink())]


def _imported(path: Path) -> set[str]:
    """The first parts of all modules that a file imports by statement, wherever in it."""
    try:
        nodes = [*ast.walk(ast.parse(path.read_bytes()))]
    except (SyntaxError, ValueError):
        return set()  # importing it says what is wrong
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in names}


def _is_left_out(name: str) -> bool:
    path = Path(name)
    return path.parts[0] in _LEFT_OUT or path.name.startswith("test_") or path.stem.endswith("_test")


def bundled(app: Path) -> dict[str, Path]:
    """{path in the bundle: file} of what `flwr run` takes of an app, by `fab-include` of its pyproject.toml.

    Beside an installed fedmom's app there is no folder fedmom: it is the package itself.
    """
    found: dict[str, Path] = {}
    for pattern in _patterns(app):
        root = app if (app / pattern.partition("/")[0]).exists() else _PACKAGE.parent
        paths = {path.relative_to(root).as_posix(): path for path in sorted(root.glob(pattern)) if path.is_file()}
        found |= {name: path for name, path in paths.items() if not name.startswith("fedmom/_app/")}
    return found


def _patterns(app: Path) -> list[str]:
    try:
        table = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
        return list(table["tool"]["flwr"]["app"]["fab-include"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--app {app}: its pyproject.toml has no [tool.flwr.app] with fab-include ({error})") from None


def stage(app: Path, own: Mapping[str, Path], folder: Path) -> Path:
    """The app's folder for `flwr run`: `app` itself, or `folder`, made of fedmom's code and the user's `own`.

    own: {path in the bundle: file}. Where the names clients and strategies may be the user's, fedmom's lie in
    fedmom/_app, as in the wheel.
    """
    is_checkout = (app / "fedmom").is_dir()
    if is_checkout and not own:
        return app
    shutil.rmtree(folder, ignore_errors=True)
    apps = ("clients/", "strategies/")
    start = "" if is_checkout and not any(name.startswith(apps) for name in own) else "fedmom/_app/"
    files = {start + name if name.startswith(apps) else name: path for name, path in bundled(app).items()}
    for name, path in {**own, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    text = (app / "pyproject.toml").read_text(encoding="utf-8")
    # All that lies there travels.
    write_text(folder / "pyproject.toml", re.sub(r"(?ms)^fab-include = \[.*?\]$", 'fab-include = ["**/*"]', text))
    return folder


def _is_installed(package: str) -> bool:
    """Whether it comes from a package that is installed, not from the folder that the command was started in."""
    if package in sys.stdlib_module_names:
        return True
    found = importlib.util.find_spec(package)
    places = [found.origin] if found and found.origin else list((found and found.submodule_search_locations) or [])
    return any(
        "site-packages" in Path(place).parts or "dist-packages" in Path(place).parts for place in places if place
    )
