"""fedmom: federated momentum SGD that averages the model and the momentum.

`fedmom.run(config)` runs a configuration from Python; the command `fedmom run` does the same with a run folder.
All public names are attributes of this package; docs/api.md describes them.
"""

import os
from typing import TYPE_CHECKING, Any

# Before torch starts its threads. Waiting threads sleep instead of spinning: on a machine that is also doing something
# else, spinning made small models 5 to 20 times slower (docs/log.md). A value that is set already is left alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from fedmom.config.keys import Config as Config
    from fedmom.config.load import load_config as load_config
    from fedmom.data.datasets import Dataset as Dataset
    from fedmom.errors import ClientsFailedError as ClientsFailedError
    from fedmom.errors import DivergedError as DivergedError
    from fedmom.errors import InputError as InputError
    from fedmom.experiments.run import run as run
    from fedmom.experiments.search.sweep import sweep as sweep
    from fedmom.flower.app import simulate_app as simulate_app
    from fedmom.flower.grid import RayGrid as RayGrid
    from fedmom.method.corrections import Correction as Correction
    from fedmom.method.decentralized.topology import make_topology as make_topology
    from fedmom.method.randomness import normal_like as normal_like
    from fedmom.method.step import local_step as local_step
    from fedmom.records.history import ClientHistory as ClientHistory
    from fedmom.records.status import Status as Status
    from fedmom.records.status import read_status as read_status
    from fedmom.results.comparison import all_sheets as all_sheets
    from fedmom.results.groups import group_runs as group_runs
    from fedmom.results.notebook import Comparison as Comparison
    from fedmom.results.notebook import compare as compare
    from fedmom.results.page.write import write_page as write_page
    from fedmom.results.reading import collect as collect
    from fedmom.rounds.results import ClientResults as ClientResults
    from fedmom.runs.callbacks import Callback as Callback
    from fedmom.runs.callbacks import Start as Start
    from fedmom.runs.result import Result as Result
    from fedmom.runs.result import load as load
    from fedmom.runs.stopping import EarlyStopping as EarlyStopping
    from fedmom.runs.trackers import Tracked as Tracked
    from fedmom.runs.trackers import Tracker as Tracker
    from fedmom.runs.trackers import Tracking as Tracking
    from fedmom.tasks.models.adapters import lora as lora
    from fedmom.tasks.models.build import build_model as build_model
    from fedmom.tasks.task import Task as Task

__version__ = "0.1.0"
# The public names and the modules that define them; mypy reads the imports above, which a test holds equal to it.
_HOME = {
    "Callback": "fedmom.runs.callbacks",
    "ClientHistory": "fedmom.records.history",
    "ClientResults": "fedmom.rounds.results",
    "ClientsFailedError": "fedmom.errors",
    "Comparison": "fedmom.results.notebook",
    "Config": "fedmom.config.keys",
    "Correction": "fedmom.method.corrections",
    "Dataset": "fedmom.data.datasets",
    "DivergedError": "fedmom.errors",
    "EarlyStopping": "fedmom.runs.stopping",
    "InputError": "fedmom.errors",
    "RayGrid": "fedmom.flower.grid",
    "Result": "fedmom.runs.result",
    "Start": "fedmom.runs.callbacks",
    "Status": "fedmom.records.status",
    "Task": "fedmom.tasks.task",
    "Tracked": "fedmom.runs.trackers",
    "Tracker": "fedmom.runs.trackers",
    "Tracking": "fedmom.runs.trackers",
    "all_sheets": "fedmom.results.comparison",
    "build_model": "fedmom.tasks.models.build",
    "collect": "fedmom.results.reading",
    "group_runs": "fedmom.results.groups",
    "compare": "fedmom.results.notebook",
    "load": "fedmom.runs.result",
    "load_config": "fedmom.config.load",
    "local_step": "fedmom.method.step",
    "lora": "fedmom.tasks.models.adapters",
    "make_topology": "fedmom.method.decentralized.topology",
    "normal_like": "fedmom.method.randomness",
    "read_status": "fedmom.records.status",
    "run": "fedmom.experiments.run",
    "sweep": "fedmom.experiments.search.sweep",
    "simulate_app": "fedmom.flower.app",
    "write_page": "fedmom.results.page.write",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import torch and the rest when first used, so that the command can answer Ctrl-C while it loads them."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedmom' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What is public, and nothing else."""
    return sorted([*_HOME, "__version__"])
