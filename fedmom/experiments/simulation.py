"""The backend `simulation`: the Flower app of a folder, its nodes on Ray actors, its rounds heard like any run's."""

import dataclasses
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path

from fedmom.backends.agreement import agreement
from fedmom.config.build import pool_options
from fedmom.config.keys import Config
from fedmom.config.load import flat, replace
from fedmom.errors import InputError, RunStoppedError
from fedmom.machine.files import at_home
from fedmom.runs.callbacks import Callback, Listener
from fedmom.runs.result import Result
from fedmom.user_code import app_root


def simulate(
    config: Config,
    *,
    out: str | Path | None,
    resume: str | Path | None,
    callbacks: Iterable[Callback],
    app: str | Path | None,
) -> Result:
    """Run a resolved configuration through the ServerApp and ClientApp of the folder `app`.

    None: the working directory if it holds a Flower app, else the app that came with fedmom.
    Raises InputError for bad input, also the app's own.
    """
    from fedmom.flower.app import simulate_app

    _check_writable(out)
    num_nodes = -(-config.data.num_clients // config.simulation.clients_per_node)
    options = pool_options(replace(config, "engine", workers=0))
    options = dataclasses.replace(options, agreement=agreement(config))
    where = {"run.out": str(out or ""), "run.resume": str(resume or ""), "simulation.num-gpus": options.num_gpus}
    listener = Listener(list(callbacks))

    def show(partition: int, text: str) -> None:
        for callback in listener.callbacks:
            callback.on_output(partition, text)

    try:
        simulate_app(
            app_folder(app),
            num_nodes=num_nodes,
            run_config={**flat(config), **where},
            options=options,
            grid_ready=lambda grid: setattr(grid, "listener", listener),
            on_output=show if config.simulation.show_output else None,
        )
    except RunStoppedError:
        if listener.result is None:
            raise
    if listener.result is None:
        raise InputError(f"--app {app or '.'}: its ServerApp made no run of fedmom; try `fedmom simulate-app`")
    return listener.result


def app_folder(app: str | Path | None) -> Path:
    """The folder of the Flower app: as given, or here, or fedmom's own. InputError where it has none."""
    if app is not None:
        return at_home(app)
    here = Path.cwd()
    return here if _is_app(here) else app_root()


def _is_app(folder: Path) -> bool:
    try:
        table = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        return "components" in table["tool"]["flwr"]["app"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_writable(out: str | Path | None) -> None:
    """Before Ray starts: a folder in which nothing can be made is bad input at once."""
    if not out:
        return
    there = next(path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise InputError(f"--out {out}: {there} cannot be written")
