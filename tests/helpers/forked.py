"""A run in a process of its own that is forked of this one: another process, which need not import torch anew.

For what needs no autograd (the quadratic's gradients are a formula), as a backward pass goes wrong in a fork of a
process that has done one.
"""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import fedmom


class Stays(fedmom.Callback):
    """Sleeps after a round, until somebody kills the process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_round(self, record: dict, state: Any) -> None:
        if record["round"] == self.number:
            time.sleep(600)


def _run(config: str, out: str, number: int) -> None:
    fedmom.run(json.loads(config), out=out, callbacks=[Stays(number)])


def run_that_stays(config: dict, out: Path, number: int) -> multiprocessing.process.BaseProcess:
    """The run, begun in another process, which stays in round `number`."""
    child = multiprocessing.get_context("fork").Process(target=_run, args=(json.dumps(config), str(out), number))
    child.start()
    return child
