"""Products of a minibatch's rows with all rows so far, a bᵀ for every client: by kernel, in parts, and in a round."""

from math import prod

import pytest
import torch
from test_fused import DEVICE, drawn, same
from test_stacked import DATA_KINDS, assert_close, run

from fedmom.engine.stacked import factors
from fedmom.engine.stacked.kernels import weights
from fedmom.engine.stacked.kernels.tiles import MULTIPROCESSORS, gram_launch
from laws import table
from pretend_cuda import pretend
from runs import F64, run_plan, simple_plan

F32, BF16 = torch.float32, torch.bfloat16


@table(
    "K, M, J, C, held, dtype",
    [
        (1, 1, 1, 1, 1, F64),
        (3, 5, 7, 263, 9, F64),  # parts of the sum, of which the last is shorter
        (2, 10, 20, 520, 30, F32),
        (2, 3, 70, 300, 71, F32),  # more rows than a tile
        (1, 17, 33, 40, 33, F64),  # of either kind
        (2, 4, 8, 300, 8, BF16),
    ],
)
def test_the_gram_kernel_is_its_operator(K, M, J, C, held, dtype):
    """To the same bits every time. Rows are the first of more; results are a part of a tensor, the rest of it stays."""
    a, b, out = drawn(K, M, C, dtype=dtype), drawn(K, held, C, dtype=dtype, seed=1), drawn(K, M + 2, J + 3, dtype=dtype)
    found, again, want = out.to(DEVICE, copy=True), out.to(DEVICE, copy=True), out.clone()
    torch.ops.fedmom.gram(a, b[:, :J], want[:, 1 : M + 1, 2 : J + 2])
    for given in (found, again):
        weights.gram(a.to(DEVICE), b.to(DEVICE)[:, :J], given[:, 1 : M + 1, 2 : J + 2])
    same([found], [want], dtype, 1000 if dtype == BF16 else 1)
    assert torch.equal(found, again)


def test_rows_that_are_not_dense_are_copied():
    a, b = drawn(2, 40, 3).transpose(1, 2), drawn(2, 5, 80)[..., ::2]
    found = torch.zeros(2, 3, 5, dtype=F64, device=DEVICE)
    weights.gram(a.to(DEVICE), b.to(DEVICE), found)
    same([found], [a @ b.transpose(1, 2)], F64)


@table("dtype, K, M, J, C", [
    (dtype, *sizes) for dtype in (F32, F64) for sizes in
    ((50, 10, 10, 9216), (50, 10, 50, 12544), (5, 10, 30, 9216), (1, 1, 1, 1), (1, 16, 500, 1024), (600, 3, 70, 1500))
])  # fmt: skip
def test_every_card_is_kept_busy_and_nothing_is_summed_twice(dtype, K, M, J, C):
    a, b = (torch.empty(K, rows, C, dtype=dtype, device="meta") for rows in (M, J))
    launch = gram_launch(a, b, "ieee" if dtype == F64 else "tf32")
    told, (clients, parts, tiles) = launch.constants, launch.grid
    part = told["STEPS"] * told["BK"]
    assert clients == K
    assert (parts - 1) * part < C <= parts * part
    assert tiles == -(-M // told["BM"]) * -(-J // told["BJ"])
    assert prod(launch.grid) >= 2 * MULTIPROCESSORS or told["STEPS"] <= 8  # or the parts are about as short as may be
    assert parts == 1 or prod(launch.grid) <= 4 * MULTIPROCESSORS + K * tiles  # which is what was timed


@table("rows, length, taken", [(10, 9216, True), (16, 1024, True), (17, 9216, False), (10, 512, False)])
def test_a_card_takes_the_kernel_for_few_and_long_rows(rows, length, taken):
    with pretend() as card:
        a = torch.ones(2, rows, length, device="cuda")
        out = torch.empty(2, rows, rows, device="cuda")
        factors.gram(a, a, out)
        assert bool((out == length).all())
    assert card.troubles() == {}
    assert (card.launches["fedmom::gram"], card.launches["bmm"]) == (taken, not taken)


@pytest.mark.skipif(DEVICE == "cuda", reason="where there is a card, the kernel is not interpreted")
def test_a_round_by_the_kernel_is_the_loops(monkeypatch):
    """Every product of a round, of h and of δ."""
    pytest.importorskip("triton")
    calls = []
    monkeypatch.setattr(factors, "gram", lambda *given: calls.append(weights.gram(*given)))
    plan = simple_plan(3, num_rounds=1, num_local_steps=3, weight_decay=1e-2)
    found = run(DATA_KINDS["mlp"](), plan, None)
    assert len(calls) == 2 * 3 * 3  # of both, in three layers and three steps
    assert_close(found, run_plan(DATA_KINDS["mlp"](), plan, path="loop"), 1e-11)
