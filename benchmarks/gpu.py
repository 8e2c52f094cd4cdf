#!/usr/bin/env python3
"""The engine on a GPU in some four minutes: first that it is right, then how fast it is, and where the time goes.

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
* `pfl`: pfl-research's own simulation of the same, where it is installed.
* `resnet`: ResNet-56, 8 clients, batch 64, the same as `speed`.
* `profile`: the card's measured bandwidth and matrix products, and the kernels of one replayed round by time.

`--device cpu --quick` tries the script itself on small sizes.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_table import best_of, table  # noqa: E402
from gpu_ways import FORMS, Load, Row, Way, check, exact, images, layers, measured, profiled, resident, why  # noqa: E402
from paper_data import append  # noqa: E402

from fedmom.engine.stacked.convolutions import CONVOLUTIONS  # noqa: E402

TRITON = "implicit"  # of CONVOLUTIONS, the one that Triton compiles
LOADS = {
    "speed": Load("cnn", 1000, 50, 50, 10, 5),
    "resnet": Load("resnet56", 8, 640, 8, 64, 4),
}
QUICK = {
    "speed": Load("cnn", 8, 10, 4, 5, 2, side=16),
    "resnet": Load("resnet20", 4, 10, 4, 5, 2, side=16),
}
CHECKED = ("resnet20", "cnn", "mlp")  # the slowest first


class Section(NamedTuple):
    """A part of the script that runs by itself."""

    seconds: float  # at most
    processes: int  # at most
    rows: Callable[[argparse.Namespace], Iterator[Row]]


def loads(options: argparse.Namespace) -> dict[str, Load]:
    return QUICK if options.quick else LOADS


def data_of(load: Load, options: argparse.Namespace) -> Any:
    return images(load.clients * load.each, load.side, options.cifar if load.side == 32 else None)


def is_time(options: argparse.Namespace) -> bool:
    """Whether another measurement may begin: there is time, and the process that began this one still waits."""
    return time.monotonic() < options.until and os.getppid() == options.parent


# --- the sections ---------------------------------------------------------------------------------------------


def compiled(options: argparse.Namespace) -> Iterator[Row]:
    """Every convolution by itself, then every model and size: a round of two steps, the first from a common start."""
    cnn, resnet = loads(options).values()
    small = [Load(model, 3, 20, 3, 5, 3, side=16) for model in CHECKED]
    jobs: list[tuple[Load, int, str, Any]] = []
    for load in (resnet, cnn, *small):
        jobs += [(load, 2, f", {name}", model) for name, model in layers(load).items()]
    whole = [(load, load.cohort) for load in (resnet, cnn)] + [(load, 2) for load in small]
    whole += [(resnet, k) for k in (4, 2) if k < resnet.cohort] + [(load, 1) for load in small]
    jobs += [(load, k, "", None) for load, k in [*whole, *((cnn, k) for k in chunks(cnn)[1:])]]
    each = [(*job, form) for job in jobs for form in ("float32", "tf32")]
    for load, k, name, model, form in each[options.part :: options.parts]:
        if not is_time(options):
            return
        own = load._replace(clients=k, cohort=k, steps=2, each=max(load.batch, 10))
        begin, way = time.monotonic(), Way("stack", TRITON, form, k)
        data = images(k * own.each, own.side)
        row = measured(own, data, way, options.device, 0.0, replays=False, model=model)
        row |= {"model": f"{load.model}{name}", "seconds": time.monotonic() - begin}
        yield {key: value for key, value in row.items() if key != "rate"}


def checked(options: argparse.Namespace) -> Iterator[Row]:
    """Neighbours go to one process, which then needs what is right for one model or two alone."""
    jobs = [(model, way) for model in CHECKED for way in ways_to_check(model, options.quick)]
    first, last = (len(jobs) * (options.part + i) // options.parts for i in (0, 1))
    known: dict[str, Any] = {}
    for model, way in jobs[first:last]:
        if not is_time(options):
            return
        load = Load(model, 3, 20, 3, 5, 3, side=16)
        data = images(60, load.side)
        if model not in known:
            known[model] = exact(load, data)
        yield check(load, data, way, known[model], options.device)


def ways_to_check(model: str, quick: bool) -> list[Way]:
    """Chunks of two and one of three clients; of convolutions every way, of a model without them one."""
    convolutions = ["grouped"] if model == "mlp" else list(CONVOLUTIONS)
    forms = ["float64"] if quick else list(FORMS)
    names = [("stack", way) for way in convolutions] + [("factors", ""), ("vmap", ""), ("loop", "")]
    if quick and model == "resnet20":
        names = [("stack", "loop")]
    found = [Way(path, way, form, 2) for path, way in names for form in forms]
    return [way for way in found if (way.convolution, way.form) != (TRITON, "float64")]


def chunks(load: Load) -> list[int]:
    return sorted({min(k, load.cohort) for k in (50, 25, 10, 5)}, reverse=True)


def speed(what: str, options: argparse.Namespace) -> Iterator[Row]:
    load = loads(options)[what]
    data = data_of(load, options)
    forms = ("float32", "tf32")
    for form in forms:
        yield resident(load, data, form, options.device, min(2.0, options.seconds))
    rows: list[Row] = []
    k = load.cohort
    names = [("stack", ""), ("factors", ""), *(("stack", way) for way in CONVOLUTIONS), ("factors", TRITON)]
    todo = [Way(path, way, form, k) for path, way in names for form in forms] + [Way("vmap", "", "float32", k)]
    while todo and is_time(options):
        rows.append(measured(load, data, todo.pop(0), options.device, options.seconds))
        yield rows[-1]
    for way in [best for form in forms for best in best_of(rows, form)[:2]]:
        for chunk in chunks(load)[1:]:
            if is_time(options):
                yield measured(load, data, way._replace(chunk=chunk), options.device, options.seconds)
    for way in best_of(rows)[:1]:
        if is_time(options):
            yield measured(load, data, way, options.device, options.seconds, replays=False)


def with_profile(options: argparse.Namespace) -> Iterator[Row]:
    """Of both workloads the best way in each form."""
    for what, load in loads(options).items():
        rows = [row for row in known(options.out) if row["section"] == what]
        for form in ("float32", "tf32"):
            way = next(iter(best_of(rows, form)), Way("stack", "", form, load.cohort))
            if is_time(options):
                yield profiled(load, data_of(load, options), way, options.device)
    if is_time(options):
        try:
            from fedmom.experiments.bench import peaks

            flops, bandwidth = peaks(torch.device(options.device))
            yield {"flops": flops, "bandwidth": bandwidth}
        except Exception as failure:
            yield {"way": "peaks", "failed": why(failure)}


def pfl(options: argparse.Namespace) -> Iterator[Row]:
    """pfl-research, by benchmarks/peers_pfl.py in this Python, with torch's own setting of TF32."""
    load = loads(options)["speed"]
    row: Row = {"model": load.model, "way": "pfl", "form": "torch's default"}
    if importlib.util.find_spec("pfl") is None:
        yield {**row, "failed": "not installed"}
        return
    data = data_of(load, options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart = (load.clients, load.each)
        x, y = (t.numpy().reshape(*apart, *t.shape[1:]) for t in (data.x_train, data.y_train))
        np.savez(folder / "data.npz", x=x, y=y)
        work = {"data": str(folder / "data.npz"), "shape": list(data.input_shape), "mean": data.mean, "std": data.std}
        work |= {"model": load.model, "clients": load.clients, "cohort": load.cohort, "batch": load.batch}
        work |= {"steps": load.steps, "lr": 0.02, "momentum": 0.9}
        (folder / "work.json").write_text(json.dumps(work))
        script = ROOT / "benchmarks" / "peers_pfl.py"
        command = [sys.executable, str(script), str(folder / "work.json"), "8", str(folder / "out.json")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            yield {**row, "failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:120]}
            return
        seconds = json.loads((folder / "out.json").read_text())["seconds"]
    yield {**row, "rate": load.cohort * load.steps / statistics.median(seconds[2:])}


SECTIONS = {
    "compile": Section(45, 16, compiled),
    "check": Section(45, 8, checked),
    "speed": Section(85, 1, lambda options: speed("speed", options)),
    "pfl": Section(23, 1, pfl),
    "resnet": Section(35, 1, lambda options: speed("resnet", options)),
    "profile": Section(25, 1, with_profile),
}

# --- their processes ------------------------------------------------------------------------------------------


def known(out: Path) -> list[Row]:
    """All rows so far; of a way that was run twice the last. A line that was cut off is none."""
    path = out / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    names = ("section", "model", "way", "form", "chunk")
    return list({tuple(row.get(name) for name in names): row for row in map(json.loads, lines)}.values())


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
    parser.add_argument("--budget", type=float, default=260.0, help="seconds for all sections together")
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
    options.commit = git.stdout.strip() or "unknown"
    run_all(options)
    print(table(known(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
