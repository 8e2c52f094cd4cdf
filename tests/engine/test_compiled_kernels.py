"""The fused kernels, compiled ahead of time for a GPU that need not be there: what they take of its registers."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # a minute, on a machine that is not busy

# In a process of its own, where Triton compiles: in that of the tests it interprets.
COMPILE = """
import os, re, subprocess, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fedmom.engine.stacked.kernels import batch_norm, dropout, pool, weights
from fedmom.engine.stacked.kernels.batch_norm import tile
from fedmom.engine.stacked.kernels.tiles import gram_launch
import torch

POINTERS = ("x", "y", "d", "keys", "bias", "index", "before", "totals", "residual", "means", "squares", "weight",
            "old_mean", "old_var", "mean_found", "scale_found", "through", "scales", "firsts", "seconds", "w_found",
            "b_found", "g", "u", "lr", "rows", "a", "b", "parts")
TYPES = {"keys": "i64", "index": "u8", "lr": "fp64"}
SIXTEENS = ("C", "HW", "M", "N", "a_client", "a_row", "b_client", "b_row")  # divisible by it
tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")

def compiled(name, kernel, dtype, constants, ones=False, **options):
    signature, given, attributes = {}, {}, {}
    for at, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], given[(at,)] = "constexpr", constants[argument]
        elif argument in POINTERS:
            signature[argument] = "*" + TYPES.get(argument, dtype)
            attributes[(at,)] = [["tt.divisibility", 16]]
        elif ones and argument not in ("M", "layer", "N"):
            signature[argument], given[(at,)] = "constexpr", 1  # as Triton takes an integer that is one
        else:
            signature[argument] = "i32"
            if argument in SIXTEENS and argument not in kernel.do_not_specialize:
                attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, given, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        def ask(what):
            return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
        used, code = ask("--dump-resource-usage"), ask("--dump-sass")
    registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", used).groups()
    spills = len(re.findall(r"\\b(?:STL|LDL)\\b", code))
    wide = len(re.findall(r"LDG(?:STS)?\\.E(?:\\.\\w+)*\\.128", code))
    print(name, dtype, registers, stack, spills, made.metadata.shared, wide)

for dtype, torch_dtype, SUM in (
    ("fp32", torch.float32, tl.float32), ("bf16", torch.bfloat16, tl.float32), ("fp64", torch.float64, tl.float64)
):
    for channels, layouts in {1: [True], 16: [False], 64: [True]}.items() if dtype == "fp32" else [(16, [True])]:
        ones = channels == 1
        for last in layouts:
            BM, BC = tile(channels, last, torch_dtype, 2048)
            norm = dict(LAST=last, SUM=SUM, BM=BM, BC=BC)
            affine = dict(WEIGHT=True, BIAS=True)
            said = f"{channels}-{'last' if last else 'plain'}"
            compiled(f"norm_sums-{said}", batch_norm._norm_sums, dtype, norm, ones)
            for residual in (False, True):
                kind = "residual" if residual else "relu"
                compiled(
                    f"norm_apply-{kind}-{said}", batch_norm._norm_apply, dtype,
                    dict(norm, **affine, EPS=1e-5, MOMENTUM=0.1, OLD_MEAN=True, OLD_VAR=True, RESIDUAL=residual,
                         RELU=True, SP=1 if ones else 64), ones,
                )
                compiled(
                    f"norm_back_sums-{kind}-{said}", batch_norm._norm_back_sums, dtype,
                    dict(norm, **affine, RELU=True, RESIDUAL=residual), ones,
                )
                compiled(
                    f"norm_back-{kind}-{said}", batch_norm._norm_back, dtype,
                    dict(norm, **affine, RELU=not residual, SP=1 if ones else 64), ones,
                )
            BM, BC = tile(channels, last, torch_dtype, 1024)
            for side in (1, 2):
                pooling = dict(KH=side, KW=side, BIAS=True, LAST=last, SUM=SUM, BM=BM, BC=BC)
                compiled(f"relu_pool-{side}-{said}", pool._relu_pool, dtype, pooling, ones)
                compiled(f"relu_pool_back-{side}-{said}", pool._relu_pool_back, dtype, pooling, ones)
            compiled(
                f"dropout-{said}", dropout._drop, dtype,
                dict(C=channels, HW=196, THRESHOLD=1 << 30, SCALE=4 / 3, CHANNELS=False, LAST=last, SUM=SUM,
                     BLOCK=1024), ones,
            )
            compiled(
                f"dropout-turned-{said}", dropout._drop_and_turn, dtype,
                dict(C=channels, HW=196, THRESHOLD=1 << 30, SCALE=4 / 3, CHANNELS=False, LAST=last, SUM=SUM,
                     ROWS=32, COLUMNS=32), ones,
            )
    for nesterov in (False, True):
        compiled(
            f"first_step-{nesterov}", weights._first_step, dtype,
            dict(BETA=0.9, DECAY=1e-4, NESTEROV=nesterov, SUM=SUM, BLOCK=1024),
        )
    for rows in (10, 20, 50):
        for precision in {"fp32": ("tf32", "tf32x3"), "bf16": ("tf32",), "fp64": ("ieee",)}[dtype]:
            a, b = (torch.empty(50, each, 9216, dtype=torch_dtype, device="meta") for each in (10, rows))
            told = gram_launch(a, b, precision).options
            TYPES["parts"] = "fp64" if dtype == "fp64" else "fp32"
            compiled(
                f"gram-{precision}-{rows}", weights._gram, dtype,
                {n: v for n, v in told.items() if n.isupper() and n != "STEPS"},
                num_warps=told["num_warps"], num_stages=told["num_stages"],
            )
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """{(kernel, dtype): (registers, stack, spills, shared bytes, loads of 16 bytes)}."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\S+ (?:fp|bf)\d\d ", line)]
    print(done.stdout)
    return {(name, dtype): tuple(map(int, numbers)) for name, dtype, *numbers in rows}


def test_every_kernel_compiles_for_a_card_and_none_spills_in_float32(kernels):
    """And channels-last memory, and long rows, are read sixteen bytes at a time."""
    assert len(kernels) == (3 + 1 + 1) * (7 + 4 + 2) + 3 * 2 + 3 * (2 + 1 + 1)
    in_float32 = {name: found for (name, dtype), found in kernels.items() if dtype == "fp32"}
    assert not {name: found for name, found in in_float32.items() if found[1] or found[2]}
    last = {name: found for name, found in in_float32.items() if name.startswith("norm") and name.endswith("64-last")}
    assert len(last) == 7
    grams = {of: found for of, found in kernels.items() if of[0].startswith("gram")}
    assert not {of: found for of, found in grams.items() if found[1] or found[2]}
    assert not {name: found for name, found in {**last, **grams}.items() if not found[4]}
