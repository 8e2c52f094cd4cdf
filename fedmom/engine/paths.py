"""The ways to run the clients of a chunk: one table, which the engine, its choice, the yardstick and the keys read."""

from typing import NamedTuple

AUTO = "auto"  # the fastest that is right, by timing: a value of engine.path that is no way itself


class Path(NamedTuple):
    """A way to run K clients through their local steps."""

    summary: str
    stacks: bool = True  # several clients at once; else one is resident, whatever chunk_size says
    folds: bool = False  # through a model whose layers know of clients
    factors: bool = False  # dense layers write no client's weights where that takes less work


FACTORS, STACK, VMAP, LOOP = "factors", "stack", "vmap", "loop"
PATHS = {
    FACTORS: Path("as stack, and dense layers write no client's weights where that takes less work", True, True, True),
    STACK: Path("clients stacked, through a model whose layers know of them", folds=True),
    VMAP: Path("clients stacked by torch.vmap: any model that it can take"),
    LOOP: Path("one client after another: any model", stacks=False),
}


def is_plain(path: str) -> bool:
    """Whether clients run one after another."""
    return path != AUTO and not PATHS[path].stacks


def is_settled(path: str, chunk_size: int) -> bool:
    """Whether nothing is left to choose."""
    return is_plain(path) or (path != AUTO and chunk_size > 0)
