"""What a run takes along to its nodes: its configuration and the app's own files, nothing that lies elsewhere here."""

import importlib.util
import os
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fedmom.config.keys import KEYS, Config
from fedmom.config.load import flat, load, parse_sets, replace
from fedmom.config.resolve import resolve
from fedmom.deploy.remote_runs import VOLUME
from fedmom.errors import InputError
from fedmom.records.files import CONFIG
from fedmom.records.resume import resume_config
from fedmom.user_code import is_spec

DATA = "/data"  # where every container has its own


class Cargo(NamedTuple):
    """What goes to the nodes for a run, once it was checked here."""

    config: Config  # as the app gets it
    needs: dict[str, str]  # {package: "key = value"} of code that the image must have


def pack(
    source: Path | None, sets: Iterable[str], *, name: str, resume: Path | None, app: Path, num_nodes: int
) -> Cargo:
    """Settle what to send for the run `name`, before a node is asked for anything.

    source: a TOML file, or None for what the folder `resume` recorded. Raises InputError for a configuration that is
    wrong, has fewer clients than there are nodes, or names what no container would find.
    """
    config, settled = _config_to_send(source, sets, name=name, resume=resume)
    if settled.data.num_clients < num_nodes:
        raise InputError(
            f"data.num-clients = {settled.data.num_clients}: the deployment has {num_nodes} nodes, and every "
            "one needs a client"
        )
    return Cargo(config, check_travels(settled, app))


def _config_to_send(
    source: Path | None, sets: Iterable[str], *, name: str, resume: Path | None
) -> tuple[Config, Config]:
    """(the configuration for the run, the same resolved)."""
    if resume is not None and source is None:
        source = resume / CONFIG
    if source is None:
        raise InputError("CONFIG is missing: name a TOML file (configs/ has examples), or --resume DIR")
    changes = {**parse_sets(sets), "data.data-dir": DATA}
    config = load(source, changes).config
    if resume is not None:
        settled = resume_config(resume, source, changes).config
    else:
        settled = resolve(load(source, changes)).config
    place = f"{VOLUME}/{name}"
    where = {"out": "", "resume": place} if resume is not None else {"out": place, "resume": ""}
    # What was recorded of a run names its backend; the nodes must see the keys that a new run gave them.
    return replace(replace(config, "run", backend="engine"), "run", **where), settled


def check_travels(config: Config, app: Path) -> dict[str, str]:
    """{package: "key = value"} of code that is installed here, and which the image must have as well.

    Raises InputError for a file, or code, that a config names and that no container would find.
    """
    installed = {}
    for name, value in flat(config).items():
        if not KEYS[name].also:
            continue
        text = str(value)
        if text in KEYS[name].choices or text in ("", "none"):
            continue
        start = f"{name} = {text!r}"
        if is_spec(text):
            package = _check_module(start, text.partition(":")[0], app)
            if package:
                installed[package] = start
        elif not Path(text).is_absolute() or Path(DATA) not in Path(os.path.normpath(text)).parents:
            raise InputError(
                f"{start}: lies on this machine, and nodes see {DATA} alone; put it into the data folders of the "
                f"server and of every client (deployment/server/data, client-0/data, …) and write "
                f"'{DATA}/{Path(text).name}'"
            )
    return installed


def _check_module(start: str, module: str, app: Path) -> str:
    """The package that the image must have; empty where the module travels with the app."""
    include = bundled(app)
    own = [app / Path(*module.split(".")).with_suffix(".py"), app / Path(*module.split(".")) / "__init__.py"]
    if any(path.resolve() in include for path in own):
        return ""
    package = module.partition(".")[0]
    if not any(path.exists() for path in own) and _is_installed(package):
        return package
    folders = ", ".join(
        sorted({path.relative_to(app.resolve()).parts[0] + "/" for path in include if path.suffix == ".py"})
    )
    last = module.rpartition(".")[2]
    raise InputError(
        f"{start}: does not travel to the nodes; what does are the modules in {folders} of {app.resolve()}: put "
        f"{last}.py into clients/ there and write 'clients.{last}:…'"
    )


def bundled(app: Path) -> set[Path]:
    """The files that `flwr run` bundles, by `fab-include` of the app's pyproject.toml."""
    try:
        table = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
        patterns = table["tool"]["flwr"]["app"]["fab-include"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--app {app}: its pyproject.toml has no [tool.flwr.app] with fab-include ({error})") from None
    return {path.resolve() for pattern in patterns for path in app.glob(pattern)}


def _is_installed(package: str) -> bool:
    """Whether it comes from a package that is installed, not from the folder that the command was started in."""
    if package in sys.stdlib_module_names:
        return True
    found = importlib.util.find_spec(package)
    places = [found.origin] if found and found.origin else list((found and found.submodule_search_locations) or [])
    return any(
        "site-packages" in Path(place).parts or "dist-packages" in Path(place).parts for place in places if place
    )
