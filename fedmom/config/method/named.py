"""What algorithm.name says of other keys: what it is defined by, and what it sets where nothing is given."""

from fedmom.config.keys import KEYS, Config
from fedmom.config.load import flat, replace
from fedmom.config.method.states import parse_states, written
from fedmom.errors import InputError
from fedmom.method.algorithms import ALGORITHMS
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.method.outer import OUTERS
from fedmom.method.state import X
from fedmom.method.states.rules import StateRule


def settle_named(config: Config, given: frozenset[str], notes: list[str]) -> Config:
    """A name like parallel-sgd-m fixes I or β, whatever else the configuration says."""
    algorithm = config.algorithm
    fixed = ALGORITHMS[algorithm.name]
    if fixed.interval is not None:
        overruled = []
        if algorithm.num_local_steps not in (0, fixed.interval):
            overruled.append(f"num-local-steps = {algorithm.num_local_steps}")
        if algorithm.local_epochs:
            overruled.append(f"local-epochs = {algorithm.local_epochs}")
        if algorithm.interval != "fixed":
            overruled.append(f'interval = "{algorithm.interval}"')
        if overruled:
            notes.append(f"{algorithm.name} is I = {fixed.interval}: it overrules {', '.join(overruled)}")
        config = replace(config, "algorithm", interval="fixed", num_local_steps=fixed.interval, local_epochs=0)
    linear = OPTIMIZERS[algorithm.optimizer].linear
    if fixed.beta is not None and not linear and not fixed.equation:
        raise InputError(
            f"algorithm.optimizer = {algorithm.optimizer!r}: {algorithm.name} is SGD with β = {fixed.beta:g}; take "
            "algorithm.name = 'pr-sgd-m', or local-adam"
        )
    if fixed.beta is not None and linear:  # β₁ of another optimizer is no momentum that the name goes without
        if "algorithm.beta" in given and algorithm.beta != fixed.beta:
            notes.append(f"{algorithm.name} is β = {fixed.beta:g}: it overrules beta = {algorithm.beta:g}")
        config = replace(config, "algorithm", beta=fixed.beta)
    return _settle_preset(config, given, notes) if fixed.sets else config


def _settle_preset(config: Config, given: frozenset[str], notes: list[str]) -> Config:
    """The keys that a preset sets. What the configuration gives wins, and is said to.

    algorithm.states comes out with every state's rule, so that resolving once more changes nothing, also where a key
    that was given its default cannot be told from one that was not given.
    """
    name, sets, wins = config.algorithm.name, dict(ALGORITHMS[config.algorithm.name].sets), list[str]()
    preset, own = parse_states(str(sets.pop("states", ""))), parse_states(config.algorithm.states)
    for key, value in sets.items():
        full = f"algorithm.{key}"
        now, default = flat(config)[full], KEYS[full].default
        if key == "beta" and not OPTIMIZERS[config.algorithm.optimizer].linear:
            continue  # β₁, which is no momentum that the name goes without
        if key == "optimizer":
            # One that was given its default is told by its states, which come out written, and are not the preset's.
            told = full in given or now != default or not set(own) <= {X, *OPTIMIZERS[str(value)].states}
        else:
            told = now != default
        if key == "slow-momentum" and OUTERS[config.algorithm.outer].step:
            wins.append(f"outer = {config.algorithm.outer!r} over {key} = {value!r}")
            continue
        if not told:
            config = replace(config, "algorithm", **{KEYS[full].name: value})
            if full in given and now != value:
                notes.append(f"{name} has {key} = {value!r}: {key} = {now!r} is the key's default, and reads as none")
        elif now != value:
            wins.append(f"{key} = {now!r} over {value!r}")
    policy, has = config.algorithm.momentum_policy, (X, *OPTIMIZERS[config.algorithm.optimizer].states)
    if preset:
        rules = {X: preset.get(X, StateRule())} | {s: preset.get(s, StateRule(policy)) for s in has[1:]}
        if "algorithm.momentum-policy" in given or policy != KEYS["algorithm.momentum-policy"].default:
            rules |= {state: StateRule(policy) for state in has if state != X}
        rules |= own
        wins += [f"{written({s: r})} over {written({s: preset[s]})}" for s, r in rules.items() if preset.get(s, r) != r]
        config = replace(config, "algorithm", states=written(rules))
    if wins:
        notes.append(f"algorithm.name = {name!r}: the configuration's {', '.join(wins)} wins")
    return config
