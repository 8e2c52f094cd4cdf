#!/usr/bin/env python3
"""Bytes on the link between a client's machine and the server, beside what a run says that it sends.

    python benchmarks/wire.py --out DIR [--dir DEPLOYMENT] [--hidden 962] [--rounds 3]

Three clients in containers on this machine, each with a SuperNode whose interface towards the server is read before and
after a run of each row; a run of as many rounds whose model has few numbers is taken off, for the code and the
questions that every run sends. It needs a Docker engine, and builds fedmom's image where --dir names no deployment that
is up. DIR gets wire.json and wire.md. Bytes are those of one client in all rounds, in MB.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "deployment"), str(ROOT)]

_WHOLE = {"algorithm.codecs-down": "x: bfloat16; u: bfloat16"}
ROWS: dict[str, dict[str, Any]] = {
    "x and u in float32": {},
    "u every 3": {"algorithm.states": "u: average every 3"},
    "u local": {"algorithm.momentum-policy": "local", "server.own-rows": "nodes"},
    "u local, which the server relays": {"algorithm.momentum-policy": "local", "server.own-rows": "server"},
    "x and u in int8, down in bfloat16": {"algorithm.codecs": "x: int8; u: int8", **_WHOLE},
    "x in int8, u in topk, down in bfloat16": {"algorithm.codecs": "x: int8; u: topk", **_WHOLE},
}


@contextmanager
def deployed(folder: Path | None) -> Iterator[Any]:
    """The deployment whose keys lie in `folder`, which is up; None: one of our own, for as long as this lasts."""
    from containers import Deployment, build_image, three_clients

    if folder is not None:
        yield Deployment(folder.resolve().parent)
        return
    build_image()
    with tempfile.TemporaryDirectory() as name, three_clients(Path(name)) as made:
        yield made


def measured(deployment: Any, hidden: int, rounds: int, say: Any = print) -> list[dict[str, Any]]:
    """A row for each of ROWS."""
    from traffic import count, idle, payload

    same = {"model.name": "mlp", "run.num-rounds": rounds, "algorithm.num-local-steps": 2, "run.checkpoint-every": 1000}
    rows, rate = list[dict[str, Any]](), idle(deployment)
    with tempfile.TemporaryDirectory(prefix="wire-") as name:
        folder = Path(name)
        around = count(deployment, folder / f"{folder.name}-few", {**same, "model.hidden": 4})
        for number, (what, changes) in enumerate(ROWS.items()):
            run = count(deployment, folder / f"{folder.name}-{number}", {**same, "model.hidden": hidden, **changes})
            seen = payload(run, around, rate)
            counted = bool(changes.get("algorithm.codecs-down"))
            rows.append(
                {
                    "what": what,
                    "said up": run.said.up,
                    "for the checkpoint": run.kept,
                    "seen up": seen.up,
                    "said down": run.said.down if counted else None,
                    "seen down": seen.down,
                    "seconds": run.seconds,
                }
            )
            say(rows[-1])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In MB of one client; what a run does not say is –."""
    names = ("said up", "for the checkpoint", "seen up", "said down", "seen down")
    lines = ["| what travels | `bytes_sent` | once, for the checkpoint | on the wire, up | `bytes_received` | down |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        cells = ["–" if row[name] is None else f"{row[name] / 1e6:.2f}" for name in names]
        lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dir", type=Path, help="Folder of a deployment of three clients that is up.")
    parser.add_argument("--hidden", type=int, default=962, help="Of an mlp on digits: 962 are 998,566 parameters.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with deployed(options.dir) as deployment:
        rows = measured(deployment, options.hidden, options.rounds)
    (options.out / "wire.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / "wire.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
