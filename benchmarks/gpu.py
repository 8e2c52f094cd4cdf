#!/usr/bin/env python3
"""The engine on a GPU, section by section: first that it is right, then how fast it is, and the card's own limits.

    python benchmarks/gpu.py --out "$OUT" [--section NAME …] [--cifar FILE.npz] [--seconds 5]

Needs torch, numpy and this checkout; neither flwr nor ray. `--list` names the sections; each takes some minutes at most
and can be run alone, on another day. Every row is appended to OUT/rows.jsonl as soon as it is there, and OUT/gpu.md is
the table of all rows so far, so a run that is cut off leaves what it had.

* `check-MODEL`: every path and every way to convolve against the plain loop on the CPU in float64: x, u, buffers, the
  losses and the spreads of all rounds, in float64, float32, with TF32 products and in bfloat16. Twice six rounds with
  two lr lists, so that on a GPU recordings of both are replayed, and the first again after the second. Exit status 1
  where float64 is off by more than rounding or a recording was given up.
* `peaks`: the card's measured bandwidth and matrix product rate.
* `speed-WAY`: pfl's CIFAR-10 benchmark (1,000 clients of 50 images, cohort 50, batch 10, 5 steps, momentum 0.9):
  client-steps/s by way to convolve and chunk size; `speed-resident`: of one resident model in plain PyTorch;
  `speed-forms`: the best so far without replays, with TF32 products and in bfloat16.
* `resnet-WAY`: ResNet-56, 8 clients, batch 64, the same.

`--device cpu --quick` tries the script itself on small sizes.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "peers_app")]

from fedmom.data.datasets import Dataset  # noqa: E402
from fedmom.data.partition import make_partition  # noqa: E402
from fedmom.engine.engine import Engine  # noqa: E402
from fedmom.engine.stacked.convolutions import CONVOLUTIONS  # noqa: E402
from fedmom.experiments.bench import peaks  # noqa: E402
from fedmom.machine.precision import allow_tf32  # noqa: E402
from fedmom.method.algorithms import Method  # noqa: E402
from fedmom.method.schedules import LearningRate  # noqa: E402
from fedmom.method.state import ClientState, to_device  # noqa: E402
from fedmom.rounds.loop import Plan, beginning, round_job, run_rounds  # noqa: E402
from fedmom.tasks.classification import Classification  # noqa: E402
from fedmom.tasks.models import build_model  # noqa: E402

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

FORMS = {  # storage, and whether float32 products may be TF32
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}
MEASURES = ("train_loss", "consensus_distance", "momentum_spread")
ROUNDING = 1e-6  # in float64, relative: what is wrong is off by more


def trained(task: Classification, plan: Plan, engine: Engine) -> tuple[ClientState, list[dict[str, Any]]]:
    """The plan twice, one after the other, by one engine -> (the last state, the records of both)."""
    records: list[dict[str, Any]] = []
    for _ in range(2):
        steps = list(run_rounds(task, plan, engine, beginning(task, plan)))
        records += [record for _, record in steps]
    return to_device(steps[-1][0].state, "cpu"), records


def errors(found: Any, exact: Any, start: ClientState) -> dict[str, float]:
    """Of x, u and buffers ‖found − exact‖ over how far the exact ones went; of each measure the worst round's."""
    (state, records), (want, wanted) = found, exact
    row = {}
    for part in ("params", "momentum", "buffers"):
        trees = [getattr(s, part) for s in (state, want, start)]
        names = [n for n, v in trees[1].items() if v.is_floating_point()]
        got, right, before = (torch.cat([t[n].double().flatten() for n in names] or [torch.zeros(1)]) for t in trees)
        row[part] = float((got - right).norm() / ((right - before).norm() or 1))
    for name in MEASURES:
        row[name] = max(abs(a[name] - b[name]) / (abs(b[name]) or 1) for a, b in zip(records, wanted, strict=True))
    return row


def check(model: str, device: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    data = images(60, 16)
    plan = plan_of(3, 5, 3, rounds=6)
    plan = plan._replace(rate=plan.rate._replace(schedule="step", milestones=(0.5,), unit="fraction"))
    exact_task = task_of(model, data, 3, 5, "cpu", torch.float64)
    exact = trained(exact_task, plan, engine_of(exact_task, plan, "loop", 1))
    ways = [("loop", ""), ("vmap", ""), ("factors", "")]
    ways += [("stack", way) for way in (CONVOLUTIONS if "cnn" in model or "resnet" in model else [""])]
    for path, convolution in ways:
        for form, (dtype, tf32) in FORMS.items():
            row: dict[str, Any] = {"model": model, "way": f"{path} {convolution}".strip(), "form": form}
            allow_tf32(tf32)
            try:
                task = task_of(model, data, 3, 5, device, dtype)
                engine = engine_of(task, plan, path, 2, convolution)  # a chunk of 2 and one of 1
                row |= errors(trained(task, plan, engine), exact, exact_task.start())
            except Exception as failure:  # no kernel for this dtype or device
                yield {**row, "failed": str(failure).splitlines()[0][:120]}
                continue
            if engine.replays is not None:
                row |= {"replayed": engine.replays.num_replayed, "trouble": engine.replays.trouble}
            off = [v for v in row.values() if isinstance(v, float) and not v <= ROUNDING]
            yield {**row, "wrong": bool(row.get("trouble") or (form == "float64" and off))}
    allow_tf32(False)


# --- fast? ----------------------------------------------------------------------------------------------------


def rate_of(task: Classification, plan: Plan, engine: Engine, seconds: float) -> float:
    """Client-steps/s, the median of rounds after those that are recorded and compared."""
    done = beginning(task, plan)
    job = round_job(task, plan, done)
    times: list[float] = []
    while len(times) < 6 or (sum(times) < seconds and len(times) < 200):
        begin = now(task.device)
        engine.run_round(done.state, job)
        times.append(now(task.device) - begin)
        if sum(times) > 6 * seconds:
            break
    return float(job.num_steps.sum()) / statistics.median(times[3:] or times)


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


SIZES = {
    "speed": ("cnn", {"clients": 1000, "each": 50, "cohort": 50, "batch": 10, "steps": 5}),
    "resnet": ("resnet56", {"clients": 8, "each": 640, "cohort": 8, "batch": 64, "steps": 4}),
}
QUICK = {"clients": 8, "each": 10, "cohort": 4, "batch": 5, "steps": 2}
WAYS = {  # of `speed` and `resnet`; without a name each layer takes the way that was fastest for its shape
    "resident": [],
    "factors": [("factors", way) for way in ("", *CONVOLUTIONS)],
    "stack": [("stack", way) for way in ("", *CONVOLUTIONS)],
    "vmap": [("vmap", "")],
    "forms": [],
}


def speed(what: str, part: str, device: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model, sizes = SIZES[what]
    if options.quick:
        model, sizes = model.replace("56", "20"), QUICK
    allow_tf32(False)
    data = images(sizes["clients"] * sizes["each"], path=options.cifar)
    of = (model, data, sizes["clients"], sizes["batch"], device)
    task, plan = task_of(*of), plan_of(sizes["cohort"], sizes["batch"], sizes["steps"])
    if part == "resident":
        rate = resident(task, plan, options.seconds)
        yield {"model": model, "way": "resident model, plain PyTorch", "rate": rate}
    chunks = sorted({min(k, sizes["cohort"]) for k in (1, 5, 10, 25, 50)})
    best = max((r["rate"] for r in known(options.out, f"{what}-") if "rate" in r and "chunk" in r), default=0.0)
    for path, convolution in WAYS[part]:
        for chunk in reversed(chunks):
            row = {"model": model, **measured(task, plan, options, path, chunk, convolution)}
            yield row
            best = max(best, row.get("rate", 0.0))
            if "failed" not in row and row["rate"] < 0.5 * best:
                break  # the way is far behind: other chunks of it would only take time
    if part == "forms":
        yield from forms(what, of, plan, options)


def forms(what: str, of: Any, plan: Plan, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The fastest way so far in other forms."""
    rows = [r for r in known(options.out, f"{what}-") if "rate" in r and "chunk" in r and "," not in r["way"]]
    fastest = max(rows, key=lambda r: r["rate"], default={"way": "stack", "chunk": 10**9})
    path, _, convolution = fastest["way"].partition(" ")
    chunk = min(fastest["chunk"], plan.cohort_size)
    for name, dtype, tf32, replays in (
        ("no graph", torch.float32, False, False),
        ("tf32", torch.float32, True, True),
        ("bfloat16", torch.bfloat16, False, True),
    ):
        allow_tf32(tf32)
        found = measured(task_of(*of, dtype), plan, options, path, chunk, convolution, replays=replays)
        yield {"model": of[0], **found, "way": f"{fastest['way']}, {name}"}
    allow_tf32(False)


def card_peaks(device: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    flops, bandwidth = peaks(torch.device(device))
    yield {"flops": flops, "bandwidth": bandwidth}


# --- the table ------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[str, argparse.Namespace], Iterator[dict[str, Any]]]] = {
    **{f"check-{model}": partial(check, model) for model in MODELS},
    "peaks": card_peaks,
    **{f"{what}-{part}": partial(speed, what, part) for what in SIZES for part in WAYS},
}


def known(out: Path, section: str = "") -> list[dict[str, Any]]:
    """All rows so far of the sections whose names begin so; of a way that was run twice the last."""
    path = out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = ("section", "model", "way", "form", "chunk")
    last = {tuple(row.get(name) for name in names): row for row in rows if row["section"].startswith(section)}
    return list(last.values())


def table(out: Path) -> str:
    lines = []
    rows = known(out)
    for card in dict.fromkeys((r["device"], r["torch"], r["commit"]) for r in rows):
        mine = [r for r in rows if (r["device"], r["torch"], r["commit"]) == card]
        lines += ["{}, torch {}, commit {}".format(*card), ""]
        if checks := [r for r in mine if r["section"].startswith("check")]:
            names = ("params", "momentum", "buffers", *MEASURES)
            lines += ["Relative errors against the plain loop on the CPU in float64, after twelve rounds.", ""]
            lines += ["| model | way | form | " + " | ".join(names) + " | chunks replayed |"]
            lines += ["|" + "---|" * (len(names) + 4)]
            for r in checks:
                cells = [f"{r[name]:.1e}" for name in names] if "failed" not in r else [r["failed"], *["–"] * 5]
                said = r.get("trouble") or f"{r.get('replayed', '–')}{', WRONG' if r.get('wrong') else ''}"
                lines.append("| {model} | {way} | {form} | ".format(**r) + " | ".join(cells) + f" | {said} |")
            lines.append("")
        for r in (r for r in mine if "bandwidth" in r):
            lines += [f"Measured: {r['bandwidth'] / 1e9:,.0f} GB/s copying, {r['flops'] / 1e12:,.1f} TFLOP/s", ""]
        if speeds := [r for r in mine if r["section"].startswith(tuple(SIZES))]:
            lines += ["| model | way | K | client-steps/s | memory, GB |", "|---|---|---|---|---|"]
            for r in speeds:
                rate = f"{r['rate']:,.0f}" if "rate" in r else r["failed"]
                memory = f"{r['memory_gb']:.1f}" if "memory_gb" in r else "–"
                lines.append(f"| {r['model']} | {r['way']} | {r.get('chunk', '–')} | {rate} | {memory} |")
            lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--section", nargs="+", metavar="NAME", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--list", action="store_true", help="name the sections")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=5.0, help="for every measurement")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.list:
        print("\n".join(SECTIONS))
        return 0
    if options.out is None:
        parser.error("--out DIR is missing")
    options.out.mkdir(parents=True, exist_ok=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    card = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    run = {"device": card, "torch": torch.__version__, "commit": git.stdout.strip() or "unknown"}
    wrong = 0
    for section in options.section:
        begin = time.perf_counter()
        with (options.out / "rows.jsonl").open("a") as file:
            for row in SECTIONS[section](options.device, options):
                print(row, file=sys.stderr, flush=True)
                file.write(json.dumps({"section": section, **run, **row}) + "\n")
                file.flush()
                wrong += row.get("wrong", False)
        (options.out / "gpu.md").write_text(table(options.out))
        print(f"{section}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    print(table(options.out))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
