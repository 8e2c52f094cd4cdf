"""A run's method in words, as its first lines, `fedmom watch` and the page say it."""

from fedmom.config.keys import Config
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.method.outer import OUTERS


def method_of(config: Config) -> str:
    """ "pr-sgd-m, option I, momentum average", or what the optimizer, the states' rules and the outer step are."""
    keys = config.algorithm
    has_options = "nesterov" in OPTIMIZERS[keys.optimizer].reads
    local = f"option {'II' if keys.nesterov else 'I'}" if has_options else keys.optimizer
    kept = "momentum" if has_options else "states"
    states = keys.states.replace(" every 1;", ";").removesuffix(" every 1") or f"{kept} {keys.momentum_policy}"
    slow = keys.slow_momentum or keys.slow_lr != 1
    outer = keys.outer if OUTERS[keys.outer].step else "SlowMo" if slow else ""
    return ", ".join([keys.name, local, states, *([f"outer {outer}"] if outer else [])])
