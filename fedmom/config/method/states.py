"""algorithm.states = "x: average every 1; u: average every 4": who averages a state, and how often."""

import re
from collections.abc import Mapping

from fedmom.config.keys import KEYS, AlgorithmConfig, Config
from fedmom.config.load import replace
from fedmom.errors import InputError, unknown
from fedmom.method.algorithms import ALGORITHMS
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.method.state import X
from fedmom.method.states.fragments import Fragments
from fedmom.method.states.policies import MOMENTUM_POLICIES
from fedmom.method.states.rules import Rules, StateRule

_ENTRY = re.compile(r"\s*([a-z]+)\s*:\s*([a-z-]+)(?:\s+every\s+(\d+))?\s*", re.ASCII)
_LONGEST = 2**31 - 1  # rounds of a period
_FORM = 'must be "STATE: POLICY every ROUNDS" by semicolons, as in "x: average every 1; u: average every 4"'


def parse_states(text: str) -> dict[str, StateRule]:
    """{state: its rule} of algorithm.states, in the order of the text. InputError names the entry that is wrong."""
    said, found = f"algorithm.states = {_short(text)!r}", dict[str, StateRule]()
    for entry in filter(str.strip, text.split(";")):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise InputError(f"{said}: {_short(entry.strip())!r} {_FORM}")
        state, policy, period = match[1], match[2], match[3] or "1"
        if policy not in MOMENTUM_POLICIES:
            raise unknown(f"algorithm.states: the policy of {state}", policy, MOMENTUM_POLICIES)
        if state in found:
            raise InputError(f"{said}: names {state} twice; name it once")
        digits = period.lstrip("0")  # of which int takes no more than some thousand
        if not 0 < int(digits[:11] or 0) <= _LONGEST:
            right = f"a period must be a number of rounds from 1 to {_LONGEST}"
            raise InputError(f"{said}: {state} every {_short(period, 10)}: {right}")
        if MOMENTUM_POLICIES[policy].keeps_rows and int(digits) != 1:
            raise InputError(f"{said}: {state}: {policy} is never exchanged, so it has no period; leave 'every' out")
        found[state] = StateRule(policy, int(digits))
    if text.strip() and not found:
        raise InputError(f"{said}: names no state; name some, as in 'u: average every 4', or leave it ''")
    return found


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def written(rules: Mapping[str, StateRule]) -> str:
    """The inverse of `parse_states`."""

    def one(state: str, rule: StateRule) -> str:
        return f"{state}: {rule.policy}" + (
            "" if MOMENTUM_POLICIES[rule.policy].keeps_rows else f" every {rule.period}"
        )

    return "; ".join(one(state, rule) for state, rule in rules.items())


def rules_of(algorithm: AlgorithmConfig) -> Rules:
    """What becomes of every state between rounds, but for the tensors that each part of the model has."""
    fragments = Fragments(algorithm.fragments)
    states = parse_states(algorithm.states) | dict(OPTIMIZERS[algorithm.optimizer].rules)
    return Rules(algorithm.momentum_policy, states, fragments=fragments)


def settle_states(config: Config) -> Config:
    """The rule of every state, written out where algorithm.states or the optimizer says something of one.

    Raises InputError for a state that does not exist, and for a rule that has no meaning for it.
    """
    algorithm = config.algorithm
    optimizer, given = OPTIMIZERS[algorithm.optimizer], parse_states(algorithm.states)
    said, policy = f"algorithm.states = {algorithm.states!r}", algorithm.momentum_policy
    fixed = optimizer.rules
    if fixed and policy != KEYS["algorithm.momentum-policy"].default:
        right = f"{algorithm.optimizer} is defined by {written(fixed)}; leave it out"
        raise InputError(f"algorithm.momentum-policy = {policy!r}: {right}")
    for state, rule in given.items():
        if state not in (X, *optimizer.states):
            has = ", ".join((X, *optimizer.states))
            raise InputError(f"{said}: optimizer {algorithm.optimizer!r} has no state {state!r}; it has {has}")
        if state == X and not MOMENTUM_POLICIES[rule.policy].sends_momentum:
            raise InputError(f"{said}: x is {rule.policy}; x can be averaged alone, as in 'x: average every 2'")
        # A default says nothing: momentum-policy = "average" may be written out beside other rules.
        if state != X and policy not in (KEYS["algorithm.momentum-policy"].default, rule.policy):
            raise InputError(
                f"{said}: {state} is {rule.policy}, and algorithm.momentum-policy = {policy!r} says otherwise; give one"
            )
        if state in fixed and rule != fixed[state]:
            raise InputError(f"{said}: {algorithm.optimizer} is defined by {written(fixed)}; leave it out")
    if not (given or fixed):
        rules = {state: StateRule(policy) for state in optimizer.states}
    else:
        rules = {X: given.get(X, StateRule())}
        rules |= {s: fixed.get(s) or given.get(s) or StateRule(policy) for s in optimizer.states}
        config = replace(config, "algorithm", states=written(rules))
    _check_policies(config, rules, said if given else f"algorithm.momentum-policy = {policy!r}")
    return config


def _check_policies(config: Config, rules: Mapping[str, StateRule], said: str) -> None:
    """A policy must mean something for the state, and under the algorithm; `said`: by the key that names it."""
    algorithm = config.algorithm
    decentralized = ALGORITHMS[algorithm.name].decentralized
    for state, rule in rules.items():
        policy = MOMENTUM_POLICIES[rule.policy]
        if policy.gossip_only and not decentralized:
            raise InputError(f"{said}: needs algorithm.name = 'd-sgd-m'")
        if policy.gossip_only and state != "u":
            raise InputError(f"{said}: {rule.policy} is of u, the momentum of SGD; {state} has average, local, reset")
        if policy.one_step and algorithm.num_local_steps > 1:
            raise InputError(
                f"algorithm.num-local-steps = {algorithm.num_local_steps}: momentum-policy {rule.policy!r} is "
                "published for 1 step between two exchanges; set 1"
            )
        if policy.one_step and rules.get(X, StateRule()).period > 1:
            raise InputError(f"{said}: {rule.policy} follows x, which must be mixed in every round; x: average every 1")
        parted = algorithm.fragments > 1
        if parted and policy.one_step:
            raise InputError(
                f"{said}: {rule.policy} follows x, all of which must be mixed; set algorithm.fragments = 1"
            )
        if parted and rule.period > 1:
            raise InputError(
                f"algorithm.fragments = {algorithm.fragments}: its parts have their turns, and {state} is exchanged "
                f"every {rule.period} rounds; take 'every 1', or fragments = 1"
            )
