"""The named algorithms, and what of a method stays the same over a run."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fedmom.method.corrections import Correct, Correction
from fedmom.method.optimizers.optimizer import Numbers, Optimizer
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.method.schedules import Follow, adaptive, decaying
from fedmom.method.states.fragments import Fragments
from fedmom.method.states.rules import CodecRule, Rules, StateRule


class Method(NamedTuple):
    """What of the algorithm stays the same over a run."""

    beta: float  # β, or β₁
    nesterov: bool = False
    weight_decay: float = 0.0
    momentum_policy: str = "average"  # of the optimizer's states that `states` says nothing of
    running_var: str = "pooled"
    correction: Correct | Correction | None = None  # of the gradient, the user's own
    optimizer: str = "sgd"
    beta2: float = 0.0
    eps: float = 1e-8
    states: Mapping[str, StateRule] = MappingProxyType({})  # of x and of the optimizer's states, by name
    fragments: Fragments = Fragments()  # the parts of the model that take turns at the exchange
    codecs: Mapping[str, CodecRule] = MappingProxyType({})  # of what clients send of them, where it is encoded

    @property
    def rules(self) -> Rules:
        """What becomes of every state between rounds."""
        fixed = self.by.rules
        states = {**self.states, **fixed} if fixed else self.states
        return Rules(self.momentum_policy, states, self.beta == 0, self.fragments)

    @property
    def by(self) -> Optimizer:
        """The local optimizer."""
        return OPTIMIZERS[self.optimizer]

    @property
    def numbers(self) -> Numbers:
        """What its steps have in common."""
        return Numbers(self.beta, self.beta2, self.eps, self.weight_decay, self.nesterov)

    @property
    def options(self) -> dict[str, Any]:
        """What `local_step` takes of it."""
        return {**self.numbers._asdict(), "optimizer": self.optimizer, "correction": self.correction}


class Algorithm(NamedTuple):
    """A named member of the family, as what it fixes."""

    summary: str
    default_interval: int = 8  # I, when the config says 0
    interval: int | None = None  # I that the name implies, whatever the config says
    beta: float | None = None  # β that the name implies
    decentralized: bool = False  # Algorithm 2: every client has its own x and u, mixed by W
    # A preset: the keys of [algorithm] that the name sets, each of which wins where the configuration gives it. Of
    # these a value that is the key's default cannot be told from none; "states" fills up what is not given of it.
    sets: Mapping[str, str | float] = MappingProxyType({})
    equation: str = ""  # of a preset, as its paper has it
    normalised: bool = False  # whether every client's way is divided by the length of its steps: FedNova


_DILOCO = {"optimizer": "adamw", "states": "m: local; v: local; u: local", "outer": "nesterov"}
ALGORITHMS = {
    "pr-sgd-m": Algorithm("Algorithm 1: I local momentum steps, then model and momentum are averaged"),
    "parallel-sgd-m": Algorithm("large-batch momentum SGD: Algorithm 1 with I = 1", 1, interval=1),
    "d-sgd-m": Algorithm(
        "Algorithm 2: each client's model and momentum are mixed with its neighbours'", 1, decentralized=True
    ),
    "local-sgd": Algorithm("local SGD without momentum: Algorithm 1 with β = 0", beta=0.0),
    "local-adam": Algorithm(
        "AdamW on the clients; x, m and v are averaged in every round",
        sets={"optimizer": "adamw", "states": "x: average; m: average; v: average"},
        equation="x̂, m̂, v̂ = Σ p_i (x_i, m_i, v_i) after I steps of AdamW",
    ),
    "des-loc": Algorithm(
        "DES-LOC: AdamW on the clients; x, m and v are averaged every 1, 3 and 6 rounds",
        sets={"optimizer": "adamw", "states": "x: average; m: average every 3; v: average every 6; u: average every 3"},
        equation="s_i <- ŝ after rounds k_s, 2k_s, … with k_x, k_m, k_v = 1, 3, 6",
    ),
    "diloco": Algorithm(
        "DiLoCo: AdamW on the clients, which keep m and v; an outer Nesterov step on x",
        sets=_DILOCO,
        equation="Δ = x − x̂;  b <- μb + Δ;  x <- x − η(Δ + μb), η = 0.7, μ = 0.9",
    ),
    "slowmo": Algorithm(
        "SlowMo: momentum SGD on the clients, averaged, and an outer momentum α = 0.5 on x",
        sets={"slow-momentum": 0.5},
        equation="u_s <- α u_s + (x − x̂)/γ;  x <- x − ηγ u_s",
    ),
    "fedavgm": Algorithm(
        "FedAvgM: SGD on the clients, an outer momentum μ on x",
        beta=0.0,
        sets={"outer": "fedavgm"},
        equation="b <- μb + Δ;  x <- x − ηb, Δ = x − x̂",
    ),
    "streaming-diloco": Algorithm(
        "Streaming DiLoCo without delay or blending: DiLoCo by parts of the model, one in a round",
        sets={**_DILOCO, "fragments": 4},
        equation="as diloco, for part f of x after rounds f, f + F, f + 2F, …; F = 4 is ours",
    ),
    "fedadam": Algorithm(
        "FedAdam: SGD on the clients, an outer Adam step on x",
        beta=0.0,
        sets={"outer": "fedadam"},
        equation="m <- β₁m − (1−β₁)Δ;  v <- β₂v + (1−β₂)Δ²;  x <- x + ηm/(√v + τ)",
    ),
    "fedprox": Algorithm(
        "FedProx: local SGD whose clients are held to x̂ by μ = algorithm.prox-mu",
        sets={"beta": 0.0},
        equation="g <- g + μ(x − x_start)",
    ),
    "scaffold": Algorithm(
        "SCAFFOLD: local SGD, each client's gradients corrected by how they differed from all clients' before",
        sets={"beta": 0.0},
        equation="g <- g − c_i + c;  c_i⁺ = c_i − c + (x − y_i)/(Iγ);  c <- c + Σ_cohort (c_i⁺ − c_i)/N",
    ),
    "fednova": Algorithm(
        "FedNova: local SGD with unequal numbers of steps (algorithm.local-epochs), averaged per step",
        sets={"beta": 0.0, "states": "x: average; u: reset"},
        equation="x <- x − τ_eff Σ p_i (x − y_i)/a_i;  a_i = Σ_{k≤τ_i} (1−β^k)/(1−β);  τ_eff = Σ p_i a_i",
        normalised=True,
    ),
    "fedcm": Algorithm(
        "FedCM: local steps by α g and 1 − α the mean step of the last round, α = algorithm.fedcm-alpha",
        beta=0.0,
        equation="g <- αg + (1−α)D;  D <- (x − x̂)/(Iγ)",
    ),
    "mime-lite": Algorithm(
        "MimeLite: local steps by the server's momentum, which moves once in a round",
        equation="g <- g + βm, m fixed in the round;  m <- βm + Σ p_i ∇f_i(x_start)",
    ),
    "gradient-tracking": Algorithm(
        "Algorithm 2 with gradient tracking: y follows the mean gradient of all clients, and is mixed as x is",
        1,
        decentralized=True,
        sets={"optimizer": "gradient-tracking"},
        equation="y_i <- y_i + g_i − g_i^before;  x_i <- x_i − γy_i;  then x_i, y_i <- Σ_j W_ji (x_j, y_j)",
    ),
    "d-sgd-m-qg": Algorithm(
        "Algorithm 2 with quasi-global momentum: u follows how far x moved, and does not travel",
        1,
        decentralized=True,
        sets={"optimizer": "sgd", "states": "x: average; u: quasi-global"},
        equation="m̂_i <- βm̂_i + (1−β)(x_i − Σ_j W_ji x̃_j)/γ",
    ),
}


def theory_interval(kind: str, num_steps: int, num_clients: int) -> int:
    """The largest I (up to its constant) that keeps the rate O(1/√(NT)): Yu, Jin, Yang (2019).

    `theory-iid` (identical data): ⌊T^{1/2} / N^{3/2}⌋; `theory-non-iid`: ⌊T^{1/4} / N^{3/4}⌋; at least 1.
    """
    # ⌊√q⌋ of the integer quotient q = ⌊T / N³⌋ is ⌊√(T / N³)⌋ exactly; floats would miss perfect powers.
    quotient = num_steps // num_clients**3
    root = math.isqrt(quotient)
    return max(1, {"theory-iid": root, "theory-non-iid": math.isqrt(root)}[kind])


class Interval(NamedTuple):
    """How I is determined."""

    summary: str
    needs_length: bool = True  # whether I depends on how long the run will be
    follow: Follow | None = None  # of a rule by which I changes in a run
    sums: bool = True  # whether all steps can be counted before the run


INTERVALS = {
    "fixed": Interval("I = num-local-steps", needs_length=False),
    "theory-iid": Interval("I = max(1, ⌊T^(1/2) / N^(3/2)⌋), for identical data; needs run.num-steps = T"),
    "theory-non-iid": Interval("I = max(1, ⌊T^(1/4) / N^(3/4)⌋), for distinct data; needs run.num-steps = T"),
    "decaying": Interval("I = num-local-steps at first, halved at each of interval-milestones", follow=decaying),
    "adaptive": Interval(
        "ours: I = num-local-steps at first, halved after a round in which clients part more than x̂ moves (ρ > 4)",
        needs_length=False,
        follow=adaptive,
        sums=False,
    ),
}
