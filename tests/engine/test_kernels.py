"""Triton's convolutions: the operators and the interpreted kernels are torch's, on a card and compiled for one."""

import json
import os
import random
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import conv2d

from fedmom.engine.engine import Engine
from fedmom.engine.stacked.convolutions import CONVOLUTIONS
from fedmom.engine.stacked.kernels.operators import kernels_for
from fedmom.engine.stacked.kernels.tiles import MULTIPROCESSORS, activation_launch, sides_after, weight_launch
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning
from laws import table
from pretend_cuda import pretend
from runs import image_problem, simple_plan
from test_cuda_graphs import assert_same, on_cpu

F64 = torch.float64
KERNELS = pytest.importorskip("triton") and kernels_for(torch.empty(0))  # interpreted: there is no card
WHERE = {"operators": torch.ops.fedmom, "kernels": KERNELS}


class Shape(NamedTuple):
    K: int
    B: int
    channels: int
    out: int
    height: int
    width: int
    kernel: int
    geometry: tuple[int, int, int]  # stride, padding, dilation
    bias: bool


def drawn(number: int) -> Shape:
    """Small, odd, and never smaller than its kernel."""
    rng = random.Random(number)
    kernel, stride, padding, dilation = (rng.choice(them) for them in ((1, 2, 3), (1, 2), (0, 1, 2), (1, 2)))
    least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
    sides = (least + rng.randrange(6) for _ in range(2))
    channels, out = (rng.choice((1, 3, 5, 16, 17, 20, 36)) for _ in range(2))
    return Shape(rng.choice((1, 2, 3)), rng.choice((1, 2, 3)), channels, out, *sides, kernel,
                 (stride, padding, dilation), rng.random() < 0.5)  # fmt: skip


SHAPES = {
    "the smallest": Shape(1, 1, 1, 1, 1, 1, 1, (1, 0, 1), True),
    "a part that is shorter": Shape(2, 1, 16, 3, 13, 11, 3, (1, 1, 1), False),
    "parts and stride": Shape(1, 2, 3, 17, 17, 15, 3, (2, 1, 1), True),
    "more channels than a tile": Shape(1, 1, 36, 36, 3, 3, 2, (1, 0, 1), True),
    "a kernel of one and stride": Shape(2, 1, 16, 32, 5, 5, 1, (2, 0, 1), False),
    "dilation and stride": Shape(2, 1, 20, 16, 7, 6, 3, (2, 1, 2), True),
    "a kernel of five": Shape(1, 1, 3, 5, 6, 5, 5, (1, 2, 1), True),
    **{f"drawn {number}": drawn(number) for number in range(8)},
}


def operands(shape: Shape, dtype):
    """x, weight, bias or None, a gradient of the result: channels last."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=F64).to(dtype)

    x = normal(shape.K * shape.B, shape.channels, shape.height, shape.width)
    weight = normal(shape.K, shape.out, shape.channels, shape.kernel, shape.kernel)
    d = normal(shape.K * shape.B, shape.out, *sides_after(x, weight.shape[3:], shape.geometry))
    x, d = (t.contiguous(memory_format=torch.channels_last) for t in (x, d))
    return x, weight, normal(shape.K, shape.out) if shape.bias else None, d


def by_torch(x, weight, bias, d, geometry):
    """One ordinary convolution per client, and what autograd makes of it: y, the gradients of x and of the weights."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    biases = [None] * len(weight) if bias is None else bias
    rows = zip(x.chunk(len(weight)), weight, biases, strict=True)
    y = torch.cat([conv2d(own, w, b, *geometry) for own, w, b in rows])
    return y.detach(), *torch.autograd.grad(y, (x, weight), d)


FEW = ("the smallest", "a part that is shorter", "dilation and stride", "drawn 0")  # the interpreter is slow


@pytest.mark.slow
@table("name, dtype", [*((name, F64) for name in FEW), ("a kernel of one and stride", torch.float32)])
def test_operators_and_kernels_are_one_convolution_per_client(name, dtype):
    check_operators_and_kernels(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", sorted(SHAPES.keys() - FEW))
def test_operators_and_kernels_are_one_convolution_per_client_in_more_shapes(name, dtype):
    check_operators_and_kernels(name, dtype)


def check_operators_and_kernels(name, dtype):
    shape, parts = SHAPES[name], {}
    x, weight, bias, d = operands(shape, dtype)
    tolerance, wanted = 1e-12 if dtype == F64 else 1e-5, by_torch(x, weight, bias, d, shape.geometry)
    for where, ops in WHERE.items():
        parts[where] = ops.convolve_weights(x, d, shape.K, weight.shape[3:], shape.geometry)
        back = ops.convolve_back(d, weight.permute(0, 3, 4, 2, 1).contiguous(), x.shape[2:], shape.geometry)
        y = ops.convolve(x, weight.permute(0, 3, 4, 1, 2).contiguous(), bias, shape.geometry)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, back))
        for got, right in zip((y, back, parts[where].sum(0)), wanted, strict=True):
            assert got.shape == right.shape
            assert got.dtype == dtype
            torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))
    one, other = parts.values()  # the same positions are in a part wherever it is made
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(one.abs().max()))
    assert len(one) > 1 or "part" not in name


LAYERS = [(3, 16, 32, 3), (16, 16, 32, 3), (16, 32, 15, 1), (64, 64, 8, 3), (5, 130, 1, 1)]


@table("dtype, precision, K, B, channels, out, side, kernel", [
    (dtype, precision, K, B, channels, out, side, kernel)
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (F64, "ieee"))
    for K, B in ((1, 1), (2, 7), (8, 64), (50, 10), (300, 1))
    for channels, out, side, kernel in LAYERS
])  # fmt: skip
def test_every_card_is_kept_busy_and_nothing_is_summed_twice(dtype, precision, K, B, channels, out, side, kernel):
    x, d = (torch.empty(K * B, c, side, side, dtype=dtype, device="meta") for c in (channels, out))
    launch = weight_launch(x, d, (kernel, kernel), K, (1, kernel // 2, 1), precision)
    told, M = launch.constants, B * side * side
    assert told["PART"] % told["BK"] == 0
    assert (told["PARTS"] - 1) * told["PART"] < M <= told["PARTS"] * told["PART"]
    covered = (launch.grid[0] * told["BM"], launch.grid[1] * told["BN"], launch.grid[2])
    assert covered[0] >= out
    assert covered[1] >= channels * kernel**2
    assert covered[2] == K * told["PARTS"]
    # Two for each multiprocessor, one of the widest, or the parts are as short as may be.
    wanted = MULTIPROCESSORS * (1 if told["BM"] == 64 else 2)
    assert prod(launch.grid) >= wanted or told["PART"] < 8 * told["BK"]
    taps = torch.empty(K, kernel, kernel, out, channels, device="meta")
    told = activation_launch(x, taps, (side, side), (1, kernel // 2, 1), precision, back=False, bias=False)
    assert told.grid[0] * told.constants["BM"] >= M
    assert told.grid[1] * told.constants["BN"] >= out
    assert told.grid[2] == K


def test_gradients_are_those_of_differences():
    x, weight, bias, _ = operands(Shape(2, 1, 2, 3, 3, 4, 2, (2, 1, 1), True), F64)
    options = ((2, 2), (1, 1), (1, 1), False, [0, 0], 1)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda *given: CONVOLUTIONS["implicit"](*given, False, options), leaves, fast_mode=True
    )


# On a card


def rounds(model: str, convolution: str):
    """Two rounds of two clients on a pretended card -> (the last state on the CPU, the records), the card."""
    plan = simple_plan(2, num_rounds=2, num_local_steps=2)
    with pretend() as card:
        problem = image_problem(model, 2, device="cuda", batch_size=2)
        engine = Engine(problem, plan.method, path="stack", chunk_size=2, convolution=convolution)
        steps = list(run_rounds(problem, plan, engine, beginning(problem, plan)))
        done = on_cpu(steps[-1][0])
    assert card.troubles() == {}
    assert card.replays  # the operators are recorded, and replayed
    return (done, [record for _, record in steps]), card


@pytest.mark.parametrize("model", ["cnn", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_on_a_card_the_kernels_are_operators_and_their_numbers_the_loops(model):
    found, card = rounds(model, "implicit")
    assert_same(found, rounds(model, "loop")[0], 1e-12)
    launched = {name: card.launches[f"fedmom::{name}"] for name in ("convolve", "convolve_back", "convolve_weights")}
    layers = {"cnn": 2, "resnet20": 19}[model]
    # One launch a product, in a round's first step too; nobody asks for the images' gradient.
    assert launched["convolve_weights"] == launched["convolve"] >= 2 * layers
    assert launched["convolve_back"] == launched["convolve"] * (layers - 1) // layers


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_compiled_for_an_h100_nothing_spills_and_activations_come_16_bytes_at_a_time(tmp_path):
    program = Path(__file__).parents[1] / "helpers" / "ahead_of_time.py"
    command = [sys.executable, program, "--shapes", "first", "16 to 16", "16 to 32", "64 to 64"]
    paths = {"PYTHONPATH": str(program.parents[2]), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths})
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == 3 * 4 * 3
    for kernel in kernels:
        spilt = {name: kernel[name] for name in ("STL", "LDL")}
        assert spilt == {"STL": 0, "LDL": 0}, kernel
        # Four programs of 128 threads on a multiprocessor; of three products for one, two, which were the fastest.
        assert kernel["registers"] <= (255 if "x3" in kernel["kind"] else 128), kernel
        assert kernel["shared"] <= 227 << 10, kernel
        assert kernel["programs"] >= MULTIPROCESSORS * (2 if kernel["pass"] == "weights" else 1), kernel
        assert kernel["DMMA"] if "64" in kernel["kind"].split()[0] else kernel["HMMA"] + kernel["HGMMA"], kernel
        if kernel["shape"] != "first":
            narrow = {name: number for name, number in kernel["loads"].items() if not name.endswith(".128")}
            # Of the 16 × 16 weights of a step a thread has but two.
            assert not narrow or ("16" in kernel["shape"] and set(narrow) <= {"LDG.E.64", "LDGSTS.E.64"}), kernel
            assert sum(kernel["loads"].values()) > 2 * sum(narrow.values()), kernel
