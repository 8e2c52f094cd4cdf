"""`fedmom.run`: one run of a configuration, on whichever backend it names."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedmom.backends.local import make_backend
from fedmom.config.build import resolve_device
from fedmom.config.keys import Config
from fedmom.config.load import load, parse_sets
from fedmom.config.strategies import OURS
from fedmom.errors import InputError, require
from fedmom.experiments.simulation import simulate
from fedmom.machine.files import at_home
from fedmom.runs.bars import python_bar
from fedmom.runs.callbacks import Callback
from fedmom.runs.execute import execute, opened
from fedmom.runs.result import Result


def run(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    sets: Iterable[str] | Mapping[str, Any] = (),
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: str | None = None,
    callbacks: Iterable[Callback] = (),
    app: str | Path | None = None,
    progress: bool | None = None,
) -> Result:
    """Run Algorithm 1 or 2 as `config` says: a TOML file, a mapping ({"algorithm": {"lr": 0.1}}) or a Config.

    `sets` changes keys ({"algorithm.lr": 0.1} or ["algorithm.lr=0.1"]), `out` names a run folder to write (None:
    nothing is written), `resume` a run folder to go on with (`config` may then be left out).
    `progress` shows a bar, or none; left out, on a terminal and in a notebook.
    With run.backend = "simulation" the Flower app in the folder `app` (default: here) runs on Ray actors.
    Raises InputError for bad input. Divergence, clients that failed and Ctrl-C are a Result's status, and leave a
    checkpoint in the folder.
    """
    config = at_home(config) if isinstance(config, str | Path) else config
    changes = parse_sets([sets] if isinstance(sets, str) else sets)
    if device is not None:
        changes["engine.device"] = device
    out, resume = run_folders(config, changes, out, resume)
    if resume is not None and out is not None:
        raise InputError(f"--out {out}: goes with a new run; --resume {resume} writes into its own folder")
    if resume is None and config is None:
        raise InputError("CONFIG is missing: name a TOML file, or one of fedmom's own (quickstart), or --resume DIR")
    callbacks = list(callbacks)
    callbacks += python_bar(progress, callbacks)
    with opened(config, changes, out, resume) as begun:
        settled = begun.resolved.config
        _check_backend(settled)
        if settled.run.backend == "engine":
            return execute(begun, make_backend, callbacks)
    return simulate(settled, out=out, resume=resume, callbacks=callbacks, app=app)


def run_folders(
    config: str | Path | Mapping[str, Any] | Config | None,
    sets: Iterable[str] | Mapping[str, Any],
    out: str | Path | None,
    resume: str | Path | None,
) -> tuple[Path | None, Path | None]:
    """(folder to write, folder to resume): as given, else as the keys run.out and run.resume say, else None."""
    for name, folder in (("out", out), ("resume", resume)):
        empty = folder is not None and str(folder) in ("", "." if name == "out" else "")  # Path("") is Path(".")
        if empty or not isinstance(folder, str | Path | None):
            raise InputError(f"--{name} {str(folder)!r}: must name a folder of the run's own")
    keys = load({} if config is None else config, sets).config.run
    out, resume = out or keys.out, resume or keys.resume
    return at_home(out) if out else None, at_home(resume) if resume else None


def check_place(config: Config, *, here: bool) -> None:
    """InputError unless a run of this (settled) configuration can be made: its backend and, if here, its device."""
    _check_backend(config)
    if here and config.run.backend == "engine":
        resolve_device(config)


def _check_backend(config: Config) -> None:
    backend, strategy = config.run.backend, config.server.strategy
    if backend == "flower":
        raise InputError("run.backend = 'flower': start it with `flwr run`; here it is engine or simulation")
    if backend == "engine" and strategy != OURS:
        raise InputError(
            f"server.strategy = {strategy!r}: is Flower's; it needs run.backend = 'simulation' or `flwr run`"
        )
    if backend == "simulation":
        require("run.backend = 'simulation'", "flower", "flwr", "ray")
    elif config.engine.workers > 0:
        require(f"engine.workers = {config.engine.workers}", "flower", "ray")
