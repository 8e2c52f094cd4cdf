#!/usr/bin/env python3
"""What stacking transformers gains: three shapes of the small GPT, by the loop, torch.vmap, the stack and factors.

    python benchmarks/transformers.py [--rounds 4]

Client-steps/s on a CPU, the median over rounds after the first, without evaluation, each run in a process of its own:
16 clients, all in every round, 4 steps, B = 4 rows of 32 tokens. Beside them what one client-step needs.

MFLOP: multiplications and additions of both passes by torch's counter, attention's own products among them. MB: what
goes between memory and cores as the stack moves it, eight passes of 4 bytes over x, u and g of every trained weight,
two readings of every frozen one for all clients together, one writing and one reading of the activations that the
backward pass keeps. A device's two speeds divided by these bound what it can do.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

PATHS = ("loop", "vmap", "stack", "factors")
CLIENTS, STEPS, BATCH, LENGTH, WORDS = 16, 4, 4, 32, 64
SHAPES: dict[str, dict[str, Any]] = {
    "gpt, d = 64, all trained": {"model.hidden": 64, "model.layers": 2},
    "gpt, d = 256, LoRA rank 4": {"model.hidden": 256, "model.layers": 2, "model.lora-rank": 4},
    "gpt, d = 512, LoRA rank 4": {"model.hidden": 512, "model.layers": 2, "model.lora-rank": 4},
}
# An H100's sheet: float32 outside of its tensor cores, and its memory.
GPU_FLOPS, GPU_BYTES = 67e12, 3.35e12
CHILD = """
import json, sys
import fedmom
result = fedmom.run(json.loads(sys.argv[1]), callbacks=[fedmom.Callback()])
print(json.dumps([record["wall_seconds"] for record in result.rounds]))
"""


def keys(data: Path, shape: dict[str, Any], rounds: int) -> dict[str, Any]:
    return {
        "data.dataset": str(data),
        "data.task": "per-token",
        "data.partition": "iid",
        "data.num-clients": CLIENTS,
        "data.batch-size": BATCH,
        "model.name": "gpt",
        "algorithm.num-local-steps": STEPS,
        "run.num-rounds": rounds + 1,  # the last one is evaluated
        "run.eval-every": rounds + 1,
        **shape,
    }


def measured(changes: dict[str, Any]) -> float:
    """Client-steps per second."""
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(changes)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    seconds = json.loads(done.stdout.splitlines()[-1])
    return CLIENTS * STEPS / statistics.median([b - a for a, b in pairwise(seconds[:-1])])


def counted(changes: dict[str, Any]) -> tuple[float, float]:
    """(FLOPs, bytes) of one client-step, its share of what all clients need."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from fedmom.config.build import make_problem
    from fedmom.config.load import load
    from fedmom.config.resolve import resolve
    from fedmom.method.state import num_bytes
    from fedmom.tasks.supervised import Supervised, one_of_batch

    problem = make_problem(resolve(load(changes)).config, "cpu")
    assert isinstance(problem, Supervised)
    start = problem.start()
    batch = one_of_batch(next(iter(problem.round_batches(torch.tensor([0]), torch.tensor([0]), 1))), 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        problem.gradient_alone(start.params, start.buffers, batch)
    frozen = sum(p.numel() for p in problem.model.parameters() if not p.requires_grad) * 4
    moved = 8 * num_bytes(start.params) + 2 * frozen / CLIENTS + 2 * problem.activation_bytes(start)
    return float(flops.get_total_flops()), float(moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    import numpy as np

    print("| client-steps/s | " + " | ".join(PATHS) + " | MFLOP | MB | an H100's bound: by FLOPs | by bytes |")
    print("|" + "---|" * (len(PATHS) + 5))
    with tempfile.TemporaryDirectory() as folder:
        x = np.random.default_rng(0).integers(WORDS, size=(20 * CLIENTS, LENGTH))
        data = Path(folder) / "tokens.npz"
        np.savez(data, x_train=x, y_train=(x + 1) % WORDS, x_test=x[:8], y_test=(x[:8] + 1) % WORDS)
        for name, shape in SHAPES.items():
            own = keys(data, shape, rounds)
            rates = [
                measured({**own, "engine.path": path, "engine.chunk-size": 1 if path == "loop" else CLIENTS})
                for path in PATHS
            ]
            flops, moved = counted(own)
            bounds = f"{GPU_FLOPS / flops:,.0f} | {GPU_BYTES / moved:,.0f}"
            print(
                f"| {name} | "
                + " | ".join(f"{rate:,.1f}" for rate in rates)
                + f" | {flops / 1e6:,.0f} | {moved / 1e6:,.1f} | {bounds} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
