"""What a run takes along to its nodes: the app's own files, and nothing that lies elsewhere on this machine."""

import importlib.util
import os
import sys
import tomllib
from pathlib import Path

from fedmom.config.keys import KEYS, Config
from fedmom.config.load import flat
from fedmom.errors import InputError
from fedmom.user_code import is_spec

DATA = "/data"  # where every container has its own


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
