#!/usr/bin/env python3
"""How the convolutions' tiles, warps and stages compare on a GPU, pass by pass: what tiles.py should choose.

    python benchmarks/gpu_tiles.py --out DIR [--budget SECONDS]

Every choice is compiled first, in as many processes as there are cores, then timed in one: ten launches recorded as a
CUDA graph, the median of its replays. DIR/tiles.jsonl has a row for each; the table names the three fastest beside what
tiles.py chooses. Results are compared with those of the launch that tiles.py chooses.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from paper_data import append  # noqa: E402

from fedmom.engine.stacked.kernels import convolution, tiles  # noqa: E402

SHAPES = {  # K, B, in, out, stride, padding, side: kernels of 3 × 3
    "cnn, first": (50, 10, 3, 32, 1, 0, 32),
    "cnn, second": (50, 10, 32, 64, 1, 0, 30),
    "16 to 16": (8, 64, 16, 16, 1, 1, 32),
    "16 to 32": (8, 64, 16, 32, 2, 1, 32),
    "32 to 32": (8, 64, 32, 32, 1, 1, 16),
    "64 to 64": (8, 64, 64, 64, 1, 1, 8),
}
DEVICE = "cuda"
PRECISIONS = ("tf32", "tf32x3")
Case = tuple[str, str, str, dict[str, int]]  # shape, pass, precision, what is other than tiles.py says


def cases() -> Iterator[Case]:
    for name, precision in product(SHAPES, PRECISIONS):
        _, _, size_in, size_out, *_ = SHAPES[name]
        for which in ("forward", "back", "weights"):
            if which == "back" and name == "cnn, first":
                continue
            yield name, which, precision, {}
            results = size_in if which == "back" else size_out
            if which == "weights":
                yield from ((name, which, precision, other) for other in weight_choices(size_in, results))
            else:
                yield from ((name, which, precision, other) for other in activation_choices(results))
        yield name, "weights", "ieee", {}
        yield name, "forward", "ieee", {}


def activation_choices(results: int) -> list[dict[str, int]]:
    """One stage: loads go through the first cache, where nine taps find most of their neighbours' numbers."""
    found = [{"BM": BM, "stages": 1, "warps": warps} for BM, warps in ((64, 4), (128, 4), (128, 8), (256, 8), (64, 2))]
    found += [{"BM": BM, "BK": 16, "stages": 1} for BM in (64, 128)]
    return [*found, {"BM": 64}, {"BM": 128, "BK": 32}, {"BM": 128, "BK": 32, "warps": 8}, {"BM": 256, "warps": 8}]


def weight_choices(channels: int, results: int) -> list[dict[str, int]]:
    found = [{"stages": 1, "BK": BK, "warps": warps} for BK, warps in ((32, 4), (32, 2), (64, 4), (16, 4))]
    found += [{"stages": 1, "PROGRAMS": 1056}, {"stages": 1, "BN": 128}, {"stages": 1, "BN": 32}, {"stages": 2}]
    return [*found, {"stages": 4}, {"PROGRAMS": 264}, {"PROGRAMS": 1056}, {"BM": 16}, {"BN": 32}]


def runner(case: Case) -> Any:
    """A function that launches this case once and gives its result."""
    name, which, precision, other = case
    K, B, size_in, size_out, stride, padding, side = SHAPES[name]
    geometry = (stride, padding, 1)
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(K * B, size_in, side, side, device=DEVICE, generator=generator)
    after = tiles.sides_after(x, (3, 3), geometry)
    d = torch.randn(K * B, size_out, *after, device=DEVICE, generator=generator)
    x, d = (t.contiguous(memory_format=torch.channels_last) for t in (x, d))
    if which == "weights":
        programs, tiles.PROGRAMS = tiles.PROGRAMS, other.get("PROGRAMS", tiles.PROGRAMS)
        plan = replaced(tiles.weight_launch(x, d, (3, 3), K, geometry, precision), other)
        tiles.PROGRAMS = programs
        tile = plan.constants
        up = [-(-size_out // tile["BM"]), -(-size_in * 9 // tile["BN"])]
        plan = plan._replace(grid=(*up, plan.grid[2]))
        result = torch.empty(tile["PARTS"], K, size_out, size_in, 3, 3, device=DEVICE)
        launch = convolution._weights[plan.grid]
        return lambda: (launch(x, d, result, B, **plan.options), result.sum(0))[1]
    source, sides, last = (d, (side, side), (size_in, size_out)) if which == "back" else (x, after, (size_out, size_in))
    taps = torch.randn(K, 3, 3, *last, device=DEVICE, generator=generator)
    plan = tiles.activation_launch(source, taps, sides, geometry, precision, back=which == "back", bias=False)
    plan = replaced(plan, other)
    plan = plan._replace(
        grid=(-(-B * sides[0] * sides[1] // plan.constants["BM"]), -(-last[0] // plan.constants["BN"]), K)
    )
    result = torch.empty(K * B, last[0], *sides, device=DEVICE).contiguous(memory_format=torch.channels_last)
    launch = convolution._convolve[plan.grid]
    return lambda: (launch(source, taps, taps, result, B, **plan.options), result)[1]


def replaced(plan: tiles.Launch, other: dict[str, int]) -> tiles.Launch:
    constants = plan.constants | {key: value for key, value in other.items() if key in plan.constants}
    if "PART" in constants and "BK" in other:  # whole steps
        constants["PART"] = max(1, plan.constants["PART"] // other["BK"]) * other["BK"]
        total = plan.constants["PART"] * plan.constants["PARTS"]
        constants["PARTS"] = -(-total // constants["PART"])
        plan = plan._replace(grid=(*plan.grid[:2], plan.grid[2] // plan.constants["PARTS"] * constants["PARTS"]))
    return plan._replace(
        constants=constants, warps=other.get("warps", plan.warps), stages=other.get("stages", plan.stages)
    )


def microseconds(once: Any) -> float:
    once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            once()
    found = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(100 * begin.elapsed_time(end))
    return statistics.median(found[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=90.0, help="seconds")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    end, every = time.monotonic() + options.budget, list(cases())
    processes = os.cpu_count() or 1
    if options.part is not None:
        for case in every[options.part :: processes]:
            try:
                runner(case)()
                torch.cuda.synchronize()
            except Exception as error:
                print(case, str(error)[:200], file=sys.stderr)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--out", str(options.out), "--part"]
    group = [subprocess.Popen([*command, str(part)]) for part in range(processes)]
    for process in group:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled after {options.budget - (end - time.monotonic()):.0f} s", file=sys.stderr)
    wanted: dict[tuple[str, str], Any] = {}
    for case in every:
        if time.monotonic() > end:
            break
        row: dict[str, Any] = dict(zip(("shape", "pass", "precision", "other"), case, strict=True))
        try:
            once = runner(case)
            found = once().double()
            right = wanted.setdefault(case[:2], found)
            row |= {"us": microseconds(once), "off": float((found - right).norm() / right.norm())}
        except Exception as error:
            row["failed"] = str(error)[:200]
        append(options.out, row, "tiles.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
