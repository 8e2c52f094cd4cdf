"""Where workers go, and which nodes may take part."""

import math

import pytest

from fedmom.actors.cluster import PoolOptions, check_fit, share_of_gpus
from fedmom.actors.nodes import Facts, Placement, RayNode, difference, disagreement, versions
from fedmom.errors import InputError
from laws import table


def node(name, cpus, gpus=0.0, cores=None):
    resources = {"CPU": float(cpus), **({"GPU": gpus} if gpus else {})}
    return RayNode(name, f"{name} (10.0.0.1)", resources, cores or cpus)


def placed(nodes, count, cpus=1.0, gpus=0.0, evenly=False):
    """{node: how many of `count` workers it gets}."""
    placement = Placement({"CPU": cpus, "GPU": gpus}, {one.id: one for one in nodes}, evenly=evenly)
    chosen = [one.id for one in placement.spread(count)]
    assert chosen == sorted(chosen, key=[one.id for one in nodes].index)  # those of a node side by side
    return {one.id: chosen.count(one.id) for one in nodes}


@table(
    "nodes, given, right",
    [
        ([node("a", 4), node("b", 4)], {"count": 4}, {"a": 2, "b": 2}),  # Ray would pack them on one
        ([node("a", 4), node("b", 4)], {"count": 3}, {"a": 2, "b": 1}),
        ([node("a", 2), node("b", 6)], {"count": 4}, {"a": 1, "b": 3}),
        ([node("a", 2), node("b", 6)], {"count": 4, "evenly": True}, {"a": 2, "b": 2}),
        ([node("a", 8, cores=2), node("b", 8, cores=6)], {"count": 4}, {"a": 1, "b": 3}),  # what it may use, not has
        ([node("a", 8, cores=1), node("b", 2)], {"count": 8}, {"a": 6, "b": 2}),  # asked for, so Ray's count holds
        ([node("a", 8), node("b", 8, gpus=2.0)], {"count": 4, "cpus": 0.0, "gpus": 0.5}, {"a": 0, "b": 4}),
        ([node("a", 1), node("b", 1)], {"count": 20, "cpus": 0.1}, {"a": 10, "b": 10}),
        ([node("a", 1), node("b", 3)], {"count": 8, "cpus": 0.0}, {"a": 2, "b": 6}),
    ],
)
def test_workers_are_spread_by_what_a_node_may_use(nodes, given, right):
    assert placed(nodes, **given) == right


def test_as_many_as_fit_are_those_that_have_cores():
    nodes = {one.id: one for one in (node("a", 64, cores=2), node("b", 4), node("c", 3, cores=1))}
    assert Placement({"CPU": 1.0, "GPU": 0.0}, nodes).fit() == 2 + 4 + 1
    assert Placement({"CPU": 2.0, "GPU": 0.0}, nodes).fit() == 1 + 2 + 1  # Ray would start one on c
    with pytest.raises(ValueError, match="no room for 72"):
        placed(list(nodes.values()), 72)


def test_what_others_of_the_cluster_have_is_the_last_resort():
    taken = node("a", 4)._replace(free={"CPU": 1.0})
    placement = Placement({"CPU": 1.0, "GPU": 0.0}, {one.id: one for one in (taken, node("b", 2))})
    chosen = [one.id for one in placement.spread(5)]
    assert (chosen.count("a"), chosen.count("b")) == (3, 2)
    assert [one.id for one in Placement({"CPU": 1.0, "GPU": 0.0}, placement.nodes).spread(3)] == ["a", "b", "b"]


def test_a_machine_without_cores_for_work_is_the_last_resort():
    bare = RayNode("head", "head", {}, 1)
    assert placed([bare, node("b", 2)], 3, cpus=0.0) == {"head": 0, "b": 3}
    assert placed([bare], 2, cpus=0.0) == {"head": 2}


def test_a_node_that_is_gone_leaves_its_workers_to_others():
    nodes = {one.id: one for one in (node("a", 4), node("b", 4))}
    placement = Placement({"CPU": 1.0, "GPU": 0.0}, nodes)
    placement.spread(4)
    del placement.nodes["b"]
    assert [placement.next().id for _ in range(2)] == ["a", "a"]
    placement.load["a"] = 4
    assert placement.next() is None


@table("gpus, workers, right", [((2, 2), 4, 1.0), ((2, 2), 8, 0.5), ((1, 3), 9, 0.3333), ((4,), 0, 1.0)])
def test_a_share_of_the_cluster_s_gpus(gpus, workers, right):
    """Not of this machine's, which may have none."""
    nodes = [node("head", 4), *(node(f"n{k}", 64, gpus=float(count)) for k, count in enumerate(gpus))]
    share = share_of_gpus(nodes, workers)
    assert share == right
    check_fit(nodes, PoolOptions(num_workers=workers, num_cpus=1, num_gpus=share))
    assert math.floor(1 / share + 1e-6) * sum(gpus) >= workers


def test_what_does_not_fit_on_any_node_is_refused():
    nodes = [node("a", 2), node("b", 4, gpus=1.0)]
    with pytest.raises(InputError, match=r"simulation.num-cpus = 5: Ray sees at most 4 CPUs on one machine"):
        check_fit(nodes, PoolOptions(num_cpus=5))
    with pytest.raises(InputError, match=r"engine.workers = 7: with num-cpus = 1 each, 6 fit"):
        check_fit(nodes, PoolOptions(num_workers=7, count_key="engine.workers"))


def test_a_node_that_differs_is_named_with_what_differs():
    there, own = node("b", 4), versions()
    assert disagreement(there, Facts(own, 4)) == ""
    without = {name: version for name, version in own.items() if name != "flwr"}
    assert disagreement(there, Facts(without, 4)) == ""  # it says itself what it lacks
    assert disagreement(there, Facts({**own, "torch": "1.0"}, 4)) == (
        f"b (10.0.0.1) has torch 1.0 (here: {own['torch']}): install the same versions on every node"
    )
    assert "\n" not in disagreement(there, ModuleNotFoundError("a\nModuleNotFoundError: No module named 'x'"))
    expected = {"data.dataset = 'mine.npz'": "1234"}
    assert difference("b", expected, expected) == difference("b", {}, {}) == ""
    for held in ({"data.dataset = 'mine.npz'": "abcd"}, {}):
        assert difference("b", held, expected).startswith("data.dataset = 'mine.npz': names other contents on b")
