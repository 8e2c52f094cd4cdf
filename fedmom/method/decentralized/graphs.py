"""Graphs of clients by name: one table of who is linked with whom, and the weights of an undirected graph."""

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np

from fedmom.errors import InputError

Edges = Iterable[tuple[int, int]] | np.ndarray  # [E, 2]
Layout = Literal["circle", "hub", "grid"]  # where a picture places the clients; a hub is client 0, in the middle


class GraphOptions(NamedTuple):
    """Section `algorithm`'s numbers for the topologies that need one."""

    degree: int = 4  # of random-regular
    probability: float = 0.0  # of an edge of erdos-renyi; 0: 2 ln N / N
    seed: int = 0


def _sizes(name: str, num_clients: int, which: str, fit: Iterable[int]) -> InputError:
    sizes = sorted(set(fit), key=lambda n: (abs(n - num_clients), n))[:4]
    near = ", ".join(map(str, sorted(sizes)))
    return InputError(f"algorithm.topology = {name!r}: needs {which}, data.num-clients = {num_clients}; near: {near}")


def complete(n: int, options: GraphOptions) -> np.ndarray:
    return np.stack(np.triu_indices(n, 1), axis=1)


def ring(n: int, options: GraphOptions) -> Edges:
    return {(min(i, (i + 1) % n), max(i, (i + 1) % n)) for i in range(n) if n > 1}


def path(n: int, options: GraphOptions) -> Edges:
    return [(i, i + 1) for i in range(n - 1)]


def star(n: int, options: GraphOptions) -> Edges:
    """Client 0 is the hub."""
    return [(0, i) for i in range(1, n)]


def torus_shape(n: int) -> tuple[int, int] | None:
    """(rows, columns) of the squarest torus of n clients; None for primes."""
    return next(((a, n // a) for a in range(math.isqrt(n), 1, -1) if n % a == 0), None)


def torus(n: int, options: GraphOptions) -> Edges:
    shape = (1, 1) if n == 1 else torus_shape(n)
    if shape is None:
        fit = [m for m in range(max(4, n - 6), n + 7) if torus_shape(m)]
        raise _sizes("torus", n, "N = rows × columns, both at least 2", fit)
    rows, columns = shape
    edges = set()
    for r in range(rows):
        for c in range(columns):
            for other in (((r + 1) % rows) * columns + c, r * columns + (c + 1) % columns):
                here = r * columns + c
                edges.add((min(here, other), max(here, other)))
    return {edge for edge in edges if edge[0] != edge[1]}


def hypercube(n: int, options: GraphOptions) -> Edges:
    if n & (n - 1):
        raise _sizes("hypercube", n, "N = 2^k", [1 << k for k in range(n.bit_length() + 2)])
    return [(i, i | 1 << k) for i in range(n) for k in range(n.bit_length() - 1) if not i >> k & 1]


def random_regular(n: int, options: GraphOptions) -> Edges:
    degree = options.degree
    if n == 1:
        return []
    if degree >= n or n * degree % 2 or (degree == 1 and n > 2):
        fit = [m for m in range(degree + 1, max(n, degree) + 8) if m * degree % 2 == 0 and (degree > 1 or m == 2)]
        name = "random-regular"
        raise _sizes(name, n, f"N > topology-degree = {degree} and N × degree even (degree 1: N = 2)", fit)
    import networkx

    return _connected("random-regular", n, options, lambda seed: networkx.random_regular_graph(degree, n, seed=seed))


def erdos_renyi(n: int, options: GraphOptions) -> Edges:
    probability = options.probability or min(1.0, 2 * math.log(max(n, 2)) / n)
    import networkx

    return _connected("erdos-renyi", n, options, lambda seed: networkx.gnp_random_graph(n, probability, seed=seed))


def _connected(name: str, n: int, options: GraphOptions, draw: Callable[[int], object]) -> Edges:
    """The first connected one of 200 graphs by seed."""
    import networkx

    for attempt in range(200):
        graph = draw(options.seed * 1_000_003 + attempt)
        if networkx.is_connected(graph):
            return sorted((min(e), max(e)) for e in graph.edges)  # type: ignore[attr-defined]
    key, value = ("topology-p", options.probability) if name == "erdos-renyi" else ("topology-degree", options.degree)
    raise InputError(f"algorithm.{key} = {value}: none of 200 {name} graphs of {n} clients is connected; raise it")


def hops(n: int) -> list[int]:
    """2^0, 2^1, … below n: the exponential graph's."""
    return [1 << k for k in range(max(n - 1, 0).bit_length())]


class Rule(NamedTuple):
    """A topology by name: an undirected graph, whose weights come from WEIGHTS, or a directed circulant."""

    summary: str
    edges: Callable[[int, GraphOptions], Edges] | None = None  # who is linked with whom
    hops: Callable[[int], list[list[int]]] | None = None  # a list of hops per round of the period; W = 1/(hops + 1)
    layout: Layout = "circle"


TOPOLOGIES: dict[str, Rule] = {
    "complete": Rule("everybody with everybody: W = 11ᵀ/N", complete),
    "ring": Rule("i with i ± 1", ring),
    "torus": Rule("a grid whose ends meet, as square as N allows", torus, layout="grid"),
    "hypercube": Rule("i with i ⊕ 2^k; N = 2^k", hypercube),
    "star": Rule("client 0 with everybody", star, layout="hub"),
    "path": Rule("a ring that is cut open", path),
    "exponential": Rule("i sends to i + 2^k, all k in every round", hops=lambda n: [hops(n)]),
    "one-peer-exponential": Rule(
        "i sends to i + 2^k, one k per round in turn; N = 2^k are equal after log₂N rounds, other N nearly",
        hops=lambda n: [[hop] for hop in hops(n)] or [[]],
    ),
    "directed-ring": Rule("i sends to i + 1", hops=lambda n: [[1] if n > 1 else []]),
    "random-regular": Rule("topology-degree neighbours each, by seed, connected", random_regular),
    "erdos-renyi": Rule("every pair with probability topology-p, by seed, connected", erdos_renyi),
}


# --- weights ---------------------------------------------------------------------------------------------


def metropolis(degrees: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 / (1 + max(degree_a, degree_b)): Metropolis-Hastings; symmetric and doubly stochastic on any graph."""
    return 1.0 / (1 + np.maximum(degrees[a], degrees[b]))


def uniform(degrees: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 / (degree + 1) on a regular graph."""
    if len(set(degrees.tolist())) > 1:
        raise InputError(
            f"algorithm.mixing-weights = 'uniform': needs a regular graph, here degrees go from {degrees.min()} to "
            f"{degrees.max()}; use metropolis"
        )
    return 1.0 / (1 + degrees[a])


WEIGHTS = {"metropolis": metropolis, "uniform": uniform}
