"""What a node keeps between two messages of a run: arrays in Flower's Context.state, under names of fedmom's own."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, RecordDict

from fedmom.flower.wire import pack, unpack
from fedmom.method.state import Tree

_OURS = "fedmom/"  # how the names of these records begin


class ContextStore:
    """Trees in a Context.state; `fedmom.backends.at_nodes.node` says what they are."""

    def __init__(self, state: RecordDict) -> None:
        self.state = state

    def names(self) -> Iterable[str]:
        return [name.removeprefix(_OURS) for name in self.state if name.startswith(_OURS)]

    def __contains__(self, name: object) -> bool:
        return f"{_OURS}{name}" in self.state

    def read(self, name: str) -> Tree:
        """Tensors that share the memory of the record: for reading only."""
        record = self.state[_OURS + name]  # not of `array_records`, which is made of all records at every call
        assert isinstance(record, ArrayRecord)
        return unpack(record)

    def write(self, name: str, tree: Tree) -> None:
        self.state[_OURS + name] = pack(tree, bundled=True)

    def drop(self, name: str) -> None:
        del self.state[_OURS + name]
