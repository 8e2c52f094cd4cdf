"""A model that does something else with more examples is never folded; one that keeps them apart is."""

import math

import torch
from torch import nn

import fedmom
from fedmom.engine.calls import mixes_by
from laws import table
from runs import F64

SIZES = (1, 2, 3, 5, 8, 16)


class In(nn.Module):
    """Any function of a batch [B, 6]."""

    def __init__(self, function):
        super().__init__()
        self.function, self.layer, self.norm = function, nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.function(self, x)


def cached(self, x):
    """Positions are made once for each shape."""
    known = self.__dict__.setdefault("known", {})
    if x.shape not in known:
        known[x.shape] = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    return self.layer(x + known[x.shape])


APART = {
    "a layer": lambda self, x: self.layer(x),
    "batch normalisation": lambda self, x: self.norm(x),
    "tokens": lambda self, x: self.layer(x.reshape(len(x), 1, 6).expand(-1, 3, -1).reshape(-1, 6)).view(len(x), -1),
    "halves of the features": lambda self, x: torch.cat(self.layer(x).chunk(2, 1), 1),
    "a token for each example": lambda self, x: torch.cat([torch.zeros(len(x), 1, dtype=x.dtype), self.layer(x)], 1),
    "what is made once for each shape": cached,
}
OTHERWISE = {
    "pieces": lambda self, x: torch.cat([self.layer(piece) for piece in x.split(16)]),
    "ghost batches": lambda self, x: torch.cat([self.norm(one) for one in x.chunk(math.ceil(len(x) / 16))]),
    "a branch on how many": lambda self, x: self.layer(x) if len(x) <= 40 else self.layer(x) * 2,
    "a number that grows by leaps": lambda self, x: self.layer(x)[: len(x) // 16 * 16],
    "a factor": lambda self, x: self.layer(x) * (1.0 if len(x) <= 40 else 0.5),
    "one after the other": lambda self, x: torch.stack([self.layer(row) for row in x]),
    "all pairs": lambda self, x: x @ x.new_zeros(6, len(x) ** 2)[:, :6],
}


@table("name", APART)
def test_what_keeps_examples_apart_may_be_folded(name):
    assert mixes_by(In(APART[name]).double(), torch.zeros(8, 6, dtype=F64), SIZES) == ""


@table("name", OTHERWISE)
def test_what_goes_by_how_many_there_are_is_not_folded(name):
    why = mixes_by(In(OTHERWISE[name]).double(), torch.zeros(8, 6, dtype=F64), SIZES)
    assert why.startswith("its forward pass does something else with ")


def test_a_branch_on_a_value_is_named():
    model = In(lambda self, x: self.layer(x) if x.sum() > 0 else x).double()
    assert "asks for values" in mixes_by(model, torch.zeros(8, 6, dtype=F64), SIZES)


class Ghost(nn.Module):
    """Batch normalisation of 16 examples at a time, however many there are."""

    def __init__(self, size_in, classes):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(size_in), nn.Linear(size_in, classes)

    def forward(self, x):
        pieces = x.flatten(1).chunk(math.ceil(len(x) / 16))
        return self.out(torch.cat([self.norm(piece) for piece in pieces]))


def ghost(shape, classes):
    return Ghost(math.prod(shape), classes)


def test_ghost_batch_normalisation_is_the_loops_on_every_path():
    """Two clients' 16 examples are one batch of 32: right with two pieces, and wrong from three clients on."""
    sets = {"data.num-clients": 6, "data.batch-size": 8, "run.num-rounds": 2, "run.dtype": "float64"}
    sets |= {"model.name": "test_calls:ghost", "algorithm.num-local-steps": 2}
    ended = {path: fedmom.run(sets | {"engine.path": path}) for path in ("loop", "vmap", "auto")}
    assert ended["auto"].config.engine.path in ("loop", "vmap")
    for name, x in ended["loop"].state_dict.items():
        for path in ("vmap", "auto"):
            torch.testing.assert_close(ended[path].state_dict[name], x, rtol=1e-10, atol=1e-12)
