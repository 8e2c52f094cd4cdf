"""The nodes of a Ray cluster: what each has and holds, and which of them gets the next worker.

Ray counts a machine's cores, whatever its own daemon may use of them, and packs one node before it turns to the next.
So each node is looked at before it gets work, and workers are placed here.
"""

import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmom.errors import InputError
from fedmom.machine.cores import usable_cores
from fedmom.user_code import app_root

# What draws, trains, averages and packs: another version may come to other numbers, without a word.
_PACKAGES = ("fedmom", "torch", "numpy", "networkx", "safetensors", "flwr", "ray")


class RayNode(NamedTuple):
    """One machine of the cluster."""

    id: str  # Ray's
    name: str  # its host's, with the address
    resources: Mapping[str, float]  # {"CPU": …, "GPU": …}: what Ray hands out there
    cores: int  # that Ray's processes may use there
    free: Mapping[str, float] | None = None  # what of the resources nobody had when this was told; None: all


class Facts(NamedTuple):
    """What a node says of itself."""

    versions: Mapping[str, str]  # {package: version}
    cores: int


@dataclass(frozen=True)
class Agreement:
    """What has to be the same on all nodes; messages go to workers on those that agree.

    held: gives {what a configuration names, as messages call it: a fingerprint of what is there}. It runs in every
    worker at its start, and is cloudpickled. InputError where something is missing.
    """

    held: Callable[[], Mapping[str, str]]
    expected: Callable[[], Mapping[str, str]]  # the same of this process


@dataclass
class Placement:
    """How many workers each node has, and where the next one goes."""

    needs: Mapping[str, float]  # {"CPU": cores, "GPU": GPUs} of each worker
    nodes: dict[str, RayNode] = field(default_factory=dict)
    load: Counter[str] = field(default_factory=Counter)  # workers by node
    evenly: bool = False  # whether all nodes get as many, whatever their cores

    def capacity(self, node: RayNode) -> float:
        """Workers that Ray would start there; infinite where nothing limits them."""
        return self._fit_into(node.resources)

    def _fit_into(self, resources: Mapping[str, float]) -> float:
        # Fractions such as 0.1 are not exact: a hair more than the quotient.
        each = [int(resources.get(kind, 0.0) / need + 1e-6) for kind, need in self.needs.items() if need]
        return min(each, default=math.inf)

    def _has_free(self, node: RayNode) -> bool:
        free = node.resources if node.free is None else node.free
        return self.load[node.id] < self._fit_into(free)

    def share(self, node: RayNode) -> int:
        """Workers for which it has cores: at least one, if Ray would start one."""
        cores = node.cores / self.needs["CPU"] if self.needs["CPU"] else math.inf
        most = min(self.capacity(node), cores + 1e-6)
        if math.isinf(most):
            return node.cores if node.resources.get("CPU") else 0
        return max(int(most), min(1, int(self.capacity(node))))

    def fit(self) -> int:
        """Workers for which all nodes together have cores."""
        return sum(map(self.share, self.nodes.values()))

    def next(self) -> RayNode | None:
        """The node that is least loaded with one more worker, the first of several; None where there is no room."""
        able = [node for node in self.nodes.values() if self.load[node.id] < self.capacity(node)]
        # Others of the cluster may have some of it: a worker that waits for them is the last resort. So is a machine
        # without cores for work.
        for better in (self.share, self._has_free):
            able = [node for node in able if better(node)] or able

        def burden(node: RayNode) -> float:
            return (self.load[node.id] + 1) / (1 if self.evenly else max(1, self.share(node)))

        return min(able, key=burden, default=None)

    def spread(self, count: int) -> list[RayNode]:
        """Nodes for `count` workers, those of one node side by side. Raises ValueError where there is no room."""
        chosen = []
        for _ in range(count):
            node = self.next()
            if node is None:
                raise ValueError(f"no room for {count} workers")
            self.load[node.id] += 1
            chosen.append(node)
        order = list(self.nodes)
        return sorted(chosen, key=lambda node: order.index(node.id))


def ray_nodes(ray: Any) -> list[RayNode]:
    """All that are alive, this process's own first; their cores as Ray counts them."""
    own = ray.get_runtime_context().get_node_id()
    free = ray._private.state.available_resources_per_node()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            name, address = node.get("NodeManagerHostname", ""), node.get("NodeManagerAddress", "")
            cores = max(1, int(node["Resources"].get("CPU", 1)))
            there = RayNode(node["NodeID"], f"{name} ({address})", node["Resources"], cores, free.get(node["NodeID"]))
            found.append(there)
    return sorted(found, key=lambda node: (node.id != own, node.name))


def neighbours(workers: Mapping[str, int], count: int) -> list[str]:
    """A node for each of `count` messages, in proportion to the nodes' workers, neighbours side by side."""
    bounds = np.cumsum(list(workers.values()))
    places = np.searchsorted(bounds / bounds[-1], (np.arange(count) + 0.5) / count)
    return [list(workers)[place] for place in places]


def working_nodes(ray: Any) -> list[RayNode]:
    """Those with CPUs for work; a head that was started with none is left out."""
    return [node for node in ray_nodes(ray) if node.resources.get("CPU", 0.0) > 0]


def start_on(ray: Any, node: RayNode, function: Callable[..., Any], *arguments: Any) -> Any:
    """A reference to what `function(*arguments)` gives in a process of the node, also where others use all CPUs.

    The function is pickled by its name.
    """
    there = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on(ray, node.id))(function)
    return there.remote(*arguments)


def look_at(ray: Any, node: RayNode) -> Any:
    """A reference to the Facts of a node, which are gathered there."""
    return start_on(ray, node, facts, sys.path, os.getcwd())


def answers_of(ray: Any, references: Sequence[Any]) -> list[Any | Exception]:
    """What each reference comes to: a value, or the exception of the function, or of a node that ended."""
    answers = list[Any | Exception]()
    for reference in references:
        try:
            answers.append(ray.get(reference))
        except Exception as error:
            answers.append(error)
    return answers


def on(ray: Any, node_id: str) -> Any:
    """Ray's scheduling strategy for that node alone."""
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)


def as_the_driver(paths: Sequence[str], folder: str) -> None:
    """Let this process find the user's own modules and files where the driver does: its sys.path, its folder."""
    sys.path[:0] = [path for path in paths if path not in sys.path]
    if os.path.isdir(folder):
        os.chdir(folder)


def facts(paths: Sequence[str], folder: str) -> Facts:
    """Of the node on which it runs; as the driver, whose sys.path and folder these are, would find it.

    Nothing here imports torch: a process for this one question takes a second, and would take four.
    """
    as_the_driver(paths, folder)
    return Facts(versions(), usable_cores())


@cache
def versions() -> dict[str, str]:
    """Of what has to be the same everywhere. A torch for CPUs may meet one for GPUs of the same version."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return {**found, "fedmom's code": _code()}


def _code() -> str:
    """A short hash of fedmom's own files: two checkouts may have one version."""
    total = sha256()
    package = Path(__file__).parents[1]
    apps = [app_root() / name for name in ("clients", "strategies")]
    for folder in (package, *apps):
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder).as_posix()
            if not name.startswith("_app/"):  # a wheel has the apps there, a checkout beside the package
                total.update(name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:8]


def disagreement(node: RayNode, answer: Facts | Exception) -> str:
    """Why no worker may start on a node, in one line; "" if one may."""
    if isinstance(answer, Exception):
        cause = [line for line in str(answer).splitlines() if "Error" in line] or [type(answer).__name__]
        return f"fedmom does not run on {node.name}: {cause[-1].strip()}; install the same fedmom on every node"
    both = [(name, found, own) for name, own in versions().items() if (found := answer.versions.get(name))]
    if differ := [f"{name} {found} (here: {own})" for name, found, own in both if found != own]:
        return f"{node.name} has {', '.join(differ)}: install the same versions on every node"
    return ""


def difference(name: str, held: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """What a configuration names and is another on the node of that name, in one line; "" if nothing is."""
    for what, fingerprint in expected.items():
        if held.get(what) != fingerprint:
            return f"{what}: names other contents on {name} than here; put the same on every node"
    return ""


def missing_on(name: str) -> str:
    """What is said behind an error that only the node of that name has."""
    return f" (on {name}: every node needs what this one has, under the same path)"


def surveyed(ray: Any, nodes: Iterable[RayNode]) -> list[RayNode]:
    """The nodes, with the cores that they say they have, without those that end meanwhile.

    Raises InputError naming the first that disagrees.
    """
    nodes = list(nodes)
    answers = answers_of(ray, [look_at(ray, node) for node in nodes])
    alive = {node.id for node in ray_nodes(ray)}  # Ray takes half a minute to notice that a machine is gone
    found = []
    for node, answer in zip(nodes, answers, strict=True):
        if isinstance(answer, Exception) and node.id not in alive:
            continue
        if why := disagreement(node, answer):
            raise InputError(why)
        assert isinstance(answer, Facts)
        found.append(node._replace(cores=answer.cores))
    return found
