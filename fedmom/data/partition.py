"""Labels -> who holds which example: one table of partition rules.

Every rule gives each of the n examples to exactly one of the N clients. The three Dirichlet rules differ in
what they keep. dirichlet-client keeps client sizes equal; its alpha is a whole class mix's, Dir(alpha p).
dirichlet-class lets sizes vary; its alpha is one client's share of a class, so that C classes make it about
C times as even as the same alpha in dirichlet-client. dirichlet-balanced is dirichlet-class with equal sizes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

import numpy as np

from fedmom.data.drawing import (
    deal,
    deal_shuffled,
    equal_sizes,
    log_gamma,
    round_shares,
    settle_columns,
    sinkhorn,
    softmax,
)
from fedmom.errors import InputError, unknown


class Partition(NamedTuple):
    """Who holds which example: client c holds indices[offsets[c]:offsets[c + 1]]."""

    indices: np.ndarray  # [n] int64, example numbers, a client's own sorted ascending
    offsets: np.ndarray  # [N + 1] int64

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """[N] int64, examples per client."""
        return np.diff(self.offsets)

    def of(self, client: int) -> np.ndarray:
        """[sizes[client]] int64, the examples of one client."""
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client}: there are {self.num_clients}")
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    def class_counts(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """[N, num_classes] int64, examples per client and class; labels [n] in 0..num_classes - 1."""
        held = np.asarray(labels, dtype=np.int64)[self.indices]
        if held.size and not 0 <= held.min() <= held.max() < num_classes:
            raise ValueError(f"labels from {held.min()} to {held.max()}: must be in 0..{num_classes - 1}")
        client = np.repeat(np.arange(self.num_clients), self.sizes)
        flat = np.bincount(client * num_classes + held, minlength=self.num_clients * num_classes)
        return flat.reshape(self.num_clients, num_classes)


class Request(NamedTuple):
    """What a rule is asked for."""

    classes: np.ndarray  # [n] int64, labels renumbered 0..C - 1, so that no class is empty
    class_sizes: np.ndarray  # [C] int64, >= 1
    num_clients: int  # N
    alpha: float
    min_size: int
    shards_per_client: int
    quantity_law: str
    sigma: float
    rng: np.random.Generator

    @property
    def equal_sizes(self) -> np.ndarray:
        """[N] int64, n / N, the first n mod N clients one more."""
        return equal_sizes(len(self.classes), self.num_clients)


class PartitionRule(NamedTuple):
    function: Callable[[Request], np.ndarray]  # -> owner [n] int64, the client of every example
    summary: str  # one line, naming the source
    skews: bool = True  # whether it looks at labels


# The rules ------------------------------------------------------------------------------------------------


def iid(request: Request) -> np.ndarray:
    """A random permutation cut into N equal parts (McMahan et al., AISTATS 2017)."""
    return deal_shuffled(request.equal_sizes, request.rng)


def dirichlet_client(request: Request) -> np.ndarray:
    """Client c draws n / N examples, classes by q_c ~ Dir(alpha p), p the class prior, without replacement.

    Hsu, Qi, Brown (arXiv:1909.06335, 2019). A class that is used up drops out of q_c, which is renormalised:
    the last clients take what the others left.
    """
    rng, num_clients, num_classes = request.rng, request.num_clients, len(request.class_sizes)
    concentration = request.alpha * (request.class_sizes / len(request.classes))
    counts = np.zeros((num_clients, num_classes), np.int32)  # 40 MB for a million clients and ten classes
    needed, remaining = request.equal_sizes, request.class_sizes.copy()
    # A draw from a used-up class, thrown away and drawn again, is a draw from the renormalised q. So of m
    # draws at once, drawing one by one keeps min(drawn, remaining) per class and draws the rest again. Who
    # stays within what remains has nothing to draw again: a block of such clients is one call, up to the first
    # who does not; that one uses up a class, so it happens at most once per class.
    block = max(1, 2**16 // num_classes)
    for begin in range(0, num_clients, block):
        end = min(begin + block, num_clients)
        log_q = log_gamma(concentration, (end - begin, num_classes), rng)
        first = begin
        while first < end:
            q = softmax(np.where(remaining > 0, log_q[first - begin :], -np.inf))
            drawn = rng.multinomial(needed[first:end], q)
            num_fit = int((drawn.cumsum(axis=0) <= remaining).all(axis=1).sum())
            kept = drawn[: num_fit + 1]
            kept[num_fit:] = np.minimum(kept[num_fit:], remaining - kept[:num_fit].sum(axis=0))
            counts[first : first + len(kept)] += kept.astype(np.int32)
            needed[first : first + len(kept)] -= kept.sum(axis=1)
            remaining -= kept.sum(axis=0)
            first += num_fit
    return deal(counts, request.classes, request.rng)


def dirichlet_class(request: Request) -> np.ndarray:
    """Class k is shared out over the clients by p_k ~ Dir(alpha); again until all hold min_size examples.

    Yurochkin et al. (ICML 2019); Li et al. (NIID-Bench, ICDE 2022). NIID-Bench's code also gives nothing more
    to a client that holds n / N examples already; that is left out here.

    Raises InputError if 1,000 draws (fewer where one takes long) do not give everybody min_size.
    """
    shape = len(request.class_sizes), request.num_clients
    num_draws = min(1000, max(10, 10**8 // math.prod(shape)))  # 10^8 gamma draws are about ten seconds
    for _ in range(num_draws):
        shares = softmax(log_gamma(request.alpha, shape, request.rng))
        # The clients are exchangeable; permuting them keeps the roundings of the classes independent.
        counts = request.rng.permuted(round_shares(shares, request.class_sizes, request.rng), axis=1).T
        if counts.sum(axis=1).min() >= request.min_size:
            return deal(counts, request.classes, request.rng)
    raise InputError(
        f"data.min-size = {request.min_size}: {num_draws} draws of dirichlet-class with data.alpha = "
        f"{request.alpha:g} left some of {request.num_clients} clients with fewer; take a larger data.alpha, "
        "fewer clients or data.partition = dirichlet-client"
    )


def dirichlet_balanced(request: Request) -> np.ndarray:
    """As dirichlet-class, and then scaled so that all clients have equal sizes; both margins hold exactly.

    Shares r_i G_ik s_k, G_ik ~ Gamma(alpha), with r and s such that rows add up to client sizes and columns
    to class sizes (Sinkhorn & Knopp 1967); whether G is first normalised to Dirichlet rows or columns makes
    no difference. Rows are rounded to integers, then single examples moved until the columns are exact too.
    """
    # Below 1e-4 nothing changes any more: all but C - 1 clients are of one class.
    alpha = max(request.alpha, 1e-4)
    sizes = request.equal_sizes
    log_weights = log_gamma(alpha, (request.num_clients, len(request.class_sizes)), request.rng)
    shares = sinkhorn(log_weights, sizes, request.class_sizes, num_halvings=max(0, math.ceil(-math.log2(alpha))))
    counts = round_shares(shares, sizes, request.rng)
    settle_columns(counts, sizes[:, None] * shares, request.class_sizes)
    return deal(counts, request.classes, request.rng)


def shards(request: Request) -> np.ndarray:
    """Sorted by label, cut into N * shards_per_client shards, dealt at random, shards_per_client each.

    McMahan et al. (AISTATS 2017), section 3: two shards of 300 for each of 100 clients. Shards are equal
    within one, so sizes are equal within shards_per_client.
    """
    num_shards = request.num_clients * request.shards_per_client
    owner_of_shard = np.repeat(np.arange(request.num_clients), request.shards_per_client)
    request.rng.shuffle(owner_of_shard)
    owner = np.empty(len(request.classes), np.int64)
    by_label = np.argsort(request.classes, kind="stable")
    owner[by_label] = np.repeat(owner_of_shard, equal_sizes(len(owner), num_shards))
    return owner


def quantity(request: Request) -> np.ndarray:
    """Labels as in iid, sizes in proportion to weights drawn from QUANTITY_LAWS, but nobody below min_size.

    log-normal: weights exp(sigma z), z ~ N(0, 1), as in FedLab (Zeng et al., JMLR 2023), `unbalance_sgm`.
    dirichlet: weights ~ Dir(alpha), as in NIID-Bench (Li et al., ICDE 2022).
    """
    num_examples, num_clients, min_size = len(request.classes), request.num_clients, request.min_size
    weights = softmax(QUANTITY_LAWS[request.quantity_law](request))
    spare = num_examples - num_clients * min_size
    if spare == 0:
        return deal_shuffled(np.full(num_clients, min_size), request.rng)
    # sizes = max(scale * weights, min_size), scale such that they add up to n.
    above = np.ones(num_clients, bool)
    while True:
        scale = (num_examples - min_size * (~above).sum()) / weights[above].sum()
        below = above & (scale * weights < min_size)
        if not below.any():
            break
        above &= ~below
    excess = np.where(above, scale * weights - min_size, 0.0)
    sizes = min_size + round_shares(excess[None] / excess.sum(), np.array([spare]), request.rng)[0]
    return deal_shuffled(sizes, request.rng)


def _log_normal(request: Request) -> np.ndarray:
    """sizes ∝ exp(σ z), z standard normal, σ = data.sigma"""
    return request.sigma * request.rng.standard_normal(request.num_clients)


def _dirichlet_sizes(request: Request) -> np.ndarray:
    """sizes ∝ Dir(α), α = data.alpha"""
    return log_gamma(request.alpha, (request.num_clients,), request.rng)


# Request -> [N] log weights of the sizes.
QUANTITY_LAWS: dict[str, Callable[[Request], np.ndarray]] = {"log-normal": _log_normal, "dirichlet": _dirichlet_sizes}

PARTITIONS: dict[str, PartitionRule] = {
    "iid": PartitionRule(iid, "a random permutation, equal sizes (McMahan et al. 2017)", skews=False),
    "dirichlet-client": PartitionRule(
        dirichlet_client, "every client its own class mix ~ Dir(alpha p), equal sizes (Hsu, Qi, Brown 2019)"
    ),
    "dirichlet-class": PartitionRule(
        dirichlet_class,
        "every class over the clients ~ Dir(alpha), sizes vary (Yurochkin et al. 2019; NIID-Bench)",
    ),
    "dirichlet-balanced": PartitionRule(
        dirichlet_balanced,
        "dirichlet-class scaled to equal sizes (by Sinkhorn & Knopp 1967; not from a paper on FL)",
    ),
    "shards": PartitionRule(
        shards, "sorted by label, shards-per-client pieces each, equal sizes (McMahan et al. 2017)"
    ),
    "quantity": PartitionRule(
        quantity,
        "labels as in iid, sizes by data.quantity-law (log-normal: FedLab; dirichlet: NIID-Bench)",
        skews=False,
    ),
}


def _check_numbers(num_clients: int, alpha: float, min_size: int, shards_per_client: int, sigma: float) -> None:
    """InputError names the number that is out of range."""
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"data.alpha = {alpha}: must be > 0 and finite")
    if not (math.isfinite(sigma) and sigma >= 0):
        raise InputError(f"data.sigma = {sigma}: must be >= 0 and finite")
    if num_clients < 1:
        raise InputError(f"data.num-clients = {num_clients}: must be >= 1")
    if min_size < 0:
        raise InputError(f"data.min-size = {min_size}: must be >= 0")
    if shards_per_client < 1:
        raise InputError(f"data.shards-per-client = {shards_per_client}: must be >= 1")


def _check_reach(name: str, num_examples: int, num_clients: int, min_size: int, shards_per_client: int) -> None:
    """InputError where the rule `name` cannot give to every client what it is to hold."""
    may_be_empty = name == "dirichlet-class" and min_size == 0 and num_examples > 0
    if num_clients > num_examples and not may_be_empty:
        raise InputError(
            f"data.num-clients = {num_clients}: only {num_examples} examples; each client needs at least one"
        )
    if num_clients * min_size > num_examples:
        raise InputError(
            f"data.min-size = {min_size}: {num_clients} clients need {num_clients * min_size} examples and "
            f"there are {num_examples}; at most {num_examples // num_clients}"
        )
    if name == "shards" and num_clients * shards_per_client > num_examples:
        raise InputError(
            f"data.shards-per-client = {shards_per_client}: {num_clients} clients need "
            f"{num_clients * shards_per_client} shards and there are {num_examples} examples; "
            f"at most {num_examples // num_clients}"
        )


def make_partition(
    name: str,
    labels: np.ndarray,
    num_clients: int,
    *,
    alpha: float = 0.3,
    min_size: int = 1,
    shards_per_client: int = 2,
    quantity_law: str = "log-normal",
    sigma: float = 1.0,
    seed: int = 0,
) -> Partition:
    """Partition n examples, labels [n] integers (classes may be absent), by a rule of PARTITIONS.

    The same arguments give the same Partition. alpha > 0: Dirichlet concentration (dirichlet-*, quantity-law
    dirichlet). min_size: examples that every client holds at least, under every rule. sigma >= 0: standard
    deviation of log sizes (quantity-law log-normal). seed >= 0.

    Raises InputError for an argument out of range or out of reach, naming the key in a config.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels of shape {labels.shape}: must be [n]")
    if name not in PARTITIONS:
        raise unknown("data.partition", name, PARTITIONS)
    if quantity_law not in QUANTITY_LAWS:
        raise unknown("data.quantity-law", quantity_law, QUANTITY_LAWS)
    _check_numbers(num_clients, alpha, min_size, shards_per_client, sigma)
    _check_reach(name, len(labels), num_clients, min_size, shards_per_client)
    _, classes, class_sizes = np.unique(labels, return_inverse=True, return_counts=True)
    rng = np.random.default_rng([seed, crc32(name.encode())])  # no two rules share a stream
    owner = PARTITIONS[name].function(
        Request(classes, class_sizes, num_clients, alpha, min_size, shards_per_client, quantity_law, sigma, rng)
    )
    sizes = np.bincount(owner, minlength=num_clients)
    if sizes.min() < min_size:  # shards only: the others keep to it by themselves
        raise InputError(
            f"data.min-size = {min_size}: data.shards-per-client = {shards_per_client} left a client with "
            f"{sizes.min()}; take fewer shards or a smaller min-size"
        )
    return Partition(np.argsort(owner, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))
