"""Triton's convolutions compiled for an H100 on a machine without one, and what the compiler says of them.

A program of its own, for a process that interprets kernels cannot compile them: a JSON list, one entry a kernel."""

import argparse
import collections
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedmom.engine.stacked.kernels import convolution, tiles

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64"}
# Of ResNet-56 on CIFAR-10 with K = 8 clients at B = 64: (in, out, kernel, stride, side).
SHAPES = {
    "first": (3, 16, 3, 1, 32),
    "16 to 16": (16, 16, 3, 1, 32),
    "16 to 32": (16, 32, 3, 2, 32),
    "16 to 32, 1 x 1": (16, 32, 1, 2, 32),
    "32 to 32": (32, 32, 3, 1, 16),
    "32 to 64": (32, 64, 3, 2, 16),
    "64 to 64": (64, 64, 3, 1, 8),
}
K, B = 8, 64
PASSES = ("forward", "back", "weights")


def planned(shape: str, which: str, dtype: torch.dtype, precision: str) -> tuple[Any, tiles.Launch]:
    """The kernel and its launch."""
    size_in, out, kernel, stride, side = SHAPES[shape]
    geometry = (stride, kernel // 2, 1)
    x = torch.empty(K * B, size_in, side, side, dtype=dtype, device="meta")
    after = tiles.sides_after(x, (kernel, kernel), geometry)
    d = torch.empty(K * B, out, *after, dtype=dtype, device="meta")
    if which == "weights":
        return convolution._weights, tiles.weight_launch(x, d, (kernel, kernel), K, geometry, precision)
    source, sides, last = (d, (side, side), (size_in, out)) if which == "back" else (x, after, (out, size_in))
    taps = torch.empty(K, kernel, kernel, *last, device="meta")
    options = {"back": which == "back", "bias": False}
    return convolution._convolve, tiles.activation_launch(source, taps, sides, geometry, precision, **options)


def compiled(kernel: Any, launch: tiles.Launch, dtype: torch.dtype) -> dict[str, Any]:
    """Registers, bytes spilt and shared, and how often each instruction of interest stands in the machine code."""
    tensors = {name for name in kernel.arg_names if name not in launch.constants and name != "B"}
    types = {
        name: TYPES[dtype] if name in tensors else "i32" if name == "B" else "constexpr" for name in kernel.arg_names
    }
    constants = {(kernel.arg_names.index(name),): value for name, value in launch.constants.items()}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in tensors}
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(ASTSource(kernel, types, constants, aligned), target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", how, file.name], capture_output=True, text=True, check=True).stdout
            for how in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    instructions = collections.Counter(
        re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code, re.MULTILINE)
    )
    loads = {name: number for name, number in instructions.items() if name.startswith(("LDG.", "LDGSTS."))}
    families = collections.Counter[str]()
    for name, number in instructions.items():
        families[name.partition(".")[0]] += number
    return {
        "programs": launch.grid[0] * launch.grid[1] * launch.grid[2],
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": made.metadata.shared,
        "loads": loads,
        **{name: families[name] for name in ("STL", "LDL", "IMAD", "ISETP", "FFMA", "HMMA", "HGMMA", "DMMA")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--kinds", nargs="*", default=["float32 tf32x3", "float32 tf32", "float64 ieee"])
    given = parser.parse_args()
    found = []
    for kind in given.kinds:
        dtype, precision = getattr(torch, kind.split()[0]), kind.split()[1]
        for shape in given.shapes:
            for which in PASSES:
                kernel, launch = planned(shape, which, dtype, precision)
                found.append({"kind": kind, "shape": shape, "pass": which, **compiled(kernel, launch, dtype)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
