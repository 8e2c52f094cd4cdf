"""fedmom: federated momentum SGD that averages the model and the momentum.

`fedmom.run(config)` runs a configuration from Python; the command `fedmom run` does the same with a run folder.
"""

from fedmom.config import Config, load
from fedmom.errors import DivergedError, InputError
from fedmom.runner import Callback, Result, run

__version__ = "0.1.0"
__all__ = ["Callback", "Config", "DivergedError", "InputError", "Result", "load", "run"]
