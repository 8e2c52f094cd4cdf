"""`fedmom.run`: a configuration becomes a run with records, checkpoints and callbacks."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmom.config.build import make_engine, make_plan, make_task, resolve_device
from fedmom.config.keys import Config, flat, load, parse_sets, replace, to_toml
from fedmom.config.resolve import resolve
from fedmom.errors import ClientsFailedError, DivergedError, InputError
from fedmom.machine.files import at_home, write_text
from fedmom.method.algorithms import MOMENTUM_POLICIES
from fedmom.method.state import num_bytes
from fedmom.records.environment import environment
from fedmom.records.files import CONFIG, ENVIRONMENT
from fedmom.records.folder import RunFolder
from fedmom.records.history import History, cut_back
from fedmom.records.identity import identity_of
from fedmom.records.resume import resume_config
from fedmom.records.status import Heart, read_status
from fedmom.rounds.loop import CLIENT_MEASURES, Plan, Progressed, Record, beginning, round_job, run_rounds
from fedmom.rounds.round import Rounds
from fedmom.runs.callbacks import Callback as Callback
from fedmom.runs.callbacks import Interrupts, heard, interrupts_held
from fedmom.runs.callbacks import Result as Result
from fedmom.runs.callbacks import Start as Start
from fedmom.runs.callbacks import is_heard as is_heard
from fedmom.runs.callbacks import listening as listening
from fedmom.tasks.classification import Task
from fedmom.user_code import blamed, one_line

# (configuration, task, plan) -> the configuration with what was chosen, who runs the rounds, and notes
MakeRounds = Callable[[Config, Task, Plan], tuple[Config, Rounds, list[str]]]


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
    config = at_home(config) if isinstance(config, str | Path) else config
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
        RunFolder.check_new(out)  # before the data are read and the engine is timed
    try:
        if resume is not None:
            folder = RunFolder.open(resume)
            settled, notes = resume_config(resume, config, changes)
        else:
            settled, notes = resolve(load({} if config is None else config, changes))
        settled = replace(settled, "run", out="", resume="")
        _check_backend(settled, rounds)
        if settled.run.backend == "simulation" and rounds is None:
            if folder is not None:
                folder.close()
            from fedmom.experiments.simulation import simulate  # which needs this module

            return simulate(settled, out=out, resume=resume, callbacks=callbacks, app=app)
        listener = heard()
        callbacks = list(callbacks) or (listener.callbacks if listener else [])
        here = resolve_device(settled)
        with blamed(flat(settled)):
            objectives = task(here) if task else make_task(here, here.engine.device)
            plan = make_plan(settled)._replace(compared=resume is not None)
            # Under Flower every node resolves "auto" for itself, and a resumed run must leave it to them again.
            settled = settled if rounds else here
            make = rounds or local_rounds
            settled, engine, chosen = make(settled, objectives, plan)
        try:
            if out is not None:
                folder = RunFolder.create(out)
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
) -> tuple[Path | None, Path | None]:
    """(folder to write, folder to resume): as given, else as the keys run.out and run.resume say, else None."""
    for name, folder in (("out", out), ("resume", resume)):
        empty = folder is not None and str(folder) in ("", "." if name == "out" else "")  # Path("") is Path(".")
        if empty or not isinstance(folder, str | Path | None):
            raise InputError(f"--{name} {str(folder)!r}: must name a folder of the run's own")
    keys = load({} if config is None else config, sets).config.run
    out, resume = out or keys.out, resume or keys.resume
    return at_home(out) if out else None, at_home(resume) if resume else None


def local_rounds(config: Config, task: Task, plan: Plan) -> tuple[Config, Rounds, list[str]]:
    """The engine of this process, or `engine.workers` Ray actors; the configuration with what they chose; notes."""
    if not config.engine.workers:
        return make_engine(config, task, plan)
    if plan.topology is not None:
        from fedmom.backends.peers import make_peer_rounds  # which needs Ray

        return make_peer_rounds(config, task, plan)
    from fedmom.backends.workers import make_worker_rounds  # which needs Ray, if not at once

    return make_worker_rounds(config, task, plan)


def check_place(config: Config, *, here: bool) -> None:
    """InputError unless a run of this (settled) configuration can be made: its backend and, if here, its device."""
    _check_backend(config, None)
    if here and config.run.backend == "engine":
        resolve_device(config)


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
        self.identity = identity_of(config, task)
        self.stamp = self.identity.stamp
        self.rounds = History(folder.path if folder else None)
        self.heart: Heart | None = None

    def go(self, resumed: bool) -> Result:
        done = self._begin(resumed)
        try:
            return self._go(done, done.round if resumed else -1)
        except BaseException as error:
            self._tell_error(error)
            raise

    def _go(self, done: Progressed, saved: int) -> Result:
        with Interrupts() as interrupts:
            status, message, done = self._to_the_end(done, saved, interrupts)
        return self._end(status, done, message)

    def _to_the_end(self, done: Progressed, saved: int, interrupts: Interrupts) -> tuple[str, str, Progressed]:
        """(how it ended, why, the last state), with the last checkpoint and final.safetensors written."""
        status, message = "done", ""
        try:
            self._tell_start(done)
            for new, record in self._steps(done):
                with interrupts_held():
                    if self.folder:
                        self.folder.append(record)
                    self.rounds.append(record)
                    done = new
                if self.heart:
                    self.heart.round = done.round
                if self.folder and done.round % self.config.run.checkpoint_every == 0:
                    done = done.gathered()  # others may take long to bring it: Ctrl-C must get through
                    with interrupts_held():
                        self.folder.save(done, self.stamp)
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
            interrupts.holding = True
            status, message = "interrupted", f"interrupted after round {done.round}"
        except BaseException:  # a callback's error, a full disk: what is done stays done
            interrupts.holding = True
            if saved != done.round:
                with contextlib.suppress(InputError, ClientsFailedError, KeyboardInterrupt):
                    done = self._gathered(done, interrupts)
                    self._save(done)
            raise
        interrupts.holding = True
        try:
            done = self._gathered(done, interrupts)
        except ClientsFailedError as error:  # whoever held the rows is gone: the last checkpoint is what there is
            return "failed", message or str(error), done
        except KeyboardInterrupt:  # they do not come, and nobody wants to wait
            return "interrupted", f"interrupted after round {done.round}", done
        if saved != done.round:
            self._save(done)
        if self.folder and status == "done":
            self.folder.save_final(done, self.stamp)
        return status, message, done

    @staticmethod
    def _gathered(done: Progressed, interrupts: Interrupts) -> Progressed:
        if done.fetch is None:
            return done
        with interrupts.waiting():
            return done.gathered()

    def _save(self, done: Progressed) -> None:
        if self.folder and done.round > 0:
            self.folder.save(done, self.stamp)

    def _end(self, status: str, done: Progressed, message: str) -> Result:
        self._tell_folder(status, message)
        result = self._result(status, done, message)
        for callback in self.callbacks:
            callback.on_end(result)
        return result

    def _tell_error(self, error: BaseException) -> None:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self._tell_folder(status, str(error) if isinstance(error, InputError) else one_line(error))

    def _tell_folder(self, status: str, message: str) -> None:
        if self.heart:
            self.heart.end(status, message)

    def _begin(self, resumed: bool) -> Progressed:
        done = beginning(self.task, self.plan)
        if not self.folder:
            return done
        if resumed:
            before = read_status(self.folder.path)
            if before.status not in ("done", "running", "unfinished"):
                self.notes.append(f"it was {before.text}")
            done, self.stamp = self.folder.load(self.identity, done, self.task.device)
            # A finished run keeps its last round's evaluation; in a longer one that round is like any other.
            every = self.config.run.eval_every if done.round < self.plan.num_rounds else 1
            self.rounds, recorded = cut_back(
                self.folder.path, done.round, every, (*self.task.measures, *CLIENT_MEASURES)
            )
            if recorded and not done.round:
                self.notes.append(f"there is no checkpoint: it starts again from round 1 ({recorded} lines dropped)")
            if self.rounds.last:
                done = done._replace(wall_seconds=float(self.rounds.last["wall_seconds"]))
        # Nothing of the folder is changed before all that may be refused has been looked at.
        self.heart = Heart(self.folder.path, done.round)
        try:
            # config.toml makes it a run folder: a kill before it leaves a free one, a kill after it nothing undone.
            if not (self.folder.path / ENVIRONMENT).exists() or not resumed:
                about = environment(self.task.device.type)
                write_text(self.folder.path / ENVIRONMENT, json.dumps(about, indent=2) + "\n")
            write_text(self.folder.path / CONFIG, to_toml(self.config, "As resolved by fedmom: run it again as it is."))
        except BaseException as error:
            self._tell_error(error)
            raise
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

    def _steps(self, done: Progressed) -> Iterator[tuple[Progressed, Record]]:
        """The rounds; what the user's own code raises in one, and any bad input that only shows there, names it."""
        steps, number = run_rounds(self.task, self.plan, self.engine, done, self._on_steps), done.round
        while True:
            number += 1
            try:
                with blamed(flat(self.config), but=_Run._on_steps.__code__):
                    step = next(steps, None)
            except InputError as error:
                named = str(error) if str(error).startswith("round ") else f"round {number}: {error}"
                raise InputError(named) from error.__cause__
            if step is None:
                return
            yield step

    def _on_steps(self, client_steps: int) -> None:
        for callback in self.callbacks:
            callback.on_steps(client_steps)

    def _result(self, status: str, done: Progressed, message: str) -> Result:
        state = done.state
        path = self.folder.path if self.folder else None
        model = self.task.state_dict(state)
        return Result(status, self.rounds.settled(), model, state.momentum, self.config, path, message)


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
