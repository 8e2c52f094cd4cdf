"""Where a run's records go besides its folder: TensorBoard, MLflow, Weights & Biases, or a tracker of your own."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fedmom.config.keys import Scalar
from fedmom.config.load import flat, to_toml
from fedmom.errors import InputError, require, unknown
from fedmom.machine.files import write_text
from fedmom.method.state import ClientState
from fedmom.records.files import CONFIG
from fedmom.rounds.loop import Record
from fedmom.runs.callbacks import Callback, Start
from fedmom.runs.result import Result
from fedmom.user_code import one_line

MEMORY = "tracking.json"  # in the run folder: under which ids trackers know the run, for a resume
# The names that TensorBoard's users know; the others keep their own.
TAGS = {
    "train_loss": "Loss/train",
    "test_loss": "Loss/test",
    "test_accuracy": "Accuracy/test",
    "mean_client_loss": "Loss/mean client",
    "worst_client_loss": "Loss/worst client",
    "mean_client_accuracy": "Accuracy/mean client",
    "worst_client_accuracy": "Accuracy/worst client",
    "lr": "Schedule/lr",
    "joint_epochs": "Schedule/joint epochs",
    "consensus_distance": "Spread/consensus distance",
    "momentum_spread": "Spread/momentum",
    "bytes_sent": "Cost/bytes sent",
    "bytes_received": "Cost/bytes received",
    "wall_seconds": "Cost/seconds",
    "client_steps_per_second": "Cost/client-steps per second",
}
_SECONDS_BETWEEN_REQUESTS = 1.0
_MOST_METRICS = 1000  # in one request to MLflow


def _tag(key: str) -> str:
    """Of a number that TAGS does not name: a task's measures beside its loss."""
    name = key.removeprefix("test_")
    return f"Other/{key}" if name == key else f"{name[0].upper()}{name[1:]}/test"


class Tracked(NamedTuple):
    """What a tracker learns at the start."""

    name: str
    settings: Mapping[str, Scalar]  # the resolved configuration, {"section.key": value}
    toml: str  # the same, as config.toml has it
    folder: Path | None
    first_round: int  # 1, or the first after a checkpoint


class Tracker(Protocol):
    """Somebody who wants to hear of a run. An error in `log` or `end` is reported, and never ends the run."""

    def start(self, run: Tracked) -> None:
        """Once, before the first round."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """After a round: the finite numbers of its line in rounds.jsonl, by its keys."""

    def end(self, status: str) -> None:
        """Once: "done", "interrupted", "diverged" or "failed"."""


def numbers_of(record: Record) -> dict[str, float]:
    found = {key: value for key, value in record.items() if type(value) in (int, float) and isfinite(value)}
    return {key: float(value) for key, value in found.items() if key != "round"}


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir runs`."""

    def __init__(self) -> None:
        require("tracker 'tensorboard'", "tensorboard", "tensorboard")

    def start(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if run.folder is None:
            raise InputError("tracker 'tensorboard': writes into the run folder; name one (out=…)")
        # What was logged after the checkpoint that a run resumes from is dropped by the reader.
        purge = run.first_round if run.first_round > 1 else None
        self.writer = SummaryWriter(str(run.folder), purge_step=purge, flush_secs=5)
        self.settings = run.settings
        if run.first_round == 1:
            self.writer.add_text("config", "\n".join(f"    {line}" for line in run.toml.splitlines()), 0)
        self.last: dict[str, float] = {}

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(TAGS.get(key, _tag(key)), value, step)
        self.last |= {key: numbers[key] for key in numbers if key == "loss" or key.startswith("test_")}

    def end(self, status: str) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value for key, value in self.settings.items() if not key.startswith(("server.", "simulation."))}
        metrics = {TAGS.get(key, f"Other/{key}"): value for key, value in self.last.items()}
        for summary in hparams(plain, metrics):
            assert self.writer.file_writer is not None
            self.writer.file_writer.add_summary(summary)
        self.writer.close()


class MLflow:
    """An MLflow run, where MLFLOW_TRACKING_URI says (experiment: MLFLOW_EXPERIMENT_NAME, else fedmom)."""

    def __init__(self) -> None:
        require("tracker 'mlflow'", "mlflow", "mlflow")

    def start(self, run: Tracked) -> None:
        import os

        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        try:
            self.client = MlflowClient()
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedmom")
            experiment = self.client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
            known = _recall(run, "mlflow")
            if known:
                self.run_id = known
                self.client.update_run(known, status="RUNNING")
            else:
                self.run_id = self.client.create_run(experiment_id, run_name=run.name).info.run_id
                _remember(run, "mlflow", self.run_id)
                parameters = [Param(key, str(value)) for key, value in run.settings.items()]
                for begin in range(0, len(parameters), 100):  # the most that one request may carry
                    self.client.log_batch(self.run_id, params=parameters[begin : begin + 100])
                self.client.log_text(self.run_id, run.toml, CONFIG)
        except MlflowException as error:
            raise InputError(f"tracker 'mlflow': {one_line(error)}") from None
        self.waiting: list[Any] = []
        self.sent = time.monotonic()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.waiting += [Metric(key, value, now, step) for key, value in numbers.items()]
        # A request a round would be slower than the rounds of small models.
        if time.monotonic() - self.sent > _SECONDS_BETWEEN_REQUESTS:
            self._send()

    def _send(self) -> None:
        while self.waiting:
            self.client.log_batch(self.run_id, metrics=self.waiting[:_MOST_METRICS])
            del self.waiting[:_MOST_METRICS]
        self.sent = time.monotonic()

    def end(self, status: str) -> None:
        self._send()
        ended = {"done": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
        self.client.set_tag(self.run_id, "fedmom.status", status)
        self.client.set_terminated(self.run_id, ended)


class WandB:
    """A Weights & Biases run, as WANDB_MODE, WANDB_PROJECT (else fedmom) and its other variables say."""

    def __init__(self) -> None:
        require("tracker 'wandb'", "wandb", "wandb")

    def start(self, run: Tracked) -> None:
        import os

        import wandb

        known = _recall(run, "wandb")
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fedmom"),
                name=run.name,
                config=dict(run.settings),
                dir=str(run.folder) if run.folder else None,
                id=known or None,
                resume="allow" if known else None,
                settings=wandb.Settings(silent=True, disable_git=True, console="off"),
            )
        except Exception as error:
            raise InputError(f"tracker 'wandb': {one_line(error)}") from None
        _remember(run, "wandb", self.run.id)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def end(self, status: str) -> None:
        self.run.summary["status"] = status
        self.run.finish(exit_code=0 if status == "done" else 1)


TRACKERS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


def make_trackers(names: Sequence[str]) -> list[Tracker]:
    """InputError for a name that is not known, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise unknown("--track", name, TRACKERS)
    return [TRACKERS[name]() for name in dict.fromkeys(names)]


class Tracking(Callback):
    """Tells trackers of a run: names of TRACKERS, or trackers of your own."""

    wants_state = takes_notes = False

    def __init__(self, trackers: Sequence[str | Tracker]) -> None:
        named = [one for one in trackers if isinstance(one, str)]
        self.trackers = [*make_trackers(named), *(one for one in trackers if not isinstance(one, str))]

    def on_start(self, start: Start) -> None:
        name = start.folder.resolve().name if start.folder else start.config.algorithm.name
        self.begin(Tracked(name, flat(start.config), to_toml(start.config), start.folder, start.first_round))

    def on_round(self, record: Record, state: ClientState) -> None:
        self.log(record)

    def on_end(self, result: Result) -> None:
        self.end(result.status)

    def on_error(self) -> None:
        self.end("failed")

    def begin(self, run: Tracked) -> None:
        for tracker in self.trackers:
            tracker.start(run)
        self.open = list(self.trackers)

    def log(self, record: Record) -> None:
        numbers = numbers_of(record)
        for tracker in list(self.open):
            self._try(tracker, partial(tracker.log, record["round"], numbers))

    def end(self, status: str) -> None:
        for tracker in list(getattr(self, "open", ())):
            self._try(tracker, partial(tracker.end, status))
        self.open = []

    def _try(self, tracker: Tracker, call: Callable[[], None]) -> None:
        """A tracker that fails is left out from then on: a server that is away must not cost a run."""
        try:
            call()
        except Exception as error:
            self.open.remove(tracker)
            name = type(tracker).__name__
            print(f"fedmom: {name} hears no more of this run: {one_line(error)}", file=sys.stderr)


def _recall(run: Tracked, tracker: str) -> str:
    """The id under which a tracker knows a run that goes on; "" for a new one."""
    if run.folder is None or run.first_round == 1:
        return ""
    try:
        return str(json.loads((run.folder / MEMORY).read_text(encoding="utf-8")).get(tracker, ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _remember(run: Tracked, tracker: str, known: str) -> None:
    if run.folder is None:
        return
    path = run.folder / MEMORY
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ids = {}
    write_text(path, json.dumps({**ids, tracker: known}) + "\n")
