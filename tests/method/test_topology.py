"""Topologies: doubly stochastic at every size or refused with sizes that fit; known |λ₂|; files and their faults."""

import math

import numpy as np
import pytest

from fedmom.errors import InputError
from fedmom.method.decentralized.graphs import TOPOLOGIES, GraphOptions, torus_shape
from fedmom.method.decentralized.topology import Mixing, Topology, from_edges, make_topology
from laws import table

SIZES = [1, 2, 3, 4, 9, 16]
# (topology, N) that cannot be built; everything else must be.
REFUSED = {("torus", 2), ("torus", 3), ("hypercube", 3), ("hypercube", 9)} | {("random-regular", n) for n in (2, 3, 4)}


@table("name", TOPOLOGIES)
def test_every_topology_is_right_at_every_size_or_names_the_sizes_that_fit(name):
    for num_clients in SIZES:
        if (name, num_clients) not in REFUSED:
            is_right(make_topology(name, num_clients), num_clients)
            continue
        with pytest.raises(InputError, match=rf"{name}.*data.num-clients = {num_clients}; near: \d") as error:
            make_topology(name, num_clients)
        for size in str(error.value).partition("near: ")[2].split(", "):
            make_topology(name, int(size))  # what it advises can be built


def is_right(topology, num_clients):
    """Every W_t is doubly stochastic, all clients hear from one another, and the counts are those of W."""
    assert topology.num_clients == num_clients
    for matrix in topology.matrices:
        dense = matrix.dense()
        assert dense.min() >= 0
        np.testing.assert_allclose(dense.sum(0), 1, atol=1e-12)
        np.testing.assert_allclose(dense.sum(1), 1, atol=1e-12)
        assert matrix.num_links() == matrix.out_degrees().sum() == np.count_nonzero(dense - np.diag(np.diag(dense)))
        assert matrix.is_symmetric() == np.allclose(dense, dense.T)
    assert len(topology.components) == 1
    assert topology.second_eigenvalue < 1
    assert topology.warnings == []


def circulant(hops, n):
    """|λ₂| of the W that sends to each of these hops with the same weight: the largest mean of roots of unity."""
    return max(abs(np.mean(np.exp(2j * np.pi * k * np.array(hops) / n))) for k in range(1, n))


def one_peer(n):
    """Of a round: its W_t are circulants, so eigenvalues of a period multiply, and the root is taken."""
    hops = [2**t for t in range(math.ceil(math.log2(n)))]
    product = max(abs(np.prod([(1 + np.exp(2j * np.pi * k * hop / n)) / 2 for hop in hops])) for k in range(1, n))
    return product ** (1 / len(hops))


@table(
    "name, sizes, value",
    [
        ("ring", (3, 4, 8, 32), lambda n: 1 / 3 + 2 / 3 * math.cos(2 * math.pi / n)),
        ("ring", (2,), lambda n: 0),
        ("torus", (16,), lambda n: 0.6),
        ("exponential", (2, 4, 6, 10, 32), lambda n: 1 - 2 / (1 + math.ceil(math.log2(n)))),
        ("exponential", (9, 11), lambda n: circulant([0, 1, 2, 4, 8], n)),
        ("star", (3, 4, 9, 16), lambda n: 1 - 1 / n),
        ("star", (2,), lambda n: 0),
        ("complete", SIZES, lambda n: 0),
        ("one-peer-exponential", (2, 4, 32), lambda n: 0),
        ("one-peer-exponential", (3, 9, 24), lambda n: one_peer(n)),
    ],
)
def test_second_eigenvalues_that_are_known(name, sizes, value):
    for n in sizes:
        assert make_topology(name, n).second_eigenvalue == pytest.approx(value(n), abs=1e-9), n


def test_a_sweep_of_the_one_peer_graph_averages_exactly():
    """Round t's hop is 2^t in turn, so that a period's product is 11ᵀ/N where N = 2^k, and nowhere else."""
    for num_clients in (1, 2, 3, 4, 6, 9, 16):
        topology = make_topology("one-peer-exponential", num_clients)
        product, here = np.eye(num_clients), np.arange(num_clients)
        for t in range(topology.period):
            product = product @ topology.at(t).dense()
            assert (topology.at(t + topology.period).dense()[here, (here + 2**t) % num_clients] >= 0.5).all()
        exact = num_clients & (num_clients - 1) == 0
        assert np.allclose(product, 1 / num_clients, rtol=0, atol=1e-15) == exact, num_clients


def test_symmetry_and_parts_are_those_of_the_dense_matrix():
    import networkx

    rng = np.random.default_rng(0)
    for trial in range(40):
        n = int(rng.integers(1, 9))
        dense = np.where(rng.random((n, n)) < 0.25, rng.random((n, n)), 0)
        dense = dense + dense.T if trial % 2 else dense
        i, j = rng.integers(n, size=2)
        dense[i, j] += [0, 1e-9, 1e-6, 0.1][trial // 2 % 4]
        matrix = Mixing.of(dense)
        assert matrix.is_symmetric() == bool((np.abs(dense - dense.T) <= 1e-8).all())
        parts = networkx.connected_components(networkx.from_numpy_array(dense + dense.T))
        assert Topology("any", [matrix]).components == sorted(map(sorted, parts))


def test_the_directed_ring_sends_to_the_next():
    dense = make_topology("directed-ring", 4).matrices[0].dense()
    for j in range(4):
        assert dense[j, j] == dense[j, (j + 1) % 4] == 0.5


def test_a_torus_is_as_square_as_can_be():
    assert [torus_shape(n) for n in (4, 6, 7, 12, 16)] == [(2, 2), (2, 3), None, (3, 4), (4, 4)]
    degrees = make_topology("torus", 12).matrices[0].out_degrees()
    assert degrees.tolist() == [4] * 12


def test_random_graphs_go_by_the_seed():
    for name in ("random-regular", "erdos-renyi"):
        first, again, other = (
            make_topology(name, 20, options=GraphOptions(seed=s)).matrices[0].dense() for s in (1, 1, 2)
        )
        assert (first == again).all()
        assert not np.array_equal(first, other)
    assert (
        make_topology("random-regular", 20, options=GraphOptions(degree=3)).matrices[0].out_degrees().tolist()
        == [3] * 20
    )


def test_random_graphs_that_are_never_connected_are_refused():
    with pytest.raises(InputError, match=r"topology-p = 0.001: none of 200"):
        make_topology("erdos-renyi", 20, options=GraphOptions(probability=0.001))


def test_uniform_weights_need_a_regular_graph():
    ring, star = make_topology("ring", 5, weights="uniform"), "algorithm.mixing-weights = 'uniform'"
    np.testing.assert_allclose(ring.matrices[0].dense(), make_topology("ring", 5).matrices[0].dense())
    with pytest.raises(InputError, match=star):
        make_topology("star", 5, weights="uniform")


def test_the_mixing_time_is_the_first_round_with_one_hundredth():
    for name in ("ring", "torus", "star"):
        topology = make_topology(name, 9)
        rounds = topology.rounds_to(0.01)
        assert topology.second_eigenvalue**rounds <= 0.01 < topology.second_eigenvalue ** (rounds - 1)


# --- links that fail -------------------------------------------------------------------------------------


@table("name", ["star", "erdos-renyi"])
def test_without_links_a_symmetric_matrix_stays_doubly_stochastic(name):
    matrix = make_topology(name, 9).matrices[0]
    pairs = [(j, i) for j, i in zip(matrix.sources.tolist(), matrix.targets.tolist(), strict=True) if j < i][:3]
    whole, fewer = matrix.dense(), matrix.without(pairs).dense()
    np.testing.assert_allclose(fewer.sum(0), 1, atol=1e-12)
    np.testing.assert_allclose(fewer, fewer.T, atol=1e-12)
    for j, i in pairs:
        assert whole[j, i] > 0
        assert fewer[j, i] == fewer[i, j] == 0
    touched = {client for pair in pairs for client in pair}
    for i in set(range(9)) - touched:
        np.testing.assert_array_equal(fewer[i], whole[i])


def test_without_links_a_directed_matrix_is_refused():
    matrix = make_topology("directed-ring", 4).matrices[0]
    assert matrix.without([]) is matrix
    with pytest.raises(ValueError, match="symmetric"):
        matrix.without([(0, 1)])


# --- files -----------------------------------------------------------------------------------------------


def refused(path, num_clients, *words):
    with pytest.raises(InputError) as error:
        make_topology(str(path), num_clients)
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message
    for word in words:
        assert word in message


def test_a_matrix_comes_back_from_a_file(tmp_path):
    dense = make_topology("exponential", 6).matrices[0].dense()
    np.save(tmp_path / "w.npy", dense)
    np.savetxt(tmp_path / "w.csv", dense, delimiter=",")
    for name in ("w.npy", "w.csv"):
        np.testing.assert_allclose(make_topology(str(tmp_path / name), 6).matrices[0].dense(), dense, atol=1e-15)


def test_edges_come_from_a_file(tmp_path):
    (tmp_path / "g.edges").write_text("# a path\n0 1\n2 1  # backwards\n\n2,3\n")
    dense = make_topology(str(tmp_path / "g.edges"), 4).matrices[0].dense()
    np.testing.assert_array_equal(dense, make_topology("path", 4).matrices[0].dense())


@table(
    "matrix, words",
    [
        (np.full((2, 3), 0.5), ["shape [2, 3]", "square"]),
        (np.zeros((0, 0)), ["square"]),
        (np.array([[1.2, -0.2], [-0.2, 1.2]]), ["row 0, column 1 is -0.2", ">= 0"]),
        (np.array([[0.5, 0.4], [0.5, 0.6]]), ["row 0 sums to 0.9", "mean would drift"]),
        (np.array([[0.5, 0.5], [0.4, 0.6]]), ["column 0 sums to 0.9", "consensus would not last"]),
        (np.array([[np.nan, 1], [1, 0]]), ["row 0", "NaN"]),
        (np.array([["a", "b"]] * 2), ["real numbers"]),
        (np.eye(2) * 1j, ["real numbers"]),
    ],
)
def test_matrices_that_are_refused(tmp_path, matrix, words):
    np.save(tmp_path / "w.npy", matrix)
    refused(tmp_path / "w.npy", 2, *words)


def test_other_files_that_are_refused(tmp_path):
    np.save(tmp_path / "w.npy", np.eye(3))
    refused(tmp_path / "w.npy", 4, "is for 3 clients", "data.num-clients = 4")
    refused(tmp_path / "no.npy", 4, "no such file")
    (tmp_path / "w.csv").write_text("1,2\n3")
    refused(tmp_path / "w.csv", 2, "cannot be read as .csv")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    refused(tmp_path / "broken.npy", 2, "cannot be read as .npy")
    for line, words in {
        "0 x": ["line 1, '0 x'"],
        "0 1 2": ["must be two clients"],
        "0 5": ["names client 5", "data.num-clients = 4"],
        "1 1": ["links client 1 with itself"],
    }.items():
        (tmp_path / "g.edges").write_text(line + "\n")
        refused(tmp_path / "g.edges", 4, *words)


def test_a_disconnected_or_periodic_graph_is_a_warning_with_its_consequence(tmp_path):
    (tmp_path / "g.edges").write_text("0 1\n2 3\n")
    (warning,) = make_topology(str(tmp_path / "g.edges"), 4).warnings
    assert "disconnected (2 parts, of 2, 2 clients)" in warning
    assert "own model" in warning
    np.save(tmp_path / "swap.npy", np.array([[0.0, 1.0], [1.0, 0.0]]))
    (warning,) = make_topology(str(tmp_path / "swap.npy"), 2).warnings
    assert "|λ₂| = 1" in warning
    assert make_topology(str(tmp_path / "swap.npy"), 2).rounds_to() == math.inf


def test_an_unknown_name_is_answered_with_the_right_ones():
    with pytest.raises(InputError, match="did you mean ring"):
        make_topology("rin", 4)


def test_metropolis_weights_on_a_graph_by_hand():
    """A star of 3: hub degree 2, so every link weighs 1/3, leaves keep 2/3."""
    np.testing.assert_allclose(
        from_edges(3, [(0, 1), (0, 2)]).dense(), [[1 / 3, 1 / 3, 1 / 3], [1 / 3, 2 / 3, 0], [1 / 3, 0, 2 / 3]]
    )


def test_an_empty_file_is_one_line_without_numpys_warning(tmp_path, recwarn):
    (tmp_path / "w.csv").write_text("")
    with pytest.raises(InputError, match="is empty, must be 3 × 3 numbers"):
        make_topology(str(tmp_path / "w.csv"), 3)
    assert not recwarn.list
