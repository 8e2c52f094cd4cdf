"""Drawing of sizes and shares: what the partition rules have in common, on plain arrays.

N clients, C classes, n examples; an owner [n] is the client of every example.
"""

import numpy as np


def equal_sizes(total: int, num_parts: int) -> np.ndarray:
    """[num_parts] int64, equal within one, larger ones first."""
    return total // num_parts + (np.arange(num_parts) < total % num_parts)


def deal_shuffled(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sizes [N] -> owner [n]: which examples is left to chance."""
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


def deal(counts: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Counts [N, C] of classes [n] 0..C - 1, columns adding up to class sizes -> owner [n]: which of a class is left
    to chance."""
    shuffled = rng.permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    owner = np.empty(len(by_class), np.int64)
    stop = 0
    for column in counts.T:
        start, stop = stop, stop + int(column.sum())
        owner[by_class[start:stop]] = np.repeat(np.arange(len(column)), column)
    return owner


def log_gamma(shape: float | np.ndarray, size: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Logarithms of Gamma(shape) draws, finite for every shape > 0.

    G(a) = G(a + 1) U^(1 / a) (Marsaglia & Tsang 2000, section 6), and -log U is exponential. Gamma(0.001)
    itself is mostly 0 in floating point, and a Dirichlet draw made of zeros is NaN.
    """
    shape = np.clip(shape, 1e-200, 1e200)
    return np.log(rng.standard_gamma(shape + 1, size)) - rng.standard_exponential(size) / shape


def softmax(logs: np.ndarray) -> np.ndarray:
    """exp(logs), normalised along the last axis; at least one of it must be finite."""
    weights = np.exp(logs - logs.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def round_shares(shares: np.ndarray, totals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shares [R, M], rows adding up to 1 -> counts [R, M] int64, rows adding up to totals [R] exactly.

    Systematic sampling (Madow & Madow 1944): a count is totals * shares rounded up or down, right on average.
    """
    edges = np.floor(np.cumsum(totals[:, None] * shares, axis=1) + rng.random((len(totals), 1))).astype(np.int64)
    edges = np.minimum(edges, totals[:, None])
    edges[:, -1] = totals
    return np.diff(edges, axis=1, prepend=0)


def sinkhorn(log_weights: np.ndarray, sizes: np.ndarray, class_sizes: np.ndarray, *, num_halvings: int) -> np.ndarray:
    """Shares [N, C] = r_i exp(log_weights)_ik s_k: rows add up to 1, and columns, weighted by sizes [N], to
    class_sizes [C], within 1 % or as near as 50 steps get.

    A step multiplies s by what is missing: too slow for weights that differ by e^1000. So the weights to the
    power 2^-num_halvings are balanced first, then that squared, and so on (epsilon scaling: Kosowsky & Yuille
    1994).
    """
    log_s = np.zeros(len(class_sizes))
    for halving in range(num_halvings, -1, -1):
        log_s *= 2
        for _ in range(50):
            shares = softmax(log_weights * 2.0**-halving + log_s)
            totals = sizes @ shares
            if (abs(totals - class_sizes) <= 0.01 * class_sizes).all():
                break
            log_s += np.log(class_sizes / np.maximum(totals, 1e-300))
    return shares


def settle_columns(counts: np.ndarray, wanted: np.ndarray, class_sizes: np.ndarray) -> None:
    """Move single examples between classes within a client, in place, until columns add up to class_sizes.

    Each pass settles a column or takes one from every client there is; first from those whom it brings
    nearest to wanted [N, C].
    """
    excess = counts.sum(axis=0) - class_sizes
    while excess.any():
        source, target = int(excess.argmax()), int(excess.argmin())
        holders = np.flatnonzero(counts[:, source])
        too_many = counts[holders, source] - wanted[holders, source]
        too_few = wanted[holders, target] - counts[holders, target]
        by_gain = np.argsort(-(too_many + too_few), kind="stable")
        moved = holders[by_gain[: min(excess[source], -excess[target])]]
        counts[moved, source] -= 1
        counts[moved, target] += 1
        excess[source] -= len(moved)
        excess[target] += len(moved)
