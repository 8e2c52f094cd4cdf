"""What carrying messages costs: Flower's Simulation Engine and fedmom's Grid on Ray, with a client that does nothing.

The client turns its arrays into torch tensors and sends them back; the server is stock FedAvg without evaluation
(benchmarks/overhead_app, which knows nothing of fedmom). Every measurement is a fresh process:

* `floor`: the same ClientApp called in this process, one call after the other, and FedAvg's aggregation of the replies;
  no transport at all. What the two cost together per client, on one core.
* `flower`: `flwr run` with a SuperLink of its own, which this script ends.
* `fedmom`: `fedmom.simulate_app`.
* `fedmom, PRSGDM`: the same with fedmom's own strategy, whose sums stream.

Then, without --no-digits, real training: 100 clients on digits, by the engine, by our Grid (one client per node, and
blocks of 50) and by `flwr run` (blocks of 50); ms per client and round, evaluation and start-up left out.

ms per client and round: the time of a round, aggregation included, over the number of clients; the median of the rounds
after the first, which warms up. Start-up: from starting the process (the `flwr run` command, a SuperLink included) to
the first client's answer to an empty query. Memory: the largest RssAnon (what the driver itself holds) and RssShmem
(what it has mapped of Ray's store) of the process of the ServerApp.

    python benchmarks/flower_overhead.py --out /tmp/overhead
    python benchmarks/flower_overhead.py --out /tmp/quick --systems fedmom --cases 100x10000 --rounds 2
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "benchmarks" / "overhead_app"
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # flwr starts its own commands
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}

OURS = """
import json, sys
from fedmom.actors.cluster import PoolOptions
from fedmom.flower.app import simulate_app
app, num_nodes, config, actors = json.loads(sys.argv[1])
simulate_app(app, num_nodes=num_nodes, run_config=config, options=PoolOptions(num_workers=actors))
"""


def run_fedmom(num_clients: int, config: dict[str, Any], actors: int, folder: Path) -> float:
    """Time at which the process was started."""
    begun = time.time()
    arguments = json.dumps([str(APP.absolute()), num_clients, config, actors])
    call([sys.executable, "-c", OURS, arguments], ENVIRONMENT, folder)
    return begun


def run_prsgdm(num_clients: int, config: dict[str, Any], actors: int, folder: Path) -> float:
    return run_fedmom(num_clients, {**config, "strategy": "prsgdm"}, actors, folder)


def run_flower(num_clients: int, config: dict[str, Any], actors: int, folder: Path) -> float:
    return flwr_run(APP, num_clients, config, actors, folder)


def flwr_run(app: Path, num_nodes: int, config: dict[str, Any], actors: int, folder: Path) -> float:
    environment = {**ENVIRONMENT, "FLWR_HOME": str(folder / "flwr-home")}
    run_config = folder / "run.toml"
    run_config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    federation = f"num-supernodes={num_nodes} client-resources-num-cpus=1 client-resources-num-gpus=0"
    federation += f" init-args-num-cpus={actors}"
    command = ["flwr", "run", str(app), "--stream", "--run-config", str(run_config), "--federation-config", federation]
    begun = time.time()
    try:
        call(command, environment, folder)
    finally:
        end_processes_of(environment["FLWR_HOME"])
    return begun


def call(command: list[str], environment: dict[str, str], folder: Path) -> None:
    with (folder / "log.txt").open("w") as log:
        status = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=1800).returncode
    if status or not ((folder / "result.json").exists() or (folder / "run" / "final.safetensors").exists()):
        raise SystemExit(f"{' '.join(command[:3])} failed ({status}):\n{(folder / 'log.txt').read_text()[-3000:]}")


def end_processes_of(flwr_home: str) -> None:
    """The SuperLink and its children: those whose environment names this run's own FLWR_HOME."""

    def alive() -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"FLWR_HOME={flwr_home}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    for which in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 10
        for pid in alive():
            try:
                os.kill(pid, which)
            except ProcessLookupError:
                continue
        while alive() and time.monotonic() < deadline:
            time.sleep(0.1)


SYSTEMS: dict[str, Callable[[int, dict[str, Any], int, Path], float]] = {
    "flower": run_flower,
    "fedmom": run_fedmom,
    "fedmom, PRSGDM": run_prsgdm,
}

DIGITS: dict[str, Any] = {
    "data.num-clients": 100,
    "data.partition": "iid",
    "data.batch-size": 8,
    "model.name": "mlp",
    "model.hidden": 64,
    "algorithm.num-local-steps": 4,
    "run.num-rounds": 20,
    "run.eval-every": 20,
    "run.checkpoint-every": 20,
}


def digits_ways(actors: int) -> dict[str, tuple[dict[str, Any], int]]:
    """{way: (what it changes, nodes under `flwr run` or 0)}."""
    ours = {"run.backend": "simulation", "simulation.num-actors": actors}
    return {
        "engine": ({}, 0),
        "our Grid, one client per node": (ours, 0),
        "our Grid, blocks of 50": ({**ours, "simulation.clients-per-node": 50}, 0),
        "flwr run, blocks of 50": ({}, 2),
    }


def measure_digits(changes: dict[str, Any], num_nodes: int, actors: int) -> dict[str, float]:
    """ms per client and round, the median of the rounds but the first two and the last (evaluated) one."""
    from fedmom.records.history import read_rounds

    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder, config = Path(name), {**DIGITS, **changes}
        if num_nodes:
            flwr_run(ROOT, num_nodes, {**config, "run.out": str(folder / "run")}, actors, folder)
        else:
            sets = [f"--set={key}={value}" for key, value in config.items()]
            quickstart = str(ROOT / "configs" / "quickstart.toml")
            command = [sys.executable, "-m", "fedmom", "run", quickstart, *sets, "--out", str(folder / "run")]
            call(command, ENVIRONMENT, folder)
        seconds = [record["wall_seconds"] for record in read_rounds(folder / "run")]
    each = [after - before for before, after in pairwise(seconds)][1:-1]
    return {"ms": 1000 * statistics.median(each) / DIGITS["data.num-clients"]}


def digits_table(found: dict[str, Any]) -> str:
    steps = DIGITS["algorithm.num-local-steps"]
    lines = [
        "| digits, 100 clients, mlp 64, I = 4, B = 8 | ms per client and round | client-steps/s |",
        "|---|---|---|",
    ]
    for way, row in found.items():
        rate = f"{1000 * steps / row['ms']:,.0f}" if "ms" in row else row["failed"]
        lines.append(f"| {way} | {cell(row, 'ms', 2)} | {rate} |")
    return "\n".join(lines) + "\n"


def measure(system: str, num_clients: int, num_params: int, rounds: int, actors: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        out = folder / "result.json"
        config = {"num-params": num_params, "num-rounds": rounds + 1, "out": str(out)}
        begun = SYSTEMS[system](num_clients, config, actors, folder)
        result = json.loads(out.read_text())
    per_client = [1000 * seconds / num_clients for seconds in result["round_seconds"][1:]]
    return {
        "ms": statistics.median(per_client),
        "ms_all": per_client,
        "warm_up_ms": 1000 * result["round_seconds"][0] / num_clients,
        "startup_s": result["first_answer"] - begun,
        "own_mb": result["memory_mb"]["RssAnon"],
        "store_mb": result["memory_mb"]["RssShmem"],
    }


def measure_floor(num_clients: int, num_params: int) -> dict[str, Any]:
    """The ClientApp in this process, and FedAvg's aggregation of its replies (at most 100 of them)."""
    sys.path.insert(0, str(APP))
    import logging

    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from overhead_app.client import app
    from overhead_app.server import model

    from fedmom.flower.private import identify

    logging.getLogger("flwr").setLevel(logging.ERROR)
    identify(1, 1, 0)
    record = RecordDict({"arrays": ArrayRecord(model(num_params)), "config": ConfigRecord({"server-round": 1})})
    context = Context(1, 2, {}, RecordDict(), {})
    client, aggregation = [], []
    for _ in range(6):
        messages = [Message(record, 2, "train") for _ in range(min(num_clients, 100))]
        begun = time.perf_counter()
        replies = [app(message=message, context=context) for message in messages]
        middle = time.perf_counter()
        FedAvg(fraction_evaluate=0.0).aggregate_train(1, replies)
        client.append(1000 * (middle - begun) / len(messages))
        aggregation.append(1000 * (time.perf_counter() - middle) / len(messages))
    parts = {"client_ms": statistics.median(client[1:]), "aggregation_ms": statistics.median(aggregation[1:])}
    return {"ms": sum(parts.values()), **parts}


def tried(measured: Callable[[], Any]) -> Any:
    """What was measured, or {"failed": why}: one system's failure costs its row alone."""
    try:
        return measured()
    except (Exception, SystemExit) as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
        return {"failed": f"failed: {(str(error).strip().splitlines() or [type(error).__name__])[-1]}"}


def cell(row: dict[str, Any], key: str, digits: int) -> str:
    return f"{row[key]:.{digits}f}" if key in row else "–"


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| clients × parameters | system | ms per client and round | range | start-up, s | own MB | store MB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        spread = f"{min(row['ms_all']):.2f}–{max(row['ms_all']):.2f}" if "ms_all" in row else row.get("failed", "–")
        if "client_ms" in row:
            spread = f"client {row['client_ms']:.2f} + aggregation {row['aggregation_ms']:.2f}"
        cells = [f"{row['clients']:,} × {row['params']:,}", row["system"], cell(row, "ms", 2), spread]
        cells += [cell(row, "startup_s", 1), cell(row, "own_mb", 0), cell(row, "store_mb", 0)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for overhead.json and overhead.md")
    parser.add_argument("--systems", nargs="+", default=["floor", *SYSTEMS], choices=["floor", *SYSTEMS])
    parser.add_argument("--cases", nargs="+", default=["1000x10000", "100x1000000"], help="CLIENTSxPARAMETERS")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--no-digits", dest="digits", action="store_false", help="leave the training runs out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    for case in options.cases:
        num_clients, num_params = (int(part) for part in case.split("x"))
        for system in options.systems:
            print(f"{case} {system} …", file=sys.stderr, flush=True)
            if system == "floor":
                row = tried(partial(measure_floor, num_clients, num_params))
            else:
                row = tried(partial(measure, system, num_clients, num_params, options.rounds, options.actors))
            rows.append({"clients": num_clients, "params": num_params, "system": system, **row})
            report = {"machine": f"{platform.platform()}, {os.cpu_count()} cores", "rows": rows}
            (options.out / "overhead.json").write_text(json.dumps(report, indent=1))
            (options.out / "overhead.md").write_text(table(rows))
    text = table(rows)
    if options.digits:
        report["digits"] = found = dict[str, Any]()
        for way, (changes, num_nodes) in digits_ways(options.actors).items():
            print(f"digits {way} …", file=sys.stderr, flush=True)
            found[way] = tried(partial(measure_digits, changes, num_nodes, options.actors))
        text += "\n" + digits_table(found)
        (options.out / "overhead.json").write_text(json.dumps(report, indent=1))
        (options.out / "overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
