"""[algorithm]: the method, its local optimizer, what is exchanged and how often, and the server's own step."""

from dataclasses import dataclass

from fedmom.config.names import CLIENT_WEIGHTS, RUNNING_VARS
from fedmom.config.numbers import Range, above, at_least, within
from fedmom.config.sections.key import key
from fedmom.method.algorithms import ALGORITHMS, INTERVALS
from fedmom.method.decentralized.graphs import TOPOLOGIES, WEIGHTS
from fedmom.method.decentralized.topology import FILES
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.method.outer import OUTERS
from fedmom.method.schedules import SCHEDULES, UNITS
from fedmom.method.states.policies import MOMENTUM_POLICIES


@dataclass(frozen=True)
class AlgorithmConfig:
    name: str = key("pr-sgd-m", "training algorithm", ALGORITHMS)
    nesterov: bool = key(False, "use option II (Nesterov momentum) instead of option I (Polyak momentum)")
    num_local_steps: int = key(0, "I, local steps between two exchanges; 0: the algorithm's own", at_least(0))
    local_epochs: int = key(0, "passes over the client's data per round, instead of I steps; 0: off", at_least(0))
    interval: str = key("fixed", "how I is determined", INTERVALS)
    interval_milestones: str = key(
        "0.5,0.75", "interval decaying: fractions of the rounds at which I is halved, by commas", holds=","
    )
    optimizer: str = key("sgd", "local optimizer of every client", OPTIMIZERS)
    beta: float = key(0.9, "β, momentum coefficient; of adamw, adam and lion β₁", within(0, 1))
    beta2: float = key(0.0, "β₂ of adamw, adam and lion; 0: the optimizer's own (0.999, of lion 0.99)", within(0, 1))
    eps: float = key(1e-8, "ε of adamw, adam and adagrad, beside the root of v", at_least(0))
    lr: float = key(0.05, "γ, learning rate; with lr-schedule theory: c", above(0))
    lr_schedule: str = key("constant", "learning-rate schedule", SCHEDULES)
    lr_milestones: str = key("0.5,0.75", "lr-schedule step: where γ decays, in lr-unit, by commas", holds=",")
    lr_decay: float = key(0.1, "lr-schedule step: factor of γ at each milestone", above(0))
    lr_unit: str = key("fraction", "unit of lr-milestones and lr-warmup", UNITS)
    lr_warmup: float = key(0.0, "length of the linear warm-up, in lr-unit", at_least(0))
    lr_min: float = key(0.0, "lr-schedule cosine: γ at the end", at_least(0))
    weight_decay: float = key(0.0, "λ, weight decay: adds λx to the gradient; adamw, lion shrink x by γλx", at_least(0))
    momentum_policy: str = key("average", "what becomes of the optimizer's states between rounds", MOMENTUM_POLICIES)
    states: str = key(
        "",
        "policy and period in rounds of each state, as 'x: average every 1; u: average every 4'; empty: x in every "
        "round, the others by momentum-policy",
        holds="",
    )
    codecs: str = key(
        "",
        "how the change of each state is encoded that clients send, as 'x: int8; u: topk 0.1': float32, bfloat16, "
        "float16, int8, int4, topk, randomk or lowrank, and B of a block, k/d or the rank; plain: without feedback of "
        "the error; empty: as it is",
        holds="",
    )
    codecs_down: str = key(
        "",
        "how the change of each state is encoded that the server sends, written as algorithm.codecs; empty: as it is",
        holds="",
    )
    correction: str = key(
        "none",
        "your own change of the gradient",
        {"none": "the gradient as it is"},
        "module:function, or module:Class with a state (fedmom.Correction)",
    )
    prox_mu: float = key(0.01, "fedprox: μ, by which every client is held to where the round began", above(0))
    fedcm_alpha: float = key(
        0.1, "fedcm: α, the share of a client's own gradient in its steps", Range(0, 1, with_low=False, with_high=True)
    )
    personal: str = key(
        "", "tensors that stay with each client: norm, head or beginnings of names, by commas; empty: none", holds=","
    )
    client_weights: str = key("uniform", "weights of the clients in the averages of x and u", CLIENT_WEIGHTS)
    running_var: str = key("pooled", "how the running variances of BatchNorm are averaged", RUNNING_VARS)
    cohort_size: int = key(0, "clients that are sampled in each round; 0: all", at_least(0))
    slow_momentum: float = key(0.0, "SlowMo: server momentum α; 0 with slow-lr 1: off", within(0, 1))
    slow_lr: float = key(1.0, "SlowMo: learning rate η of the server", above(0))
    outer: str = key("none", "the server's own step after the averages", OUTERS)
    outer_lr: float = key(
        0.0, "η of the outer step; 0: its own (1; nesterov 0.7, fedadam and fedyogi 0.1)", at_least(0)
    )
    outer_momentum: float = key(0.9, "α, μ or β₁ of the outer step", within(0, 1))
    outer_beta2: float = key(0.99, "fedadam, fedyogi: β₂ of the outer step", within(0, 1))
    outer_tau: float = key(1e-3, "fedadam, fedyogi: τ, beside the root of v", above(0))
    outer_states: str = key("x", "states that the outer step moves, by commas", holds=",")
    fragments: int = key(1, "F, parts of the model, one of which is exchanged in a round; 1: all of it", at_least(1))
    topology: str = key(
        "complete", "d-sgd-m: communication graph of the clients", TOPOLOGIES, " or ".join(f"FILE{e}" for e in FILES)
    )
    mixing_weights: str = key("metropolis", "d-sgd-m: mixing matrix W of an undirected graph", WEIGHTS)
    topology_degree: int = key(4, "random-regular: neighbours of each client", at_least(1))
    topology_p: float = key(0.0, "erdos-renyi: probability of each link; 0: 2 ln N / N", Range(0, 1, with_high=True))
