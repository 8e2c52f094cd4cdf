"""A resolved configuration becomes a problem, a plan and an engine: what any backend does before its first round."""

from fedmom.config.build.machine import actors_device, pool_options, resolve_device, set_up_torch, share_of_gpus
from fedmom.config.build.plan import make_plan, topology_of
from fedmom.config.build.problem import check_own, make_problem, supervised

__all__ = [
    "actors_device",
    "check_own",
    "make_plan",
    "make_problem",
    "pool_options",
    "resolve_device",
    "set_up_torch",
    "share_of_gpus",
    "supervised",
    "topology_of",
]
