"""The reference of what goes down is its own memory."""

import torch

from fedmom.method.state import ClientState
from fedmom.method.states.rules import CodecRule
from fedmom.travel.reference import after_mean, clients_start, first_reference, next_reference
from laws import table

F64 = torch.float64


def test_an_error_that_is_fed_back_beside_a_reference_counts_twice():
    """u = (1, ½, ¼), top-1: the reference is there after three messages; with e beside it, it would be (1, 0, ¾)."""
    u, rules = torch.tensor([1.0, 0.5, 0.25], dtype=F64), {"u": CodecRule("topk", 1 / 3)}
    reference = first_reference(rules, ClientState({}, {"w": torch.zeros(3, dtype=F64)}, {}))
    seen = []
    for round_index in range(12):
        reference, _ = next_reference(rules, reference, ClientState({}, {"w": u}, {}), 0, round_index)
        seen.append(reference["momentum/w"].tolist())
    assert seen[:2] == [[1, 0, 0], [1, 0.5, 0]]
    assert seen[2] == seen[-1] == u.tolist()
    e = wrong = torch.zeros(3, dtype=F64)
    for _ in range(12):
        wanted = e + u - wrong
        sent = torch.where(wanted.abs() == wanted.abs().max(), wanted, 0)
        sent[sent.nonzero()[1:, 0]] = 0  # of two equal ones the first
        e, wrong = wanted - sent, wrong + sent
    assert wrong.tolist() == [1, 0, 0.75]


@table("name, number", [("bfloat16", 0), ("int8", 8), ("topk", 0.2), ("randomk", 0.2), ("lowrank", 1)])
def test_the_reference_goes_to_what_stands_still(name, number):
    x, rules = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=F64), {"x": CodecRule(name, number)}
    state = ClientState({"w": x}, {"w": x}, {"b": x})
    reference = first_reference(rules, ClientState({"w": torch.zeros_like(x)}, {"w": x}, {"b": x}))
    for round_index in range(60):
        reference, _ = next_reference(rules, reference, state, 0, round_index)
    torch.testing.assert_close(reference["params/w"], x, rtol=0, atol=1e-3)
    begun = clients_start(state, reference)
    assert begun.params["w"] is reference["params/w"]
    assert begun.momentum["w"] is begun.buffers["b"] is x
    moved = after_mean(state, ClientState({"w": begun.params["w"] + 1}, {"w": x + 2}, {"b": x}), reference)
    torch.testing.assert_close(moved.params["w"], x + 1, rtol=1e-12, atol=1e-12)
    assert torch.equal(moved.momentum["w"], x + 2)
