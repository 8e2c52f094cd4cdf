"""A whole Flower app on our Grid: what its pyproject.toml says, its ServerApp in this thread, its clients on Ray."""

import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fedmom.actors.cluster import PoolOptions
from fedmom.errors import InputError, require, unknown
from fedmom.flower.client import load_component
from fedmom.flower.grid import RUN_ID, Context, Message, RayGrid
from fedmom.flower.private import server_node_id


class Components(NamedTuple):
    """What [tool.flwr.app] of a pyproject.toml says."""

    server_app: str  # "module:attribute"
    client_app: str
    config: dict[str, Any]  # [tool.flwr.app.config], flattened: {"run.seed": 0}


def load_components(app_dir: str | Path) -> Components:
    """The components and the default run config of the Flower app in `app_dir`; InputError where one is missing."""
    path = Path(app_dir) / "pyproject.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; a Flower app has a pyproject.toml") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    for key in ("tool", "flwr", "app"):
        table = _table(table, key)
    components = _table(table, "components")
    for key in ("serverapp", "clientapp"):
        if not isinstance(components.get(key), str):
            raise InputError(f'{path}: [tool.flwr.app.components] has no {key} = "module:attribute"')
    return Components(
        components["serverapp"], components["clientapp"], dict(_flattened(_table(table, "config"), "", path))
    )


def _table(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What is there, if it is a table."""
    found = table.get(key, {})
    return found if isinstance(found, dict) else {}


def _flattened(table: Mapping[str, Any], prefix: str, path: Path) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.", path)
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}{key}", value
        else:
            kind = type(value).__name__
            raise InputError(f"{path}: {prefix}{key} is a {kind}; a run config has strings, numbers and booleans")


def simulate_app(
    app_dir: str | Path,
    *,
    num_nodes: int,
    run_config: Mapping[str, Any],
    options: PoolOptions,
    grid_ready: Callable[[RayGrid], None] | None = None,
    on_reply: Callable[[Message], None] | None = None,
    on_output: Callable[[int, str], None] | None = None,
) -> Context:
    """Run the Flower app in `app_dir` with `num_nodes` clients, in this thread; gives the server's Context.

    `run_config` overrides keys of [tool.flwr.app.config], flattened with dots. `grid_ready` sees the Grid before the
    ServerApp starts, `on_reply` every reply as it arrives, `on_output(partition, text)` what clients print. What the
    ServerApp raises comes out as it is, and a Ray that ended as RayEndedError; the workers end in any case.
    """
    require(f"the Flower app in {app_dir}", "flower", "flwr", "ray")
    from flwr.app import Context, RecordDict

    components = load_components(app_dir)
    for key, value in run_config.items():
        if key not in components.config:
            raise unknown("run config", key, components.config)
        if not isinstance(value, bool | int | float | str):
            raise InputError(f"run config {key} = {value!r}: a string, a number or a boolean")
    config = {**components.config, **run_config}
    grid = RayGrid(
        components.client_app,
        app_dir=app_dir,
        num_nodes=num_nodes,
        run_config=config,
        options=options,
        on_reply=on_reply,
        on_output=on_output,
    )
    with grid, _restored_path(), _interrupts_told(grid):
        server_app = load_component("ServerApp", components.server_app, Path(app_dir).absolute())
        if grid_ready:
            grid_ready(grid)
        context = Context(RUN_ID, server_node_id(), {}, RecordDict(), config)
        server_app(grid, context)
        grid.check()  # an app may take whatever a thread of its own raised for one client's failure
    return context


@contextmanager
def _interrupts_told(grid: RayGrid) -> Iterator[None]:
    """Ctrl-C and SIGTERM reach other threads too: Flower's older servers wait for a pool of them, whatever comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def tell(number: int, frame: Any) -> None:
        handler = before[signal.Signals(number)]
        if callable(handler):
            grid.give_up()
            handler(number, frame)

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, tell)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _restored_path() -> Iterator[None]:
    """Flower's loader puts the app's folder on sys.path."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before
