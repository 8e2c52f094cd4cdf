"""The nodes of a Ray cluster: which ones run work, and what a function gives on each of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class RayNode(NamedTuple):
    """One machine of a cluster."""

    id: str
    host: str
    address: str
    cpus: float  # as Ray counts them

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


def working_nodes(ray: Any) -> list[RayNode]:
    """The nodes that live and have CPUs for work, by address; a head that was started with none is left out."""
    found = [
        RayNode(node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"], node["Resources"]["CPU"])
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0.0) > 0
    ]
    return sorted(found, key=lambda node: (node.address, node.id))


def on_every_node(
    ray: Any, nodes: Sequence[RayNode], function: Callable[..., Any], *arguments: Any
) -> list[Any | Exception]:
    """What `function(*arguments)` gives on each, in a process there; or the exception: of it, or of a node that died.

    All run at once, also where others use all CPUs. The function is pickled by its name.
    """
    by_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = [task.options(scheduling_strategy=by_node(node.id, soft=False)).remote(*arguments) for node in nodes]
    answers = list[Any | Exception]()
    for ref in asked:
        try:
            answers.append(ray.get(ref))
        except Exception as error:
            answers.append(error)
    return answers
