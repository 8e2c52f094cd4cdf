"""What a named method needs of other keys, so that it is what its name says."""

from fedmom.config.keys import KEYS, Config
from fedmom.config.load import flat
from fedmom.config.method.states import parse_states
from fedmom.config.strategies import OURS
from fedmom.errors import InputError
from fedmom.method.algorithms import ALGORITHMS
from fedmom.method.named.table import NAMED_CORRECTIONS, CorrectionNumbers
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.method.state import X
from fedmom.method.states.rules import Rules, StateRule
from fedmom.user_code import is_spec

# Keys of [algorithm] that one name alone reads.
_KEYS = {"prox-mu": "fedprox", "fedcm-alpha": "fedcm"}


def correction_numbers(config: Config) -> CorrectionNumbers:
    """What the named corrections are made of, of a resolved configuration."""
    keys = config.algorithm
    return CorrectionNumbers(keys.prox_mu, keys.fedcm_alpha, keys.beta, OPTIMIZERS[keys.optimizer].linear)


def check_presets(config: Config, given: frozenset[str], notes: list[str]) -> None:
    """Raises InputError for what contradicts the algorithm's name."""
    keys, name = config.algorithm, config.algorithm.name
    idle = [f"algorithm.{key}" for key, reader in _KEYS.items() if reader != name and f"algorithm.{key}" in given]
    idle = [key for key in idle if flat(config)[key] != KEYS[key].default]
    if idle:
        notes.append(f"{name} does not read {', '.join(idle)}: it changes nothing")
    wanted = ALGORITHMS[name].sets.get("optimizer")
    if wanted is not None and ALGORITHMS[name].decentralized and keys.optimizer != wanted:
        raise InputError(
            f"algorithm.optimizer = {keys.optimizer!r}: {name} is an optimizer itself; leave it out, or take d-sgd-m"
        )
    _check_correction(config)
    if ALGORITHMS[name].normalised:
        _check_normalised(config)


def _check_correction(config: Config) -> None:
    keys, name = config.algorithm, config.algorithm.name
    named = NAMED_CORRECTIONS.get(name)
    if named is None:
        return
    if is_spec(keys.correction):
        said = f"algorithm.correction = {keys.correction!r}"
        raise InputError(f"{said}: {name} is a correction itself; leave it out, or take name = 'local-sgd'")
    if named.has_states and config.server.strategy != OURS:
        raise InputError(
            f"server.strategy = {config.server.strategy!r}: {name} has a state at the server, which needs {OURS}"
        )
    if named.sgd_alone:
        _needs_sgd(config, "its D and m are of gradients")
    if named.beta_is_own and keys.nesterov:
        raise InputError(f"algorithm.nesterov = True: {name} steps by m as the round began; set false")
    _check_every_round(config, f"{name} pulls to, or counts from, where everybody began the round")


def _check_normalised(config: Config) -> None:
    keys, name = config.algorithm, config.algorithm.name
    if config.server.strategy != OURS:
        raise InputError(
            f"server.strategy = {config.server.strategy!r}: {name} is an average of its own, which needs {OURS}"
        )
    _needs_sgd(config, "its a_i are the lengths of SGD's steps")
    rule = Rules(keys.momentum_policy, parse_states(keys.states)).of("u")
    if keys.beta and rule != StateRule("reset"):
        raise InputError(f"algorithm.states = {keys.states!r}: {name} counts steps from u = 0; take 'u: reset every 1'")
    _check_every_round(config, f"{name} divides a round's way by its steps")


def _needs_sgd(config: Config, why: str) -> None:
    keys = config.algorithm
    if not OPTIMIZERS[keys.optimizer].linear:
        raise InputError(f"algorithm.optimizer = {keys.optimizer!r}: {keys.name} needs 'sgd', for {why}")


def _check_every_round(config: Config, why: str) -> None:
    period = parse_states(config.algorithm.states).get(X, StateRule()).period
    if period > 1:
        raise InputError(f"algorithm.states: x every {period}: {why}; take 'x: average every 1'")
    if (parts := config.algorithm.fragments) > 1:
        raise InputError(f"algorithm.fragments = {parts}: {why}; take 1, the whole model in every round")
