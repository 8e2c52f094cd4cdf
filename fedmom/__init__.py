"""fedmom: federated momentum SGD that averages the model and the momentum.

`fedmom.run(config)` runs a configuration from Python; the command `fedmom run` does the same with a run folder.
"""

import os
from typing import TYPE_CHECKING, Any

# Before torch starts its threads. Waiting threads sleep instead of spinning: on a machine that is also doing something
# else, spinning made small models 5 to 20 times slower (docs/log.md). A value that is set already is left alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from fedmom.config import Config, load
    from fedmom.errors import DivergedError, InputError
    from fedmom.runner import Callback, Result, run

__version__ = "0.1.0"
__all__ = ["Callback", "Config", "DivergedError", "InputError", "Result", "load", "run"]
_HOME = {"Config": "config", "load": "config", "DivergedError": "errors", "InputError": "errors"}


def __getattr__(name: str) -> Any:
    """Import torch and the rest when first used, so that the command can answer Ctrl-C while it loads them."""
    if name not in __all__:
        raise AttributeError(f"module 'fedmom' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"fedmom.{_HOME.get(name, 'runner')}"), name)
    globals()[name] = value
    return value
