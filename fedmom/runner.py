"""`fedmom.run`: a configuration becomes a run with records, checkpoints and callbacks."""

import contextlib
import json
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from fedmom.algorithms import MOMENTUM_POLICIES
from fedmom.config import Config, load, parse_sets, replace, to_toml
from fedmom.errors import ClientsFailedError, DivergedError, InputError
from fedmom.objective import Classification, Task
from fedmom.records import CONFIG, ENVIRONMENT, RunFolder, environment, read_rounds, write_text
from fedmom.resolve import resolve, resume_config, run_identity
from fedmom.rounds import Rounds
from fedmom.setup import make_engine, make_plan, make_task, resolve_device
from fedmom.state import ClientState, Tree, num_bytes
from fedmom.train import CLIENT_MEASURES, Plan, Progressed, Record, beginning, round_job, run_rounds


class Start(NamedTuple):
    """What a callback learns before the first round."""

    config: Config  # resolved
    folder: Path | None
    first_round: int  # 1, or the first after a checkpoint
    client_steps: int  # per round, of all clients together
    notes: tuple[str, ...]  # what was overruled, chosen or should be known


class Callback:
    """What happens along a run; override what you need."""

    # Whether `on_round` looks at the state. Where clients hold the rows (Algorithm 2 on Ray), it must be brought here.
    wants_state = True

    def on_start(self, start: Start) -> None:
        """Once, before the first round."""

    def on_steps(self, client_steps: int) -> None:
        """Within a round: so many more client-steps are done."""

    def on_round(self, record: Record, state: ClientState) -> None:
        """After every round: its line of rounds.jsonl, and x̂, û and the buffers."""

    def on_output(self, node: int, text: str) -> None:
        """In another thread: what the client of a simulated node printed or logged (simulation.show-output)."""

    def on_end(self, result: "Result") -> None:
        """Once, after the last round, an interruption, divergence or clients that failed."""

    def on_error(self) -> None:
        """Once, instead of on_end, when something else ended the run (a full disk): put the terminal in order."""


class Result(NamedTuple):
    """What a run came to."""

    status: str  # "done", "interrupted", "diverged" or "failed" (clients did not answer)
    rounds: list[Record]  # the lines of rounds.jsonl
    state_dict: Tree  # of the mean model, as model.load_state_dict takes it
    momentum: Tree  # û
    config: Config  # resolved
    folder: Path | None
    message: str = ""  # what went wrong, in one line


# (configuration, task, plan) -> the configuration with what was chosen, who runs the rounds, and notes
MakeRounds = Callable[[Config, Task, Plan], tuple[Config, Rounds, list[str]]]


@dataclass
class Listener:
    """Who hears of a run that a Flower ServerApp makes in this process."""

    callbacks: list[Callback]
    result: Result | None = None


_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(callbacks: Iterable[Callback]) -> Iterator[Listener]:
    """Within the block a run without callbacks of its own has these, and leaves its Result in the listener."""
    listener = Listener(list(callbacks))
    token = _LISTENER.set(listener)
    try:
        yield listener
    finally:
        _LISTENER.reset(token)


def is_heard() -> bool:
    """Whether somebody in this process listens to the run that is about to begin."""
    return _LISTENER.get() is not None


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM within the block take effect after it: a round's record and state stay together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: held.append((number, frame))) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            handler = before[signal.Signals(held[0][0])]
            if callable(handler):
                handler(*held[0])
            elif handler == signal.SIG_DFL:
                signal.raise_signal(held[0][0])


def run(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    sets: Iterable[str] | Mapping[str, Any] = (),
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: str | None = None,
    callbacks: Iterable[Callback] = (),
    app: str | Path | None = None,
    rounds: MakeRounds | None = None,
    task: Callable[[Config], Task] | None = None,
) -> Result:
    """Run Algorithm 1 or 2 as `config` says: a TOML file, a mapping ({"algorithm": {"lr": 0.1}}) or a Config.

    `sets` changes keys ({"algorithm.lr": 0.1} or ["algorithm.lr=0.1"]), `out` names a run folder to write (None:
    nothing is written), `resume` a run folder to go on with (`config` may then be left out).
    With run.backend = "simulation" the Flower app in the folder `app` (default: here) runs on Ray actors; a ServerApp
    gives `rounds`, by which its rounds are run, and `task`, where the data are not here.
    Raises InputError for bad input. Divergence, clients that failed and Ctrl-C are a Result's status, and leave a
    checkpoint in the folder.
    """
    changes = parse_sets([sets] if isinstance(sets, str) else sets)
    if device is not None:
        changes["engine.device"] = device
    out, resume = run_folders(config, changes, out, resume)
    if resume is not None and out is not None:
        raise InputError(f"--out {out}: goes with a new run; --resume {resume} writes into its own folder")
    if resume is None and config is None:
        raise InputError("CONFIG is missing: name a TOML file (configs/ has examples), or --resume DIR")
    folder = None
    if out is not None:
        RunFolder.check_new(Path(out))  # before the data are read and the engine is timed
    try:
        if resume is not None:
            folder = RunFolder.open(Path(resume))
            settled, notes = resume_config(Path(resume), config, changes)
        else:
            settled, notes = resolve(load({} if config is None else config, changes))
        settled = replace(settled, "run", out="", resume="")
        _check_backend(settled, rounds)
        if settled.run.backend == "simulation" and rounds is None:
            if folder is not None:
                folder.close()
            from fedmom.simulation import simulate  # which needs this module

            return simulate(settled, out=out, resume=resume, callbacks=callbacks, app=app)
        listener = _LISTENER.get()
        callbacks = list(callbacks) or (listener.callbacks if listener else [])
        here = resolve_device(settled)
        objectives = task(here) if task else make_task(here, here.engine.device)
        plan = make_plan(settled)._replace(compared=resume is not None)
        # Under Flower every node resolves "auto" for itself, and a resumed run must leave it to them again.
        settled = settled if rounds else here
        make = rounds or local_rounds
        settled, engine, chosen = make(settled, objectives, plan)
        try:
            if out is not None:
                folder = RunFolder.create(Path(out))
            under_way = _Run(settled, objectives, plan, engine, folder, notes, chosen, callbacks)
            result = under_way.go(resume is not None)
            if listener:
                listener.result = result
            return result
        except BaseException:
            for callback in callbacks:
                callback.on_error()
            raise
        finally:
            if hasattr(engine, "close"):
                engine.close()
    finally:
        if folder is not None:
            folder.close()


def run_folders(
    config: str | Path | Mapping[str, Any] | Config | None,
    sets: Iterable[str] | Mapping[str, Any],
    out: str | Path | None,
    resume: str | Path | None,
) -> tuple[str | Path | None, str | Path | None]:
    """(folder to write, folder to resume): as given, else as the keys run.out and run.resume say, else None."""
    keys = load({} if config is None else config, sets).config.run
    return out or keys.out or None, resume or keys.resume or None


def local_rounds(config: Config, task: Task, plan: Plan) -> tuple[Config, Rounds, list[str]]:
    """The engine of this process, or `engine.workers` Ray actors; the configuration with what they chose; notes."""
    if not config.engine.workers:
        return make_engine(config, task, plan)
    if plan.topology is not None:
        from fedmom.peers import make_peer_rounds  # which needs Ray

        return make_peer_rounds(config, task, plan)
    from fedmom.workers import make_worker_rounds  # which needs Ray, if not at once

    return make_worker_rounds(config, task, plan)


def _check_backend(config: Config, rounds: MakeRounds | None) -> None:
    backend, strategy = config.run.backend, config.server.strategy
    if backend == "flower" and rounds is None:
        raise InputError("run.backend = 'flower': start it with `flwr run`; here it is engine or simulation")
    if backend == "engine" and strategy != "pr-sgd-m":
        raise InputError(
            f"server.strategy = {strategy!r}: is Flower's; it needs run.backend = 'simulation' or `flwr run`"
        )


class _Run:
    """One run under way."""

    def __init__(
        self,
        config: Config,
        task: Task,
        plan: Plan,
        engine: Rounds,
        folder: RunFolder | None,
        overruled: tuple[str, ...],
        chosen: list[str],
        callbacks: list[Callback],
    ) -> None:
        self.config, self.task, self.plan, self.engine = config, task, plan, engine
        self.folder, self.callbacks = folder, callbacks
        self.warnings = [*overruled, *_warnings(config, task, plan)]
        self.notes = [*self.warnings, *chosen]
        self.run_id = run_identity(config, _known_of_data(config, task))
        self.rounds: list[Record] = []

    def go(self, resumed: bool) -> Result:
        done = self._begin(resumed)
        saved = done.round if resumed else -1
        status, message = "done", ""
        try:
            self._tell_start(done)
            for new, record in run_rounds(self.task, self.plan, self.engine, done, self._on_steps):
                with interrupts_held():
                    if self.folder:
                        self.folder.append(record)
                    self.rounds.append(record)
                    done = new
                if self.folder and done.round % self.config.run.checkpoint_every == 0:
                    done = done.gathered()  # others may take long to bring it: Ctrl-C must get through
                    with interrupts_held():
                        self.folder.save(done, self.run_id)
                        saved = done.round
                if any(callback.wants_state for callback in self.callbacks):
                    done = done.gathered()
                for callback in self.callbacks:
                    callback.on_round(record, done.state)
        except DivergedError as error:
            status, message = "diverged", str(error)
        except ClientsFailedError as error:
            status, message = "failed", str(error)
        except KeyboardInterrupt:
            status, message = "interrupted", f"interrupted after round {done.round}"
        except BaseException:  # a callback's error, a closed pipe, a full disk: what is done stays done
            if self.folder and saved != done.round and done.round > 0:
                with contextlib.suppress(InputError, ClientsFailedError):
                    done = done.gathered()
                    with interrupts_held():
                        self.folder.save(done, self.run_id)
            raise
        try:
            done = done.gathered()
        except ClientsFailedError as error:  # whoever held the rows is gone: the last checkpoint is what there is
            status, message, saved = "failed", message or str(error), done.round
        except KeyboardInterrupt:  # they do not come, and nobody wants to wait
            status, message, saved = "interrupted", f"interrupted after round {done.round}", done.round
        with interrupts_held():
            if self.folder and saved != done.round and done.round > 0:
                self.folder.save(done, self.run_id)
            if self.folder and status == "done":
                self.folder.save_final(done, self.run_id)
        return self._end(status, done, message)

    def _end(self, status: str, done: Progressed, message: str) -> Result:
        result = self._result(status, done, message)
        for callback in self.callbacks:
            callback.on_end(result)
        return result

    def _begin(self, resumed: bool) -> Progressed:
        done = beginning(self.task, self.plan)
        if not self.folder:
            return done
        if resumed:
            done = self.folder.load(self.run_id, done, self.task.device)
            recorded = len(read_rounds(self.folder.path))
            # A finished run keeps its last round's evaluation; in a longer one that round is like any other.
            every = self.config.run.eval_every if done.round < self.plan.num_rounds else 1
            self.rounds = self.folder.rewind(done.round, every, (*self.task.measures, *CLIENT_MEASURES))
            if recorded and not done.round:
                self.notes.append(f"there is no checkpoint: it starts again from round 1 ({recorded} lines dropped)")
            if self.rounds:
                done = done._replace(wall_seconds=float(self.rounds[-1]["wall_seconds"]))
        write_text(self.folder.path / CONFIG, to_toml(self.config, "As resolved by fedmom: run it again as it is."))
        if not resumed:
            about = environment(self.task.device.type)
            write_text(self.folder.path / ENVIRONMENT, json.dumps(about, indent=2) + "\n")
        return done

    def _tell_start(self, done: Progressed) -> None:
        per_round = int(round_job(self.task, self.plan, done).num_steps.sum())
        path = self.folder.path if self.folder else None
        start = Start(self.config, path, done.round + 1, per_round, tuple(self.notes))
        for callback in self.callbacks:
            callback.on_start(start)
        if not self.callbacks:
            for note in self.warnings:
                warnings.warn(note, stacklevel=4)

    def _on_steps(self, client_steps: int) -> None:
        for callback in self.callbacks:
            callback.on_steps(client_steps)

    def _result(self, status: str, done: Progressed, message: str) -> Result:
        state = done.state
        path = self.folder.path if self.folder else None
        model = self.task.state_dict(state)
        return Result(status, self.rounds, model, state.momentum, self.config, path, message)


def _known_of_data(config: Config, task: Task) -> dict[str, Any]:
    """What a resumed run must find again where every client brings its own data: sizes, and the images' sums."""
    if config.data.dataset != "local" or not isinstance(task, Classification):
        return {}
    return {"sizes": task.sizes.tolist(), "mean": task.dataset.mean, "std": task.dataset.std}


def _warnings(config: Config, task: Task, plan: Plan) -> list[str]:
    """What a user should know before a run: memory that grows with N, a mean that is not the paper's."""
    notes = list(plan.topology.warnings) if plan.topology else []
    policy = config.algorithm.momentum_policy
    if plan.topology is not None:
        size = len(task.sizes) * sum(map(num_bytes, task.start())) / 1e6
        if size > 1000:
            notes.append(
                f"d-sgd-m keeps x and u of all {len(task.sizes)} clients: {size:,.0f} MB, three times in a round"
            )
    elif MOMENTUM_POLICIES[policy].keeps_rows:
        size = len(task.sizes) * num_bytes(task.start().momentum) / 1e6
        notes.append(
            f"momentum-policy {policy!r} keeps u of all {len(task.sizes)} clients: {size:,.1f} MB, "
            "and several times that while a round is under way"
        )
    if plan.local_epochs and len(set(plan.steps_of(task.sizes).tolist())) > 1:
        notes.append("local-epochs gives clients unequal steps: the mean is not the paper's (num-local-steps is)")
    return notes
