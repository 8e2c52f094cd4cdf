"""The sections of benchmarks/gpu.py: which rows each of them measures, the most important first."""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_by_hand import by_hand
from gpu_table import best_of, known
from gpu_ways import FORMS, Load, Row, Way, check, exact, images, layers, measured, profiled, why

from fedmom.engine.stacked.convolutions import CONVOLUTIONS
from fedmom.experiments.bench import peaks
from fedmom.machine.precision import allow_tf32

ROOT = Path(__file__).resolve().parent.parent
TRITON = "implicit"  # of CONVOLUTIONS, the one that Triton compiles
FAST = ("float32", "tf32")  # the forms whose speed is measured
LOADS = {
    "speed": Load("cnn", 1000, 50, 50, 10, 5),
    "plain": Load("cnn", 1000, 50, 50, 10, 5, momentum=0.0),
    "resnet": Load("resnet56", 8, 640, 8, 64, 4),
    "logistic": Load("logistic", 1000, 60, 100, 10, 6, shape=(1, 28, 28)),
    "mlp": Load("mlp", 1000, 60, 100, 10, 6, shape=(1, 28, 28), hidden=200),
    "resnet20": Load("resnet20", 16, 50, 16, 10, 5),
}
SMALL = ("plain", "logistic", "mlp", "resnet20")
CHECKED = ("resnet20", "cnn", "mlp")  # the slowest first
PROCESSES = (5, 1, 3, 4, 2)  # of pfl, as its authors share a card; the most telling first


class Section(NamedTuple):
    """A part of the script that runs by itself."""

    seconds: float  # at most
    processes: int  # at most
    rows: Callable[[argparse.Namespace], Iterator[Row]]


def loads(options: argparse.Namespace) -> dict[str, Load]:
    """With --quick the same in small."""
    if not options.quick:
        return LOADS
    small = {"clients": 8, "each": 10, "cohort": 4, "batch": 5, "steps": 2}
    found = {name: load._replace(**small, shape=(load.shape[0], 16, 16)) for name, load in LOADS.items()}
    return found | {"resnet": found["resnet"]._replace(model="resnet20")}


def data_of(load: Load, options: argparse.Namespace) -> Any:
    return images(load.clients * load.each, load.shape, options.cifar if load.shape == (3, 32, 32) else None)


def is_time(options: argparse.Namespace) -> bool:
    """Whether another measurement may begin: there is time, and the process that began this one still waits."""
    return time.monotonic() < options.until and os.getppid() == options.parent


# --- right? ---------------------------------------------------------------------------------------------------


def checked_load(model: str) -> Load:
    return Load(model, 3, 20, 3, 5, 3, shape=(3, 16, 16), hidden=64)


def compiled(options: argparse.Namespace) -> Iterator[Row]:
    """Every convolution by itself, then every model and size: a round of two steps, the first from a common start."""
    all_loads = loads(options)
    cnn, resnet, resnet20 = (all_loads[name] for name in ("speed", "resnet", "resnet20"))
    small = [checked_load(model) for model in CHECKED]
    jobs: list[tuple[Load, int, str, Any]] = []
    for load in (resnet, cnn, *small):
        jobs += [(load, 2, f", {name}", model) for name, model in layers(load).items()]
    whole = [(load, load.cohort) for load in (resnet, cnn)] + [(load, 2) for load in small]
    whole += [(resnet, k) for k in (4, 2) if k < resnet.cohort] + [(load, 1) for load in small]
    whole += [(resnet20, resnet20.cohort), (all_loads["plain"], cnn.cohort)]
    jobs += [(load, k, "", None) for load, k in [*whole, *((cnn, k) for k in chunks(cnn)[1:])]]
    each = [(*job, form) for job in jobs for form in FAST]
    for load, k, name, model, form in each[options.part :: options.parts]:
        if not is_time(options):
            return
        own = load._replace(clients=k, cohort=k, steps=2, each=max(load.batch, 10))
        begin, way = time.monotonic(), Way("stack", TRITON, form, k)
        data = images(k * own.each, own.shape)
        row = measured(own, data, way, options.device, 0.0, replays=False, model=model)
        row |= {"model": f"{load.name}{name}", "seconds": time.monotonic() - begin}
        yield row


def checked(options: argparse.Namespace) -> Iterator[Row]:
    """Neighbours go to one process, which then needs what is right for one model or two alone."""
    jobs = [(model, way) for model in CHECKED for way in ways_to_check(model, options.quick)]
    first, last = (len(jobs) * (options.part + i) // options.parts for i in (0, 1))
    right: dict[str, Any] = {}
    for model, way in jobs[first:last]:
        if not is_time(options):
            return
        load = checked_load(model)
        data = images(60, load.shape)
        if model not in right:
            right[model] = exact(load, data)
        yield check(load, data, way, right[model], options.device)


def ways_to_check(model: str, quick: bool) -> list[Way]:
    """Chunks of two and one of three clients; of convolutions every way, of a model without them one."""
    convolutions = ["grouped"] if model == "mlp" else list(CONVOLUTIONS)
    forms = ["float64"] if quick else list(FORMS)
    names = [("stack", way) for way in convolutions] + [("factors", ""), ("vmap", ""), ("loop", "")]
    if quick and model == "resnet20":
        names = [("stack", "loop")]
    found = [Way(path, way, form, 2) for path, way in names for form in forms]
    return [way for way in found if (way.convolution, way.form) != (TRITON, "float64")]


# --- fast? ----------------------------------------------------------------------------------------------------


def chunks(load: Load) -> list[int]:
    return sorted({min(k, load.cohort) for k in (50, 25, 10, 5)}, reverse=True)


def speed(*names: str, every: bool, options: argparse.Namespace) -> Iterator[Row]:
    """Of each workload what is written by hand, then the engine's ways; `every` way to convolve, and other K."""
    for name in names:
        load = loads(options)[name]
        data = data_of(load, options)
        for form in FAST:
            if is_time(options):
                yield from by_hand(load, data, form, options.device, min(1.5, options.seconds))
        rows: list[Row] = []
        for way in ways_to_time(load, every):
            if is_time(options):
                rows.append(measured(load, data, way, options.device, options.seconds))
                yield rows[-1]
        for way in [best for form in FAST for best in best_of(rows, form)[:1]] if every else []:
            for chunk in chunks(load)[1:3]:
                if is_time(options):
                    yield measured(load, data, way._replace(chunk=chunk), options.device, options.seconds)
        for way in best_of(rows)[:1]:
            if is_time(options):
                yield measured(load, data, way, options.device, options.seconds, replays=False)


def ways_to_time(load: Load, every: bool) -> list[Way]:
    """Each path in both forms, then by every way to convolve."""
    names = [("factors", ""), ("stack", "")]
    found = [Way(path, way, form, load.cohort) for path, way in names for form in FAST]
    if every:
        found += [Way(path, "", "float32", load.cohort) for path in ("vmap", "loop")]
        convolved = [("stack", way) for way in ("implicit", "grouped", "loop", "unfold")]
        found += [Way(path, way, form, load.cohort) for path, way in convolved for form in FAST]
    return found


def smaller(options: argparse.Namespace) -> Iterator[Row]:
    """The paper's model with fewer clients, by the ways that were the fastest with all of them."""
    load = loads(options)["resnet"]
    rows = [row for row in known(options.out) if row["section"] == "resnet"]
    for form in FAST:
        for way in best_of(rows, form)[:1]:
            for k in (4, 2):
                own = load._replace(clients=k, cohort=k, each=load.each * load.clients // k)
                if is_time(options):
                    yield measured(own, data_of(own, options), way._replace(chunk=k), options.device, options.seconds)


def with_profile(options: argparse.Namespace) -> Iterator[Row]:
    """What the card can do, then of both large workloads the best way in each form."""
    for form in FAST:
        allow_tf32(FORMS[form][1])
        try:
            flops, bandwidth = peaks(torch.device(options.device))
            yield {"form": form, "flops": flops, "bandwidth": bandwidth}
        except Exception as failure:
            yield {"way": "peaks", "model": "", "form": form, "failed": why(failure)}
        finally:
            allow_tf32(False)
    for name in ("speed", "resnet"):
        load = loads(options)[name]
        rows = [row for row in known(options.out) if row["section"] == name]
        for form in FAST:
            way = next(iter(best_of(rows, form)), Way("stack", "", form, load.cohort))
            if is_time(options):
                yield profiled(load, data_of(load, options), way, options.device)


def pfl(options: argparse.Namespace) -> Iterator[Row]:
    """pfl-research, by benchmarks/peers_pfl.py in this Python, with torch's own setting of TF32."""
    load = loads(options)["speed"]
    rounds = 4 if options.quick else 8
    row: Row = {"model": load.name, "form": "torch's default"}
    if importlib.util.find_spec("pfl") is None:
        yield {**row, "way": "pfl", "failed": "not installed"}
        return
    data = data_of(load, options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart = (load.clients, load.each)
        x, y = (t.numpy().reshape(*apart, *t.shape[1:]) for t in (data.x_train, data.y_train))
        np.savez(folder / "data.npz", x=x, y=y)
        work = {"data": str(folder / "data.npz"), "shape": list(data.input_shape), "mean": data.mean, "std": data.std}
        work |= {"model": load.model, "clients": load.clients, "cohort": load.cohort, "batch": load.batch}
        work |= {"steps": load.steps, "lr": 0.02, "momentum": load.momentum}
        (folder / "work.json").write_text(json.dumps(work))
        for processes in PROCESSES:
            if not is_time(options):
                return
            row["way"] = f"pfl, {processes} process{'es' if processes > 1 else ''}"
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
            start += ["--nproc-per-node", str(processes)]
            script = [str(ROOT / "benchmarks" / "peers_pfl.py"), str(folder / "work.json"), str(rounds)]
            command = [*(start if processes > 1 else start[:1]), *script, str(folder / "out.json")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = [line for line in done.stderr.splitlines() if "Error" in line] or ["no word"]
                yield {**row, "failed": last[0][:200]}
                continue
            seconds = json.loads((folder / "out.json").read_text())["seconds"]
            yield {**row, "rate": load.cohort * load.steps / statistics.median(seconds[2:])}


SECTIONS = {
    "compile": Section(50, 16, compiled),
    "check": Section(60, 8, checked),
    "speed": Section(60, 1, lambda options: speed("speed", every=True, options=options)),
    "resnet": Section(40, 1, lambda options: speed("resnet", every=True, options=options)),
    "profile": Section(30, 1, with_profile),
    "pfl": Section(60, 1, pfl),
    "small": Section(40, 1, lambda options: speed(*SMALL, every=False, options=options)),
    "fewer": Section(12, 1, smaller),
}
