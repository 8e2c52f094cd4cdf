#!/usr/bin/env python3
"""The paper's experiment: N = 2, 4, 8 clients, I = 1, 4, 8, 16 local steps, a constant and a decayed lr.

    python benchmarks/paper.py --out DIR --data DATA --budget SECONDS     # ResNet-56 on CIFAR-10, on a GPU
    python benchmarks/paper.py --out DIR --data DATA --budget 330 --speedup 4 # the most telling of it, in minutes
    python benchmarks/paper.py --out DIR --data DATA --rehearsal          # a small CNN, on a CPU, in some 40 minutes
    python benchmarks/paper.py --out DIR --data DATA --device cpu --quick # the script itself, in a minute
    python benchmarks/paper.py --out DIR --draw                           # table and pictures of what is there

Yu, Jin, Yang (ICML 2019), section 4: ResNet-56 on CIFAR-10, momentum 0.9, batch 64 a client, loss and accuracy over
joint epochs (passes of all clients together over the data), lr constant or divided by 10 at joint epochs 80 and 120 of
160. Here a run has E joint epochs, as many as the budget allows at the rate that this machine was measured at, and lr
is divided by 10 at 1/2 and 3/4 of them; tables and pictures say E. Clients hold iid parts of equal size.

* lr: the theory takes γ = √(N/T). At equal joint epochs T N is the same for all N, so γ grows as N. So one γ is chosen
  of at most three, for the fewest clients and I = 1, by the training loss after half a run of a seed of its own; all
  others take it times N over the fewest. `--scale none` gives all the same lr. Weight decay 1e-4 and lr are ours.
* A run with the decayed lr begins as the one with the constant lr does, so both are run once up to the first milestone.
* `--speedup I …` runs the decayed lr for the largest N alone, to show what I costs, and then the constant lr at these
  I alone, for all N, to show the speedup. E is what the budget allows for these runs.
* DIR/rows.jsonl has a line per finished run as soon as it is finished, and the protocol first. Killed at any moment,
  the same command goes on with what is missing. What the budget did not reach is missing, the least important first.

Needs torch, numpy and this checkout, Pillow where the images are atlases, and matplotlib for the pictures alone.
"""

import argparse
import gc
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from paper_data import append, first_images, read_images, rows_of  # noqa: E402
from paper_pictures import draw_all  # noqa: E402
from paper_runs import (  # noqa: E402
    BudgetError,
    Cell,
    Protocol,
    Watch,
    advance,
    begun,
    cells_of,
    measured_way,
    run_cell,
)

from fedmom.data.datasets import Dataset  # noqa: E402
from fedmom.errors import DivergedError, InputError  # noqa: E402
from fedmom.machine.precision import allow_tf32  # noqa: E402

TRIAL_SEED = 9999  # of the lr's trials alone
QUICK = {"images": 2048, "test_images": 500, "batch": 8, "clients": [2, 4], "intervals": [1, 4], "epochs": 1.0}


# --- before the cells: E and the lr ---------------------------------------------------------------------------


def name_of(data: Dataset) -> str:
    shape = tuple(data.input_shape)
    return {(3, 32, 32): "CIFAR-10", (1, 28, 28): "Fashion-MNIST"}.get(shape, f"images {list(shape)}")


def settled(data: Dataset, options: Any) -> Protocol:
    """The protocol of a new folder: E is what the budget allows for all seeds."""
    protocol = Protocol(
        *(options.model, name_of(data), len(data.x_train), len(data.x_test), options.batch, options.clients),
        *(
            options.intervals,
            options.lrs,
            options.scale,
            options.augment,
            options.matmul,
            options.path,
            options.convolution,
        ),
        *(1, 1, {}, options.speedup),
    )
    protocol = protocol._replace(ways={str(n): measured_way(protocol, data, n, options) for n in protocol.clients})
    if options.epochs:
        units = round(options.epochs * protocol.images / protocol.unit)
    else:
        fixed, none = (total_cost(protocol, 0, points, options) for points in (options.points, 0))
        units = int((0.85 * options.watch.left() - fixed) / (total_cost(protocol, 1, 0, options) - none))
        # Few evaluations fit evenly into some lengths: rather a little shorter.
        units = next(
            (u for u in range(units, 1, -1) if points_of(protocol, u, options.points) > 0.5 * options.points), 1
        )
    units = max(1, units)
    return protocol._replace(units=units, points=points_of(protocol, units, options.points))


def total_cost(protocol: Protocol, units: int, points: int, options: Any) -> float:
    """Seconds that all cells and the trials of lr take, in so many processes."""
    protocol = protocol._replace(units=units, points=points)
    trials = len(protocol.lrs) * (len(protocol.lrs) > 1) * protocol.cost(Cell(0, 1, min(protocol.clients)), ())
    cells = cells_of(protocol, options.seeds)
    return trials + sum(protocol.cost(cell, protocol.schedules(cell)) for cell in cells) / options.workers


def points_of(protocol: Protocol, units: int, most: int) -> int:
    """How many evaluations fit evenly into every run: the one with the fewest rounds decides. Half way there is one."""
    rounds = protocol._replace(units=units).rounds(Cell(0, max(protocol.intervals), max(protocol.clients)))
    return max(p for p in range(2, most + 1, 2) if rounds % p == 0)


def chosen_lr(protocol: Protocol, data: Dataset, options: Any) -> float:
    """Of the fewest clients: the one with the lowest training loss, of those tried."""
    if len(protocol.lrs) == 1:
        return protocol.lrs[0]
    found = {row["lr"]: row["train_loss"] for row in rows_of(options.out) if row["kind"] == "lr"}
    cell = Cell(TRIAL_SEED, 1, min(protocol.clients))
    for lr in protocol.lrs:
        if lr in found:
            continue
        problem, plan, engine, start = begun(protocol, data, cell, "constant", lr, options.device)
        try:
            course = advance(problem, plan, engine, start, plan.num_rounds // 2, options.watch)
            found[lr] = course.curve[-1][3]
        except DivergedError:
            found[lr] = None
        append(options.out, {"kind": "lr", "lr": lr, "train_loss": found[lr], "clients": cell.clients, "interval": 1})
    return min(protocol.lrs, key=lambda lr: math.inf if found[lr] is None else found[lr])


# --- all of them ----------------------------------------------------------------------------------------------


def run_all(protocol: Protocol, data: Dataset, lr: float, options: Any) -> None:
    """Every cell of this worker that is missing and that fits into what is left of the budget."""
    slow = 1.0  # than measured at first
    for place, cell in enumerate(cells_of(protocol, options.seeds)):
        if (place + place // options.workers) % options.workers != options.part:  # so that all get all N
            continue
        have = {tuple(r[name] for name in (*Cell._fields, "schedule")) for r in rows_of(options.out, "run")}
        schedules = [name for name in protocol.schedules(cell) if (*cell, name) not in have]
        if not schedules or (slow * protocol.cost(cell, schedules) > options.watch.left()):
            continue
        begin = time.monotonic()
        own = lr * (cell.clients / min(protocol.clients) if protocol.scale == "linear" else 1.0)
        for row in run_cell(protocol, data, cell, schedules, own, options):
            append(options.out, row)
            said = f"{100 * row['curve'][-1][5]:.2f} %" if "curve" in row else row["status"]
            print(*cell, row["schedule"], said, f"{row['took']:.1f} s", file=sys.stderr, flush=True)
        slow = (time.monotonic() - begin) / protocol.cost(cell, schedules)
        gc.collect()  # recordings hold a GPU's memory for as long as somebody knows of them


def run(options: Any) -> None:
    allow_tf32(options.matmul == "tf32")
    if options.device == "cpu":
        torch.set_num_threads(1)  # `--workers` use the other cores: threads wait for each other where cores are shared
    data = first_images(read_images(options.data), options.images, options.test_images)
    if (rows := rows_of(options.out, "protocol")) == []:
        row = {"kind": "protocol", "seeds": options.seeds, **settled(data, options)._asdict(), **options.where}
        append(options.out, row)
        rows = rows_of(options.out, "protocol")
    row = {"speedup": [], **rows[0]}  # of older folders there is none
    protocol = Protocol(**{name: row[name] for name in Protocol._fields})
    asked = {name: value for name in Protocol._fields if (value := getattr(options, name, None)) is not None}
    asked |= {"images": len(data.x_train), "test_images": len(data.x_test), "points": protocol.points}
    asked |= {"data": name_of(data)}
    if other := [f"{n} = {getattr(protocol, n)}" for n, v in asked.items() if getattr(protocol, n) != v]:
        raise InputError(f"--out {options.out}: was begun with {', '.join(other)}; say so, or take another folder")
    lr = chosen_lr(protocol, data, options)
    workers = []
    if options.part is None:
        options.part = 0
        for part in range(1, options.workers):
            command = [sys.executable, __file__, *sys.argv[1:], "--part", str(part)]
            command += ["--budget", str(options.watch.left())]
            workers.append(subprocess.Popen(command))
    try:
        run_all(protocol, data, lr, options)
    finally:
        for worker in workers:
            worker.wait()


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as .npz, a folder of atlases, or of Fashion-MNIST's files")
    parser.add_argument("--budget", type=float, help="seconds for this call (3,600; --rehearsal 2,100; --quick 100)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--rehearsal", action="store_true", help="small-cnn without augmentation, on a CPU")
    parser.add_argument("--quick", action="store_true", help="few images, clients and local steps")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--model", help="resnet56, or another of fedmom's, or small-cnn")
    parser.add_argument("--clients", type=int, nargs="+", help="N (2 4 8), each dividing the largest")
    parser.add_argument("--intervals", type=int, nargs="+", help="I (1 4 8 16)")
    parser.add_argument(
        "--speedup",
        type=int,
        nargs="+",
        default=[],
        metavar="I",
        help="lr constant for these I alone, for all N; lr decayed for the largest N alone (left out: both for all)",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, help="E, instead of what the budget allows")
    parser.add_argument("--lrs", type=float, nargs="+", help="for the fewest clients: at most three to choose from")
    parser.add_argument("--scale", default="linear", choices=["linear", "none"], help="of lr, in N")
    parser.add_argument("--augment", choices=["crop-flip", "none"])
    parser.add_argument("--images", type=int, help="of the training set (all)")
    parser.add_argument("--test-images", type=int, help="of the test set (all)")
    parser.add_argument("--batch", type=int, help="of a client (64)")
    parser.add_argument("--points", type=int, default=16, help="evaluations of a run, at most")
    parser.add_argument("--path", default="auto", help="of the engine; auto: by timing")
    parser.add_argument("--convolution", default="", help="how the folded paths convolve; left out: by layer")
    parser.add_argument("--matmul", default="float32", choices=["float32", "tf32"])
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--commit", help=argparse.SUPPRESS)  # where the checkout has no history
    return parser


def options_of(arguments: list[str] | None) -> Any:
    parser = parser_of()
    options = parser.parse_args(arguments)
    small = options.rehearsal or options.quick
    defaults: dict[str, Any] = {"images": 0, "test_images": 0, "batch": 64, "clients": [2, 4, 8], "budget": 3600.0}
    defaults |= {"intervals": [1, 4, 8, 16], "model": "resnet56", "augment": "crop-flip", "lrs": [0.05]}
    if small:
        defaults |= {"model": "small-cnn", "augment": "none", "lrs": [0.0025, 0.005, 0.01], "budget": 2100.0}
        defaults |= {"images": 32768, "test_images": 5000}  # of so many training images E is a whole number
    if options.quick:
        defaults |= {**QUICK, "budget": 100.0}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if small:
        options.device = "cpu" if options.rehearsal else options.device
    if options.points < 2:
        parser.error("--points: at least two")
    if len(options.lrs) > 3:
        parser.error("--lrs: at most three")
    if any(max(options.clients) % n for n in options.clients):
        parser.error(f"--clients: each must divide {max(options.clients)}")
    if not {*options.speedup} <= {*options.intervals}:
        parser.error(f"--speedup: of the I in {options.intervals}")
    if not options.draw and options.data is None:
        parser.error("--data is missing")
    return options


def commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    options.watch = Watch(options.budget, is_worker=options.part is not None)
    options.out.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    options.where = {"device": card, "torch": torch.__version__, "commit": options.commit or commit()}
    if not options.draw:
        try:
            run(options)
        except BudgetError:
            print("the budget is spent", file=sys.stderr)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
    if options.part in (None, 0):
        draw_all(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
