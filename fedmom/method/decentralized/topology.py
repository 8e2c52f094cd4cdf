"""Graphs of clients -> mixing matrices W for Algorithm 2, checked; their spectral gap and mixing time.

Convention of Yu, Jin, Yang (ICML 2019), Algorithm 2: x_i <- Σ_j x_j W_ji, so W[j, i] is the weight of what j sends to
i. Rows that sum to 1 keep the mean, columns that sum to 1 keep consensus; W is doubly stochastic if both do.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedmom.errors import InputError, unknown
from fedmom.machine.files import at_home
from fedmom.method.decentralized.graphs import TOPOLOGIES, WEIGHTS, Edges, GraphOptions, Layout

TOLERANCE = 1e-8  # of row and column sums: matrices in files are rounded
FILES = (".npy", ".csv", ".edges")
LARGEST_SPECTRUM = 4096  # clients; beyond it the eigenvalues would take minutes


class Mixing(NamedTuple):
    """One mixing matrix by its positive entries: W[sources[e], targets[e]] = weights[e]."""

    num_clients: int
    sources: np.ndarray  # [E] int64, self-loops included
    targets: np.ndarray  # [E] int64
    weights: np.ndarray  # [E] float64

    @classmethod
    def of(cls, matrix: np.ndarray) -> "Mixing":
        """The positive entries of a dense W [N, N]."""
        sources, targets = np.nonzero(matrix)
        return cls(len(matrix), sources, targets, matrix[sources, targets].astype(np.float64))

    def dense(self) -> np.ndarray:
        """W [N, N] float64."""
        matrix = np.zeros((self.num_clients, self.num_clients))
        np.add.at(matrix, (self.sources, self.targets), self.weights)
        return matrix

    def num_links(self) -> int:
        """How many rows travel: pairs (sender, receiver) of different clients."""
        return int((self.sources != self.targets).sum())

    def out_degrees(self) -> np.ndarray:
        """[N] how many others each client sends to."""
        away = self.sources != self.targets
        return np.bincount(self.sources[away], minlength=self.num_clients)

    def is_symmetric(self) -> bool:
        """Whether W = Wᵀ."""
        kept = (self.weights > TOLERANCE) & (self.sources != self.targets)
        forth = self.sources[kept] * self.num_clients + self.targets[kept]
        back = self.targets[kept] * self.num_clients + self.sources[kept]
        # Both in the order of the entry (j, i): what W and Wᵀ have there.
        one, other = np.argsort(forth), np.argsort(back)
        if not np.array_equal(forth[one], back[other]):
            return False
        weights = self.weights[kept]
        return bool((np.abs(weights[one] - weights[other]) <= TOLERANCE).all())

    def without(self, pairs: Iterable[tuple[int, int]]) -> "Mixing":
        """W after links failed: each pair's weight goes to both diagonals, which keeps a symmetric W doubly stochastic.

        Raises ValueError for a W that is not symmetric: there it would change the sums.
        """
        gone = np.array(sorted({(min(pair), max(pair)) for pair in pairs}), dtype=np.int64).reshape(-1, 2)
        if not len(gone):
            return self
        if not self.is_symmetric():
            raise ValueError("links can only be left out of a symmetric W")
        low, high = np.minimum(self.sources, self.targets), np.maximum(self.sources, self.targets)
        away = np.isin(low * self.num_clients + high, gone @ [self.num_clients, 1])
        return self._replace(targets=np.where(away, self.sources, self.targets))


class Topology:
    """W_t of every round t: `matrices` in turn. Built by `make_topology`, which checks them."""

    def __init__(self, name: str, matrices: Sequence[Mixing], layout: Layout = "circle") -> None:
        self.name, self.matrices, self.layout = name, tuple(matrices), layout
        self.num_clients = matrices[0].num_clients

    def at(self, round_index: int) -> Mixing:
        """W of round 0, 1, …"""
        return self.matrices[round_index % len(self.matrices)]

    @property
    def period(self) -> int:
        return len(self.matrices)

    @cached_property
    def is_symmetric(self) -> bool:
        return all(matrix.is_symmetric() for matrix in self.matrices)

    @cached_property
    def spectrum(self) -> np.ndarray:
        """[N] eigenvalues of W (of the product of a whole period), by magnitude, the largest first."""
        if self.num_clients > LARGEST_SPECTRUM:
            raise InputError(f"data.num-clients = {self.num_clients}: a spectrum is for at most {LARGEST_SPECTRUM}")
        product = np.eye(self.num_clients)
        for matrix in self.matrices:
            product = product @ matrix.dense()
        values = np.linalg.eigvalsh(product) if self.period == 1 and self.is_symmetric else np.linalg.eigvals(product)
        return values[np.argsort(-np.abs(values), kind="stable")]

    @cached_property
    def second_eigenvalue(self) -> float:
        """|λ₂|, per round (for W_t that vary: of the period's product, its root); 0 for one client."""
        if self.num_clients == 1:
            return 0.0
        largest = float(abs(self.spectrum[1]))
        return 0.0 if largest < 1e-12 else float(largest ** (1 / self.period))

    @property
    def spectral_gap(self) -> float:
        """1 − |λ₂|."""
        return max(0.0, 1.0 - self.second_eigenvalue)

    def rounds_to(self, fraction: float = 0.01) -> float:
        """Mixing time: rounds until |λ₂|^t is that fraction (disagreement, with no gradients); inf if it never is."""
        value = self.second_eigenvalue
        if value < 1e-12:
            return float(self.period) if self.num_clients > 1 else 0.0
        return math.inf if value >= 1 - 1e-10 else float(math.ceil(math.log(fraction) / math.log(value)))

    @cached_property
    def components(self) -> list[list[int]]:
        """Clients that hear from one another, over a whole period: one list if the graph is connected."""
        part = np.arange(self.num_clients)  # [N] the lowest client that each is known to be joined with
        while True:
            before = part
            for matrix in self.matrices:
                ends = part[matrix.sources], part[matrix.targets]
                lower, part = np.minimum(*ends), part.copy()
                for end in ends:
                    np.minimum.at(part, end, lower)
                while not np.array_equal(part, part[part]):
                    part = part[part]
            if np.array_equal(part, before):
                order = np.argsort(part, kind="stable")
                return [one.tolist() for one in np.split(order, np.flatnonzero(np.diff(part[order])) + 1)]

    @cached_property
    def warnings(self) -> list[str]:
        """What a user should know: a graph that never reaches consensus, and what that means."""
        if len(self.components) > 1:
            parts = ", ".join(str(len(part)) for part in self.components[:5])
            return [
                f"topology {self.name!r} is disconnected ({len(self.components)} parts, of {parts} clients): each part "
                "converges to its own model, and the mean model is that of none"
            ]
        if 1 < self.num_clients <= LARGEST_SPECTRUM and self.second_eigenvalue >= 1 - 1e-10:
            return [f"topology {self.name!r} has |λ₂| = 1: the clients never come to agree (give W positive diagonals)"]
        return []


# --- from graphs ---------------------------------------------------------------------------------------------


def from_edges(num_clients: int, edges: Edges, weights: str = "metropolis") -> Mixing:
    """W of an undirected graph; what a client does not give away it keeps."""
    pairs = edges if isinstance(edges, np.ndarray) else np.array(sorted(edges), dtype=np.int64).reshape(-1, 2)
    a, b = pairs.T
    degrees = np.bincount(pairs.ravel(), minlength=num_clients)
    values = WEIGHTS[weights](degrees, a, b)
    own = 1.0 - np.bincount(a, values, num_clients) - np.bincount(b, values, num_clients)
    own[np.abs(own) < 1e-14] = 0.0
    everybody = np.arange(num_clients)
    return _sorted(num_clients, [a, b, everybody], [b, a, everybody], [values, values, own])


def from_hops(num_clients: int, hop_list: Sequence[int]) -> Mixing:
    """The circulant W in which i sends to i + hop (mod N), all weights equal."""
    everybody = np.arange(num_clients)
    each = np.full(num_clients, 1.0 / (len(hop_list) + 1))
    targets = [everybody, *((everybody + hop) % num_clients for hop in hop_list)]
    return _sorted(num_clients, [everybody] * len(targets), targets, [each] * len(targets))


def _sorted(num_clients: int, sources: list, targets: list, weights: list) -> Mixing:
    """By target, then source: the order in which a client adds up what it gets."""
    source, target, weight = (np.concatenate(part) for part in (sources, targets, weights))
    kept = weight > 0
    source, target, weight = source[kept], target[kept], weight[kept]
    order = np.lexsort((source, target))
    return Mixing(num_clients, source[order], target[order], weight[order])


# --- checks and files ------------------------------------------------------------------------------------


def check(matrix: np.ndarray, where: str) -> None:
    """InputError naming the row or column by which W [N, N] is no doubly stochastic matrix."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise InputError(f"{where}: is of shape {list(matrix.shape)}, must be square, one row per client")
    if not np.isfinite(matrix).all():
        raise InputError(f"{where}: row {int(np.argwhere(~np.isfinite(matrix))[0][0])} has NaN or infinite numbers")
    if (matrix < 0).any():
        j, i = np.argwhere(matrix < 0)[0]
        raise InputError(f"{where}: row {j}, column {i} is {matrix[j, i]:g}, must be >= 0")
    for axis, what, means in ((1, "row", "the mean would drift"), (0, "column", "consensus would not last")):
        sums = matrix.sum(axis)
        wrong = np.flatnonzero(np.abs(sums - 1) > TOLERANCE)
        if len(wrong):
            raise InputError(
                f"{where}: {what} {wrong[0]} sums to {sums[wrong[0]]:.9g}, must be 1 (W[j, i] is what j gives to i; "
                f"else {means})"
            )


def read_file(name: str, num_clients: int, weights: str) -> Mixing:
    """W of a file: a matrix (.npy, .csv) or undirected edges (.edges: `i j` per line, clients from 0)."""
    path = at_home(name)
    where = f"algorithm.topology = {name!r}"
    try:
        if path.suffix == ".npy":
            matrix = np.load(path, allow_pickle=False)
        elif path.suffix == ".csv":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it is empty, which is said below
                matrix = np.loadtxt(path, delimiter=",", ndmin=2, dtype=np.float64)
            if not matrix.size:
                raise InputError(f"{where}: is empty, must be {num_clients} × {num_clients} numbers")
        else:
            matrix = None
            edges = _read_edges(path, where, num_clients)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{where}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{where}: cannot be read as {path.suffix} ({' '.join(str(error).split())[:120]})") from None
    if matrix is None:
        return from_edges(num_clients, edges, weights)
    if not np.issubdtype(matrix.dtype, np.number) or np.iscomplexobj(matrix):
        raise InputError(f"{where}: holds {matrix.dtype}, must be real numbers")
    matrix = matrix.astype(np.float64)
    check(matrix, where)
    if len(matrix) != num_clients:
        raise InputError(f"{where}: is for {len(matrix)} clients, data.num-clients = {num_clients}")
    found = Mixing.of(matrix)
    return _sorted(num_clients, [found.sources], [found.targets], [found.weights])


def _read_edges(path: Path, where: str, num_clients: int) -> set[tuple[int, int]]:
    edges = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) != 2 or not all(word.isdigit() for word in words):
            raise InputError(f"{where}: line {number}, {line.strip()[:40]!r}: must be two clients, `i j`")
        a, b = sorted(map(int, words))
        if b >= num_clients:
            raise InputError(f"{where}: line {number} names client {b}, data.num-clients = {num_clients} (from 0)")
        if a == b:
            raise InputError(f"{where}: line {number} links client {a} with itself; every client keeps a share anyway")
        edges.add((a, b))
    return edges


def is_file(name: str) -> bool:
    return name.endswith(FILES)


def make_topology(
    name: str, num_clients: int, *, weights: str = "metropolis", options: GraphOptions | None = None
) -> Topology:
    """The topology called `name` (or of the file `name`) for N clients.

    Raises InputError for sizes that do not fit (with those that would), and for matrices that are not doubly
    stochastic (with the row).
    """
    options = options or GraphOptions()
    if is_file(name):
        return Topology(name, [read_file(name, num_clients, weights)])
    if name not in TOPOLOGIES:
        raise unknown("algorithm.topology", name, [*TOPOLOGIES, "FILE.npy, FILE.csv or FILE.edges"])
    rule = TOPOLOGIES[name]
    if rule.hops is not None:
        matrices = [from_hops(num_clients, hop_list) for hop_list in rule.hops(num_clients)]
    else:
        assert rule.edges is not None
        matrices = [from_edges(num_clients, rule.edges(num_clients, options), weights)]
    return Topology(name, matrices, rule.layout)
