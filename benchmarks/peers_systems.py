"""How benchmarks/peers.py runs each system: functions of (workload, folder, rounds, …) that give `Result`s."""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers_app")]
THREADS = {"OMP_NUM_THREADS": "1"}

# {"seconds": of every round, "losses": mean training losses, the first and last at least, "parameters": of the model}
Result = dict[str, Any]

# --- fedmom ---------------------------------------------------------------------------------------------------


def fedmom(load: dict[str, Any], folder: Path, rounds: int, **changes: Any) -> Result:
    """`fedmom run`; the path that was chosen is noted in load["chosen"]."""
    from fedmom.tasks.models import build_model

    out = folder / f"{load['name']}-{'-'.join(str(v) for v in changes.values())}"
    keys = {
        "data.dataset": str(folder / f"{load['name']}-flat.npz"),
        "data.num-clients": load["clients"],
        "data.partition": "iid",
        "data.batch-size": load["batch"],
        "model.name": load["model"],
        "algorithm.cohort-size": load["cohort"],
        "algorithm.num-local-steps": load["steps"],
        "algorithm.lr": load["lr"],
        "algorithm.beta": load["momentum"],
        "engine.remember": "false",
        "run.num-rounds": rounds + 1,  # the last one is evaluated
        "run.eval-every": rounds + 1,
        "run.checkpoint-every": rounds + 1,
        **({"model.hidden": load["hidden"]} if "hidden" in load else {}),
        **{key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()},
    }
    shutil.rmtree(out, ignore_errors=True)
    config = folder / "empty.toml"
    config.write_text("[run]\n")
    sets = [f"--set={key}={value}" for key, value in keys.items()]
    call([sys.executable, "-m", "fedmom", "run", str(config), *sets, "--out", str(out)], {}, out.with_suffix(".log"))
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    seconds = [record["wall_seconds"] for record in records]
    lines = (out / "config.toml").read_text().splitlines()
    load["chosen"] = [line for line in lines if line.startswith(("path", "chunk-size"))]
    losses = [record["train_loss"] for record in records]
    net = build_model(load["model"], tuple(load["shape"]), 10, seed=0, hidden=load.get("hidden", 200))
    count = sum(p.numel() for p in net.parameters())
    return {"seconds": [b - a for a, b in pairwise(seconds[:-1])], "losses": losses, "parameters": count}


# --- by hand --------------------------------------------------------------------------------------------------


def loop_worker(load: dict[str, Any], device: str, jobs: Any, answers: Any) -> None:
    """A resident model that takes the clients it is given, one after another."""
    import torch
    from peers_app import common

    torch.set_num_threads(1)
    data = tuple(part.to(device) for part in common.data_of(load))
    model = common.model_of(load).to(device)
    if load["model"] in ("cnn", "resnet20"):
        model, x = model.to(memory_format=torch.channels_last), data[0]
        data = (x.flatten(0, 1).contiguous(memory_format=torch.channels_last).reshape(x.shape), data[1])
    params = list(model.parameters())
    while (job := jobs.get()) is not None:
        start, clients = job
        total, losses = [torch.zeros_like(p) for p in params], []
        for client in clients:
            with torch.no_grad():
                for p, value in zip(params, start, strict=True):
                    p.copy_(value)
            optimizer = torch.optim.SGD(params, lr=load["lr"], momentum=load["momentum"], fused=True)
            losses.append(common.local_steps(model, optimizer, data, load, client))
            with torch.no_grad():
                for t, p in zip(total, params, strict=True):
                    t += p
        answers.put(([t.cpu() for t in total], sum(losses)))


def loop(load: dict[str, Any], rounds: int, processes: int, device: str = "cpu") -> Result:
    """Resident loops."""
    import torch.multiprocessing as mp
    from peers_app import common

    context = mp.get_context("spawn")
    jobs, answers = [context.Queue() for _ in range(processes)], context.Queue()
    workers = [context.Process(target=loop_worker, args=(load, device, job, answers)) for job in jobs]
    for worker in workers:
        worker.daemon = True  # one that died leaves the others waiting for work
        worker.start()
    params, rng = [p.detach() for p in common.model_of(load).parameters()], np.random.default_rng(0)
    seconds, losses = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        cohort = rng.choice(load["clients"], load["cohort"], replace=False)
        for job, clients in zip(jobs, np.array_split(cohort, processes), strict=True):
            job.put((params, clients.tolist()))
        sums, totals = zip(*[answers.get(timeout=900) for _ in workers], strict=True)
        losses.append(sum(totals) / load["cohort"])
        params = [sum(parts) / load["cohort"] for parts in zip(*sums, strict=True)]
        seconds.append(time.perf_counter() - begin)
    for job, worker in zip(jobs, workers, strict=True):
        job.put(None)
        worker.join()
    return {"seconds": seconds, "losses": losses, "parameters": sum(p.numel() for p in params)}


# --- the others -----------------------------------------------------------------------------------------------


def flower(load: dict[str, Any], folder: Path, rounds: int, processes: int) -> Result:
    from flower_overhead import flwr_run

    work = folder / f"{load['name']}-flower"
    work.mkdir(exist_ok=True)
    out = work / "result.json"
    out.unlink(missing_ok=True)
    config = {
        "workload": json.dumps({key: value for key, value in load.items() if key != "chosen"}),
        "num-rounds": rounds,
        "fraction": load["cohort"] / load["clients"],
        "out": str(out),
    }
    flwr_run(ROOT / "benchmarks" / "peers_app", load["clients"], config, processes, work)
    return json.loads(out.read_text())


def script(load: dict[str, Any], folder: Path, rounds: int, command: list[str], name: str, *more: str) -> Result:
    """benchmarks/NAME.py WORKLOAD.json ROUNDS OUT.json …, run by `command`."""
    out = folder / f"{load['name']}-{name}{''.join(f'-{word}' for word in more)}.json"
    out.unlink(missing_ok=True)
    path = ROOT / "benchmarks" / f"{name}.py"
    words = [*command, str(path), str(folder / f"{load['name']}.json"), str(rounds), str(out), *more]
    call(words, THREADS, out.with_suffix(".log"))
    return json.loads(out.read_text())


def pfl(load: dict[str, Any], folder: Path, rounds: int, python: Path, processes: int) -> Result:
    """Several processes by torch.distributed (gloo on a CPU): pfl needs no MPI for it."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        str(processes),
    ]
    return script(load, folder, rounds, [str(python), *(launcher if processes > 1 else [])], "peers_pfl")


def call(command: list[str], environment: dict[str, str], log: Path) -> None:
    with log.open("w") as file:
        status = subprocess.run(
            command, env={**os.environ, **environment}, stdout=file, stderr=file, timeout=900
        ).returncode
    if status:
        raise RuntimeError(f"{' '.join(command[:4])} failed ({status}): {log.read_text()[-800:]}")
