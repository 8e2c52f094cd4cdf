"""Who averages under Flower: ours, or one of Flower's own strategies, and under which keys each is what its name says.

The one table of them; strategies/flower_strategies.py makes what is named here.
"""

from typing import NamedTuple

from fedmom.errors import InputError
from fedmom.method.states.rules import Rules

OURS = "pr-sgd-m"


class StrategyRule(NamedTuple):
    """A strategy of `[server] strategy`, and what it supposes of its clients."""

    summary: str
    keys: tuple[str, ...] = ()  # of [server], that no other reads
    means_of_means: bool = True  # whether a block's mean may stand for its clients
    moves_buffers: bool = False  # whether its step could drive a running_var negative
    weighs: bool = True  # whether it can take clients by their weights
    needs_all: bool = False  # whether it supposes that the whole cohort answered
    adds_noise: bool = False  # whether it is there for privacy


STRATEGIES = {
    OURS: StrategyRule("ours: model, momentum and buffers averaged in client order"),
    "fedavg": StrategyRule("Flower's FedAvg"),
    "fedavgm": StrategyRule(
        "Flower's FedAvgM: server momentum on top of FedAvg", ("lr", "momentum"), moves_buffers=True
    ),
    "fedadam": StrategyRule("Flower's FedAdam", ("lr",), moves_buffers=True),
    "fedtrimmedavg": StrategyRule("Flower's FedTrimmedAvg", ("trim",), means_of_means=False, weighs=False),
    "krum": StrategyRule("Flower's Krum", ("num-malicious",), means_of_means=False, weighs=False),
    "dp-fedavg": StrategyRule(
        "Flower's FedAvg with central differential privacy (fixed clipping at the server)",
        ("noise-multiplier", "clipping-norm"),
        means_of_means=False,
        moves_buffers=True,
        weighs=False,
        needs_all=True,
        adds_noise=True,
    ),
}


def check_strategy(
    name: str,
    *,
    rules: Rules,
    states: str,
    outer: bool,
    client_weights: str,
    on_failure: str,
    fewest: int,
    cohort_size: int,
    trim: float,
    num_malicious: int,
) -> None:
    """InputError naming the key under which one of Flower's strategies would not do what its name says.

    `fewest`: clients that may make a round: server.min-clients under on-failure "proceed", else the cohort.
    """
    if name == OURS:
        return
    rule, named = STRATEGIES[name], f"server.strategy = {name!r}"
    if rules.has_rows:
        key = f"states = {states!r}" if states else f"momentum-policy = {rules.policy!r}"
        key = key if (count := rules.fragments.num_parts) == 1 else f"fragments = {count}"
        raise InputError(f"{named}: algorithm.{key} lets clients keep states of their own, which needs {OURS}")
    if outer:
        raise InputError(
            f"{named}: has a server step of its own; algorithm.outer, slow-momentum and slow-lr need {OURS}"
        )
    if client_weights != "uniform" and not rule.weighs:
        why = "its noise is for equal weights" if rule.needs_all else "it has no weights"
        raise InputError(f"algorithm.client-weights = {client_weights!r}: not with {named}, {why}; take 'uniform'")
    if rule.needs_all and fewest < cohort_size:
        raise InputError(
            f"server.on-failure = {on_failure!r}: with {named} the noise is for {cohort_size} clients, and fewer would "
            f"get less than they need; take 'stop' or 'retry', or server.min-clients = {cohort_size}"
        )
    may = f"{fewest} of {cohort_size} clients may make a round" if fewest < cohort_size else f"a round has {fewest}"
    if "num-malicious" in rule.keys and fewest < (needed := 2 * num_malicious + 3):
        raise InputError(
            f"server.num-malicious = {num_malicious}: Krum needs at least {needed} clients in a round (2m + 3: "
            f"Blanchard et al., 2017), and {may} (algorithm.cohort-size, server.min-clients)"
        )
    if "trim" in rule.keys and 0 < trim * fewest < 1:
        raise InputError(
            f"server.trim = {trim:g}: cuts off {trim * fewest:.2g} clients at each end, which is none, where {may}; "
            f"take {1 / fewest:.2g} or more, or 0"
            if fewest > 2
            else f"server.trim = {trim:g}: of {fewest} clients none can be cut off at each end; take 0, or more clients"
        )


def idle_keys(name: str) -> list[str]:
    """The keys of [server] that strategies other than this one read, and this one does not."""
    all_keys = {key for rule in STRATEGIES.values() for key in rule.keys}
    return [f"server.{key}" for key in sorted(all_keys - set(STRATEGIES[name].keys))]
