#!/usr/bin/env python3
"""The engine on a GPU, in one script: first that it is right, then how fast it is, then how near to the card's limits.

    python benchmarks/gpu.py --out "$OUT" [--cifar FILE.npz] [--seconds 5] [--only check speed resnet]

Needs torch, numpy and this checkout; neither flwr nor ray. Writes OUT/gpu.json and gpu.md after every step, so that a
run that is cut off leaves what it had.

* `check`: every path and every way to convolve against the plain loop on the CPU, all models: in float64 the largest
  difference of x, u and buffers after four rounds; in float32, with TF32 products and in bfloat16 the distance from
  that float64 run, relative to how far the model went, beside the plain loop's own on the same device.
* `speed`: pfl's CIFAR-10 benchmark (1,000 clients of 50 images, cohort 50, batch 10, 5 steps, momentum 0.9):
  client-steps/s by path, way to convolve and chunk size, and of one resident model in plain PyTorch; the card's
  measured bandwidth and matrix product rate.
* `resnet`: ResNet-56, 8 clients, batch 64, the same.

`--device cpu --quick` tries the script itself on small sizes.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "peers_app")]

from fedmom.bench import peaks  # noqa: E402
from fedmom.convolutions import CONVOLUTIONS  # noqa: E402
from fedmom.datasets import Dataset  # noqa: E402
from fedmom.engine import Engine  # noqa: E402
from fedmom.models import build_model  # noqa: E402
from fedmom.objective import Classification  # noqa: E402
from fedmom.partition import make_partition  # noqa: E402
from fedmom.rounds import Method  # noqa: E402
from fedmom.schedules import LearningRate  # noqa: E402
from fedmom.state import to_device  # noqa: E402
from fedmom.train import Plan, beginning, round_job, run_rounds  # noqa: E402

MODELS = {"logistic": {}, "mlp": {"hidden": 64}, "cnn": {}, "resnet20": {}, "resnet20-group": {"norm": "group"}}


def images(num: int, side: int = 32, path: Path | None = None) -> Dataset:
    """CIFAR-10 if a file is given, else random images of its shape: speed does not depend on what they show."""
    if path is not None:
        with np.load(path) as file:
            x, y = (torch.from_numpy(file[name][:num]) for name in ("x_train", "y_train"))
        return Dataset(x, y.long(), x[:200], y[:200].long(), 10, (0.5,) * 3, (0.25,) * 3, "none")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (num, 3, side, side), generator=generator, dtype=torch.uint8)
    y = torch.arange(num) % 10
    return Dataset(x, y, x[:200], y[:200], 10, (0.5,) * 3, (0.25,) * 3, "none")


def task_of(
    model: str, data: Dataset, clients: int, batch: int, device: str, dtype: torch.dtype = torch.float32
) -> Classification:
    options = MODELS.get(model, {})
    shape = tuple(data.x_train.shape[1:])
    net = build_model(model.removesuffix("-group"), shape, 10, seed=0, **options)  # type: ignore[arg-type]
    partition = make_partition("iid", data.y_train.numpy(), clients, seed=0)
    return Classification(data, net, partition, batch_size=batch, dtype=dtype, device=device)


def plan_of(cohort: int, batch: int, steps: int, rounds: int = 2) -> Plan:
    return Plan(Method(0.9), LearningRate(0.02), rounds, cohort, batch, num_local_steps=steps, eval_every=10**9)


def engine_of(
    task: Classification, plan: Plan, path: str, chunk: int, convolution: str = "", *, replays: bool = True
) -> Engine:
    engine = Engine(task, plan.method, path=path, chunk_size=chunk, convolution=convolution)
    engine.replays = engine.replays if replays else None
    return engine


# --- right? ---------------------------------------------------------------------------------------------------


def trained(task: Classification, plan: Plan, engine: Engine) -> Any:
    *_, (done, _) = run_rounds(task, plan, engine, beginning(task, plan))
    return to_device(done.state, "cpu")


def apart(one: Any, other: Any) -> float:
    """The largest difference of any number of x, u and buffers."""
    return max(
        float((a[name].double() - b[name].double()).abs().max())
        for a, b in zip(one, other, strict=True)
        for name in b
        if b[name].is_floating_point()
    )


def error(state: Any, exact: Any, start: Any) -> float:
    """‖x − exact‖ over ‖exact − start‖, the worst tensor."""
    return max(
        float((x.double() - exact.params[n]).norm() / (exact.params[n] - start.params[n].double()).norm())
        for n, x in state.params.items()
    )


# Storage and products: (column, dtype, whether float32 products may be TF32).
FORMS = (
    ("float64", torch.float64, False),
    ("float32", torch.float32, False),
    ("tf32", torch.float32, True),
    ("bfloat16", torch.bfloat16, False),
)


def allow_tf32(allowed: bool) -> None:
    """As engine.matmul does."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def check(device: str, quick: bool) -> list[dict[str, Any]]:
    """Four rounds each, so that on a GPU the last two are replayed."""
    rows, data = [], images(60, 16)
    for model in list(MODELS)[: 3 if quick else None]:
        plan = plan_of(3, 5, 3, rounds=4)
        exact_task = task_of(model, data, 3, 5, "cpu", torch.float64)
        exact = trained(exact_task, plan, engine_of(exact_task, plan, "loop", 1))
        ways = [("loop", ""), ("vmap", ""), ("factors", "")]
        ways += [("stack", way) for way in (CONVOLUTIONS if "cnn" in model or "resnet" in model else [""])]
        for path, convolution in ways:
            row: dict[str, Any] = {"model": model, "way": f"{path} {convolution}".strip()}
            for column, dtype, tf32 in FORMS:
                allow_tf32(tf32)
                try:
                    task = task_of(model, data, 3, 5, device, dtype)
                    engine = engine_of(task, plan, path, 3, convolution)
                    state = trained(task, plan, engine)
                except Exception as failure:  # no kernel for this dtype or device
                    row[f"{column} failed"] = str(failure).splitlines()[0][:120]
                    continue
                row[column] = apart(state, exact) if column == "float64" else error(state, exact, exact_task.start())
                if engine.replays is not None:
                    row["replayed"] = row.get("replayed", 0) + engine.replays.num_replayed
                    row["trouble"] = row.get("trouble") or engine.replays.trouble
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    allow_tf32(False)
    return rows


# --- fast? ----------------------------------------------------------------------------------------------------


def rate_of(task: Classification, plan: Plan, engine: Engine, seconds: float) -> float:
    """Client-steps/s, the median of rounds after the first two."""
    done = beginning(task, plan)
    job = round_job(task, plan, done)
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < 200):
        begin = now(task.device)
        engine.run_round(done.state, job)
        times.append(now(task.device) - begin)
        if sum(times) > 6 * seconds:
            break
    return float(job.num_steps.sum()) / statistics.median(times[2:] or times)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(task: Classification, plan: Plan, seconds: float) -> float:
    """Client-steps/s of one resident model in plain PyTorch on the same minibatches: what the others do."""
    job = round_job(task, plan, beginning(task, plan))
    model, device = task.model, task.device
    model.train()
    params = list(model.parameters())
    batches = list(task.round_batches(job.clients[:1], job.first_steps[:1], len(job.lrs)))
    count, begin = 0, now(device)
    while now(device) - begin < seconds:
        optimizer = torch.optim.SGD(params, lr=0.02, momentum=0.9, fused=True)
        for batch in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch.x[0]), batch.y[0]).backward()
            optimizer.step()
            count += 1
    return count / (now(device) - begin)


def measured(
    task: Classification,
    plan: Plan,
    options: argparse.Namespace,
    path: str,
    chunk: int,
    convolution: str,
    *,
    replays: bool = True,
) -> dict[str, Any]:
    """Client-steps/s of one way, or why it fails."""
    row: dict[str, Any] = {"way": f"{path} {convolution}".strip(), "chunk": chunk}
    cuda = task.device.type == "cuda"
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        engine = engine_of(task, plan, path, chunk, convolution, replays=replays)
        row["rate"] = rate_of(task, plan, engine, options.seconds)
        if engine.replays is not None:
            row |= {"replayed": engine.replays.num_replayed, "trouble": engine.replays.trouble}
        if cuda:
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    except Exception as failure:  # out of memory, or no kernel for this shape
        row["failed"] = str(failure).splitlines()[0][:120]
    return row


def speed(model: str, device: str, options: argparse.Namespace, **sizes: int) -> list[dict[str, Any]]:
    allow_tf32(False)
    data = images(sizes["clients"] * sizes["each"], path=options.cifar)
    of = (model, data, sizes["clients"], sizes["batch"], device)
    task, plan = task_of(*of), plan_of(sizes["cohort"], sizes["batch"], sizes["steps"])
    rows = [{"model": model, "way": "resident model, plain PyTorch", "rate": resident(task, plan, options.seconds)}]
    chunks = sorted({min(k, sizes["cohort"]) for k in (1, 5, 10, 25, 50)})
    # Without a name each layer takes the way that was fastest for its shape.
    ways = [(path, way) for path in ("factors", "stack") for way in ("", *CONVOLUTIONS)] + [("vmap", "")]
    for path, convolution in ways:
        for chunk in reversed(chunks):
            row = {"model": model, **measured(task, plan, options, path, chunk, convolution)}
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            if "failed" not in row and row["rate"] < 0.5 * max(r.get("rate", 0) for r in rows):
                break  # the way is far behind: other chunks of it would only take time
    best = max((row for row in rows if "chunk" in row), key=lambda row: row.get("rate", 0))
    path, _, convolution = best["way"].partition(" ")
    for name, dtype, tf32, replays in (
        ("no graph", torch.float32, False, False),
        ("tf32", torch.float32, True, True),
        ("bfloat16", torch.bfloat16, False, True),
    ):
        allow_tf32(tf32)
        found = measured(task_of(*of, dtype), plan, options, path, best["chunk"], convolution, replays=replays)
        rows.append({"model": model, **found, "way": f"{best['way']}, {name}"})
        print(rows[-1], file=sys.stderr, flush=True)
    allow_tf32(False)
    return rows


# --- the table ------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['device']}, torch {report['torch']}, commit {report['commit']}, `{report['command']}`", ""]
    if rows := report.get("check"):
        names = [column for column, *_ in FORMS]
        lines += ["float64: largest difference; others: relative error; – where a way cannot be had.", ""]
        lines += [
            "| model | way | " + " | ".join(names) + " | chunks replayed |",
            "|---|---|" + "---|" * (len(names) + 1),
        ]
        for r in rows:
            cells = [f"{r[name]:.1e}" if name in r else "–" for name in names]
            lines.append(
                f"| {r['model']} | {r['way']} | {' | '.join(cells)} | {r.get('trouble') or r.get('replayed', '–')} |"
            )
        lines.append("")
    if "bandwidth" in report:
        lines += [f"Measured: {report['bandwidth'] / 1e9:,.0f} GB/s copying, {report['flops'] / 1e12:,.1f} TFLOP/s", ""]
    for key in ("speed", "resnet"):
        if rows := report.get(key):
            lines += ["| model | way | K | client-steps/s | memory, GB |", "|---|---|---|---|---|"]
            for r in rows:
                rate = f"{r['rate']:,.0f}" if "rate" in r else r["failed"]
                memory = f"{r['memory_gb']:.1f}" if "memory_gb" in r else "–"
                lines.append(f"| {r['model']} | {r['way']} | {r.get('chunk', '–')} | {rate} | {memory} |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=5.0, help="for every measurement")
    parser.add_argument("--only", nargs="+", default=["check", "speed", "resnet"])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    card = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    report: dict[str, Any] = {
        "device": card,
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
        "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:]),
    }
    small = {"clients": 8, "each": 10, "cohort": 4, "batch": 5, "steps": 2}
    steps = {
        "check": lambda: check(options.device, options.quick),
        "speed": lambda: speed(
            "cnn",
            options.device,
            options,
            **(small if options.quick else {"clients": 1000, "each": 50, "cohort": 50, "batch": 10, "steps": 5}),
        ),
        "resnet": lambda: speed(
            "resnet20" if options.quick else "resnet56",
            options.device,
            options,
            **(small if options.quick else {"clients": 8, "each": 640, "cohort": 8, "batch": 64, "steps": 4}),
        ),
    }
    report["flops"], report["bandwidth"] = peaks(torch.device(options.device))
    for name in options.only:
        report[name] = steps[name]()
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1))
        (options.out / "gpu.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
