"""algorithm.outer and its numbers; slow-momentum and slow-lr are the short form of SlowMo."""

from fedmom.config.keys import KEYS, Config
from fedmom.config.load import flat
from fedmom.config.method.numbers import clients_beta
from fedmom.config.method.states import rules_of
from fedmom.errors import InputError
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.method.outer import OUTERS, OuterNumbers, OuterRule
from fedmom.method.state import X
from fedmom.method.states.policies import MOMENTUM_POLICIES

_KEYS = ("outer-lr", "outer-momentum", "outer-beta2", "outer-tau", "outer-states")


def outer_of(config: Config) -> OuterRule | None:
    """The outer step of a resolved configuration; None where everybody goes on from x̂."""
    keys = config.algorithm
    if keys.outer == "none":
        if not keys.slow_momentum and keys.slow_lr == 1:
            return None
        return OuterRule("slowmo", OuterNumbers(keys.slow_lr, keys.slow_momentum))
    numbers = OuterNumbers(
        keys.outer_lr or OUTERS[keys.outer].lr, keys.outer_momentum, keys.outer_beta2, keys.outer_tau
    )
    return OuterRule(keys.outer, numbers, _states(keys.outer_states))


def check_outer(config: Config, given: frozenset[str], notes: list[str]) -> None:
    """Raises InputError for two outer steps, and for states that none can move."""
    keys = config.algorithm
    said = f"algorithm.outer = {keys.outer!r}"
    some = {key for outer in OUTERS.values() for key in outer.reads}
    unread = _KEYS if keys.outer == "none" else sorted(some - {*OUTERS[keys.outer].reads})
    idle = [f"algorithm.{key}" for key in unread if f"algorithm.{key}" in given]
    idle = [key for key in idle if flat(config)[key] != KEYS[key].default]
    if keys.outer == "none":
        slow = keys.slow_momentum or keys.slow_lr != 1
        why = "SlowMo's short form reads slow-momentum and slow-lr alone" if slow else "there is no outer step"
        if idle:
            notes.append(f"{said}: {why}, so {', '.join(idle)} changes nothing")
        return
    if idle:
        notes.append(f"{said} does not read {', '.join(idle)}: it changes nothing")
    if keys.slow_momentum or keys.slow_lr != 1:
        raise InputError(f"{said}: slow-momentum and slow-lr are SlowMo's, another outer step; give one")
    rules = rules_of(keys)
    has = [X, *(state for state in OPTIMIZERS[keys.optimizer].states if state != "v")]
    for state in _states(keys.outer_states):
        key = f"algorithm.outer-states = {keys.outer_states!r}"
        if state == "v" and state in OPTIMIZERS[keys.optimizer].states:
            raise InputError(f"{key}: v must stay positive, which no outer step sees to; name {', '.join(has)}")
        if state not in has:
            raise InputError(f"{key}: optimizer {keys.optimizer!r} has no state {state!r}; name {', '.join(has)}")
        if state in ("u", "m") and not clients_beta(config):
            raise InputError(f"{key}: with β = 0 {state} is the last gradient and does not travel; name x")
        if not MOMENTUM_POLICIES[rules.of(state).policy].sends_momentum:
            raise InputError(f"{key}: {state} is {rules.of(state).policy}, and an outer step moves an average")


def _states(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise InputError(f"algorithm.outer-states = {text!r}: must name states by commas, such as 'x'")
    return found
