"""A checkpoint gives back all that a run between two rounds is."""

import torch
from torch.utils._pytree import tree_map

from fedmom.method.state import ClientState
from fedmom.records.folder import RunFolder
from fedmom.records.identity import Identity
from fedmom.rounds.plan import RunState
from laws import table

STAMP = {"run_id": "2:a"}
WHO = Identity({1: "a", 2: "2:a"}, {}, {})


def tree(value, rows=()):
    """Names in an order that is not the alphabet's, which files keep theirs in."""
    return {name: torch.full((*rows, 2), value + place) for place, name in enumerate(("w", "a", "b"))}


def state(value, rows=()):
    return ClientState(tree(value, rows), tree(value + 0.5, rows), {"mean": tree(value)["w"], "count": torch.tensor(7)})


OWN = ClientState({}, tree(3.0, (4,)), {})
OUTER = {"m": {f"params/{name}": value for name, value in tree(5.0).items()}, "v": {"momentum/w": tree(6.0)["w"]}}


@table("own", [{}, {"own": OWN}, {"rows": state(4.0, (4,))}, {"outer": OUTER}])
def test_what_was_saved_is_loaded(tmp_path, own):
    """State, buffers, counts, the server's own momentum and the clients' own; as the zeros of a new run had them."""
    folder = RunFolder.create(tmp_path / "-".join(["run", *own]))
    try:
        done = RunState(3, state(1.0), None, steps=12, examples=240, bytes_sent=960)._replace(**own)
        folder.save(done, STAMP)
        blank = RunState(0, state(0.0), None)._replace(**tree_map(lambda v: v * 0, own))
        found, stamp = folder.load(WHO, blank, torch.device("cpu"), lambda number: blank.own)
    finally:
        folder.close()
    assert stamp == STAMP
    for name in RunState._fields:
        same(getattr(found, name), getattr(done, name))


def same(found, right):
    if isinstance(right, ClientState):
        for part, other in zip(found, right, strict=True):
            same(part, other)
    elif isinstance(right, dict):
        assert list(found) == list(right)
        for name, value in right.items():
            same(found[name], value)
    elif isinstance(right, torch.Tensor):
        assert torch.equal(found, right)
    else:
        assert found == right
