"""fedmom: federated momentum SGD that averages the model and the momentum.

`fedmom.run(config)` runs a configuration from Python; the command `fedmom run` does the same with a run folder.
"""

import os

# Before torch starts its threads. Waiting threads sleep instead of spinning: on a machine that is also doing something
# else, spinning made small models 5 to 20 times slower (docs/log.md). A value that is set already is left alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fedmom.config import Config, load
from fedmom.errors import DivergedError, InputError
from fedmom.runner import Callback, Result, run

__version__ = "0.1.0"
__all__ = ["Callback", "Config", "DivergedError", "InputError", "Result", "load", "run"]
