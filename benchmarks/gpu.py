#!/usr/bin/env python3
"""The engine on a GPU in some six minutes: first that it is right, then how fast it is, and where the time goes.

    python benchmarks/gpu.py --out DIR [--section NAME …] [--cifar DATA] [--budget SECONDS]

Needs torch, numpy and this checkout; neither flwr nor ray. Every section runs in processes of its own, which are ended
when its seconds (`--list` names both) or the budget are over: what fails or hangs costs its own rows alone, and the
exit status is 0. Every row is in DIR/rows.jsonl as soon as it is there, and DIR/gpu.md is the table of all rows so far.
benchmarks/README.md is the plan for fifteen minutes of a rented card, and says what a wrong row means.

* `compile`: runs every convolution, model and size once with Triton's kernels, in up to 16 processes, to compile them.
* `check`: every path, and every way to convolve, against the plain loop on the CPU in float64: x, u, buffers, the
  losses and the spreads of all rounds, in float64 (without Triton, whose float64 compiles for long), float32 and with
  TF32 products. Twice six rounds with two lr lists, so that recordings of both are replayed.
* `speed`: pfl's CIFAR-10 benchmark (1,000 clients of 50 images, cohort 50, batch 10, 5 steps, momentum 0.9), in
  client-steps/s: one resident model in plain PyTorch, all ways at K = 50, then the best two at other K.
* `resnet`: ResNet-56, 8 clients, batch 64, the same as `speed`.
* `profile`: the card's measured bandwidth and matrix products, and of one replayed round the kernels by time, and what
  the host launched and waited for.
* `pfl`: pfl-research's own simulation of its benchmark with 1 to 5 processes, where it is installed.
* `small`: the same benchmark with momentum 0, logistic regression, an mlp and ResNet-20, without every way to convolve.
* `fewer`: ResNet-56 with 4 and 2 clients, by the ways that were the fastest with 8.

`--device cpu --quick` tries the script itself on small sizes.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_sections import SECTIONS  # noqa: E402
from gpu_table import known, table  # noqa: E402
from paper_data import append  # noqa: E402

# --- their processes ------------------------------------------------------------------------------------------


def run_here(name: str, options: argparse.Namespace) -> None:
    """A section, or this process's part of it."""
    if options.device == "cpu" or options.parts > 1:
        torch.set_num_threads(1)
    card = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    where = {"device": card, "torch": torch.__version__, "commit": options.commit}
    for row in SECTIONS[name].rows(options):
        append(options.out, {"section": name, **where, **row})
        print(name, {k: v for k, v in row.items() if k != "kernels"}, file=sys.stderr, flush=True)


def run_apart(name: str, options: argparse.Namespace, seconds: float) -> str:
    """A section in processes of its own, none of which outlives its seconds -> "" or what went wrong."""
    processes = max(1, min(SECTIONS[name].processes, os.cpu_count() or 1))
    command = [sys.executable, __file__, *options.arguments, "--child", name, "--parts", str(processes)]
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as aside:
        if name == "compile":  # what many processes time at once must not be remembered; what Triton compiles must
            environment |= {"FEDMOM_CACHE": aside}
            environment.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
        left = ["--left", str(seconds), "--commit", options.commit]
        run: dict[str, Any] = {"env": environment, "start_new_session": True}
        group = [subprocess.Popen([*command, *left, "--part", str(p)], **run) for p in range(processes)]
        until = time.monotonic() + seconds + 2  # in which a measurement that is under way may end
        said = []
        for process in group:
            try:
                status = process.wait(max(0.0, until - time.monotonic()))
                said += [f"exit status {status}"] if status else []
            except subprocess.TimeoutExpired:
                said.append("cut")
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it began
                process.wait()
    return ", ".join(sorted(set(said)))


def run_all(options: argparse.Namespace) -> None:
    end = time.monotonic() + options.budget
    for name in options.section:
        begin = time.monotonic()
        seconds = min(SECTIONS[name].seconds, 30.0 if options.quick else 1e9, end - begin)
        if seconds <= 0:
            print(f"{name}: left out, the budget is spent", file=sys.stderr, flush=True)
            continue
        said = run_apart(name, options, seconds)
        (options.out / "gpu.md").write_text(table(known(options.out)), encoding="utf-8")
        print(f"{name}: {time.monotonic() - begin:.0f} s {said}", file=sys.stderr, flush=True)


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--section", nargs="+", metavar="NAME", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--list", action="store_true", help="name the sections and their seconds")
    parser.add_argument("--budget", type=float, default=360.0, help="seconds for all sections together")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as .npz or a folder; without it random images")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=1.0, help="for every measurement")
    parser.add_argument("--quick", action="store_true")
    for name, kind in (("child", str), ("part", int), ("parts", int), ("left", float), ("commit", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.out is None and not options.list:
        parser.error("--out DIR is missing")
    options.arguments = arguments
    if options.quick:
        options.seconds, options.budget = min(options.seconds, 0.05), min(options.budget, 150.0)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = options_of(sys.argv[1:] if arguments is None else arguments)
    if options.list:
        print("\n".join(f"{name} {section.seconds:.0f} s" for name, section in SECTIONS.items()))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        options.until, options.parent = time.monotonic() + options.left, os.getppid()
        run_here(options.child, options)
        return 0
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    options.commit = options.commit or git.stdout.strip() or "unknown"
    run_all(options)
    print(table(known(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
