"""algorithm.optimizer and the keys that it reads."""

from fedmom.config.keys import KEYS, Config
from fedmom.config.load import flat, replace
from fedmom.config.strategies import OURS
from fedmom.engine.paths import AUTO, PATHS
from fedmom.errors import InputError
from fedmom.method.algorithms import ALGORITHMS
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.tasks.problem import data_kind

_KEYS = ("beta", "nesterov", "beta2", "eps")  # of [algorithm], that not every optimizer reads


def settle_optimizer(config: Config, given: frozenset[str], notes: list[str]) -> Config:
    """β₂ where none was given. Raises InputError for what the optimizer cannot do."""
    algorithm, name = config.algorithm, config.algorithm.optimizer
    optimizer = OPTIMIZERS[name]
    path = config.engine.path
    if path != AUTO and PATHS[path].factors and not optimizer.linear:
        raise InputError(
            f"engine.path = {path!r}: its dense layers without rows are for algorithm.optimizer = 'sgd', not {name!r}; "
            "take auto or stack"
        )
    if algorithm.nesterov and "nesterov" not in optimizer.reads:
        raise InputError(
            f"algorithm.nesterov = True: is option II of SGD, and optimizer = {name!r} has none; set false"
        )
    if optimizer.gossip_only and not ALGORITHMS[algorithm.name].decentralized:
        raise InputError(f"algorithm.optimizer = {name!r}: needs algorithm.name = 'd-sgd-m', whose W mixes its y")
    if config.server.strategy != OURS and name != KEYS["algorithm.optimizer"].default:
        raise InputError(
            f"server.strategy = {config.server.strategy!r}: its step would move what {name} remembers too, and v must "
            f"stay positive; take {OURS}, or algorithm.optimizer = 'sgd'"
        )
    if "beta2" in optimizer.reads and not algorithm.beta2:
        config = replace(config, "algorithm", beta2=optimizer.beta2)
    if optimizer.clocks and "algorithm.lr" not in given and data_kind(config.data.dataset).has_examples:
        notes.append(
            f"algorithm.lr = {algorithm.lr:g}: is SGD's default, and {name} moves every number by about lr in a step; "
            "0.001 to 0.005 is usual"
        )
    idle = [f"algorithm.{key}" for key in _KEYS if key not in optimizer.reads]
    idle = [key for key in idle if key in given and flat(config)[key] != KEYS[key].default]
    if idle:
        notes.append(f"algorithm.optimizer = {name!r} does not read {', '.join(idle)}: it changes nothing")
    return config
