"""A run under way: a resolved configuration becomes rounds with records, checkpoints and callbacks."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fedmom.config.build import make_plan, resolve_device
from fedmom.config.build import make_problem as build_problem
from fedmom.config.goals import of_rounds
from fedmom.config.keys import Config
from fedmom.config.load import flat, load, replace, to_toml, with_choices
from fedmom.config.resolve import Resolved, resolve
from fedmom.errors import ClientsFailedError, DivergedError, InputError
from fedmom.machine.files import write_text
from fedmom.records.environment import environment
from fedmom.records.files import CONFIG, ENVIRONMENT, write_fixed
from fedmom.records.folder import RunFolder
from fedmom.records.history import History, clients_of, cut_back
from fedmom.records.identity import identity_of
from fedmom.records.resume import resume_config
from fedmom.records.status import Heart, read_status
from fedmom.rounds.loop import Record, run_rounds
from fedmom.rounds.plan import Plan, RunState, beginning, own_after, round_job
from fedmom.rounds.round import Backend
from fedmom.runs.callbacks import Callback, Interrupts, Start, interrupts_held
from fedmom.runs.cautions import cautions
from fedmom.runs.result import Result
from fedmom.runs.stopping import Watchers, reason_of
from fedmom.tasks.problem import Problem
from fedmom.tasks.supervised import Supervised
from fedmom.user_code import blamed, one_line

MakeBackend = Callable[[Config, Problem, Plan], Backend]
MakeProblem = Callable[[Config], Problem]


class Opened(NamedTuple):
    """A run that may begin: what is asked, and where it goes on or will write."""

    resolved: Resolved
    folder: RunFolder | None  # of the run to go on with, locked
    out: Path | None  # where a new run is to have its folder


@contextlib.contextmanager
def opened(
    source: Any, changes: Mapping[str, Any], out: Path | None = None, resume: Path | None = None
) -> Iterator[Opened]:
    """A run's configuration, resolved once: of a new one, or of that in the folder `resume`, locked within the block.

    source: what `load` takes, or a Resolved. Raises InputError naming what is wrong, before any data are read.
    """
    if out is not None:
        RunFolder.check_new(out)
    folder = None if resume is None else RunFolder.open(resume)
    try:
        if resume is not None:
            resolved = resume_config(resume, source.config if isinstance(source, Resolved) else source, changes)
        else:
            resolved = source if isinstance(source, Resolved) else resolve(load(source, changes))
        config = replace(resolved.config, "run", out="", resume="")
        yield Opened(resolved._replace(config=config), folder, out)
    finally:
        if folder is not None:
            folder.close()


def execute(
    run: Opened, make_backend: MakeBackend, callbacks: Iterable[Callback] = (), make_problem: MakeProblem | None = None
) -> Result:
    """Do the rounds of a run on the backend that `make_backend` makes, and tell the callbacks.

    make_task: where the data are not here. Raises InputError for bad input; divergence, clients that failed and Ctrl-C
    are the Result's status, and leave a checkpoint in the folder.
    """
    config, folder, resumed, callbacks = run.resolved.config, run.folder, run.folder is not None, list(callbacks)
    here, backend = resolve_device(config), None
    try:
        with blamed(flat(config), but=_prepare.__code__):
            _prepare(callbacks, "reading the data")
            problem = make_problem(here) if make_problem else build_problem(here, here.engine.device)
            plan = make_plan(config, problem)._replace(compared=resumed)
            _prepare(callbacks, "choosing how to run")
            backend = make_backend(config, problem, plan)
        if run.out is not None:
            folder = RunFolder.create(run.out)
        config = with_choices(config, backend.settled)
        return _Run(config, problem, plan, backend, folder, run.resolved.notes, callbacks).go(resumed)
    except BaseException:
        for callback in callbacks:
            callback.on_error()
        raise
    finally:
        if backend is not None:
            backend.close()
        if run.out is not None and folder is not None:
            folder.close()


def _prepare(callbacks: Iterable[Callback], what: str) -> None:
    for callback in callbacks:
        callback.on_prepare(what)


class _Run:
    """One run under way."""

    def __init__(
        self,
        config: Config,
        problem: Problem,
        plan: Plan,
        backend: Backend,
        folder: RunFolder | None,
        overruled: tuple[str, ...],
        callbacks: list[Callback],
    ) -> None:
        self.config, self.problem, self.plan, self.backend = config, problem, plan, backend
        self.folder, self.callbacks = folder, callbacks
        self.warnings = [*overruled, *cautions(config, problem, plan)]
        self.notes = [*self.warnings, *backend.notes]
        self.identity = identity_of(config, problem)
        self.stamp = self.identity.stamp
        self.rounds = History(folder.path if folder else None)
        self.watchers = Watchers(config)
        self.heart: Heart | None = None

    def go(self, resumed: bool) -> Result:
        done = self._begin(resumed)
        try:
            return self._go(done, done.round if resumed else -1)
        except BaseException as error:
            self._tell_error(error)
            raise

    def _go(self, done: RunState, saved: int) -> Result:
        with Interrupts() as interrupts:
            status, message, done = self._to_the_end(done, saved, interrupts)
        return self._end(status, done, message)

    def _to_the_end(self, done: RunState, saved: int, interrupts: Interrupts) -> tuple[str, str, RunState]:
        """(how it ended, why, the last state), with the last checkpoint and final.safetensors written."""
        status, message = "done", ""
        try:
            message = self._tell_start(done)
            steps = iter(()) if message else self._steps(done)
            for new, record in steps:
                with interrupts_held():
                    if self.folder:
                        self.folder.append(record, new.results, new.results and clients_of(self.problem))
                    self.rounds.append(record)
                    done = new
                if self.heart:
                    self.heart.round = done.round
                done = self._keep_best(done, record)
                if self.folder and done.round % self.config.run.checkpoint_every == 0:
                    done = done.gathered()  # others may take long to bring it: Ctrl-C must get through
                    with interrupts_held():
                        self.folder.save(done, self.stamp)
                        saved = done.round
                if any(callback.wants_state for callback in self.callbacks):
                    done = done.gathered()
                if message := self._tell_round(record, done):
                    break  # a round that was begun meanwhile is let go
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

    def _keep_best(self, done: RunState, record: Record) -> RunState:
        """Before the checkpoint of this round: what a kill leaves between the two is written again."""
        if self.watchers.add(record) and self.folder and self.config.run.keep_best:
            done = done.gathered()
            self._save_best(done)
        return done

    def _save_best(self, done: RunState) -> None:
        if self.folder and self.watchers.best:
            with interrupts_held():
                self.folder.save_best(done, self.stamp, self.watchers.monitor, self.watchers.best.value)

    @staticmethod
    def _gathered(done: RunState, interrupts: Interrupts) -> RunState:
        if done.fetch is None:
            return done.gathered()
        with interrupts.waiting():
            return done.gathered()

    def _save(self, done: RunState) -> None:
        if self.folder and done.round > 0:
            self.folder.save(done, self.stamp)

    def _end(self, status: str, done: RunState, message: str) -> Result:
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

    def _begin(self, resumed: bool) -> RunState:
        done = beginning(self.problem, self.plan)
        if not self.folder:
            return done
        if resumed:
            before = read_status(self.folder.path)
            if before.status not in ("done", "running", "unfinished"):
                self.notes.append(f"it was {before.text}")
            own = partial(own_after, self.problem, self.plan)
            done, self.stamp = self.folder.load(self.identity, done, self.problem.device, own)
            # A finished run keeps what its last round measured; in a longer one that round is like any other.
            last, plan = done.round, self.plan
            lost = of_rounds(self.config, not plan.evaluates(last), not plan.looks_at_clients(last))
            self.rounds, recorded = cut_back(self.folder.path, last, lost)
            if recorded and not last:
                self.notes.append(f"there is no checkpoint: it starts again from round 1 ({recorded} lines dropped)")
            if self.rounds.last:
                done = done._replace(wall_seconds=float(self.rounds.last["wall_seconds"]))
            there = self.folder.best_round(self.watchers.monitor) if self.config.run.keep_best else 0
            if self.watchers.again(self.rounds, there) and self.config.run.keep_best:
                self._save_best(done)
        # Nothing of the folder is changed before all that may be refused has been looked at.
        self.heart = Heart(self.folder.path, done.round)
        try:
            # config.toml makes it a run folder: a kill before it leaves a free one, a kill after it nothing undone.
            if not (self.folder.path / ENVIRONMENT).exists() or not resumed:
                about = environment(self.problem.device.type)
                write_text(self.folder.path / ENVIRONMENT, json.dumps(about, indent=2) + "\n")
            write_text(self.folder.path / CONFIG, to_toml(self.config, "As resolved by fedmom: run it again as it is."))
            if isinstance(self.problem, Supervised):
                write_fixed(self.folder.path, *self.problem.beside(done.state))
        except BaseException as error:
            self._tell_error(error)
            raise
        return done

    def _tell_start(self, done: RunState) -> str:
        """Why the run may end before a round, or ""."""
        per_round = int(round_job(self.problem, self.plan, done).num_steps.sum())
        path = self.folder.path if self.folder else None
        notes, details = tuple(self.notes), tuple(self.backend.details)
        start = Start(self.config, path, done.round + 1, per_round, notes, details, self.rounds.settled())
        asked = [callback.on_start(start) for callback in self.callbacks]
        if not any(callback.takes_notes for callback in self.callbacks):
            for note in self.warnings:
                warnings.warn(note, stacklevel=4)
        return self._stopped(done, asked) if done.round else ""

    def _tell_round(self, record: Record, done: RunState) -> str:
        """Why the run ends after this round, or ""."""
        return self._stopped(done, [callback.on_round(record, done.state) for callback in self.callbacks])

    def _stopped(self, done: RunState, asked: Sequence[str | None]) -> str:
        reason = self.watchers.reason or reason_of(asked)
        over = done.round >= self.plan.num_rounds
        return f"stopped after round {done.round}: {reason}" if reason and not over else ""

    def _steps(self, done: RunState) -> Iterator[tuple[RunState, Record]]:
        """The rounds; what the user's own code raises in one, and any bad input that only shows there, names it."""
        steps, number = run_rounds(self.problem, self.plan, self.backend, done, self._on_steps), done.round
        while True:
            number += 1
            failed: ClientsFailedError | None = None
            try:
                with blamed(flat(self.config), but=_Run._on_steps.__code__):
                    try:
                        step = next(steps, None)
                    except ClientsFailedError as error:  # never the user's model, whatever it came through
                        failed = error
            except InputError as error:
                named = str(error) if str(error).startswith("round ") else f"round {number}: {error}"
                raise InputError(named) from error.__cause__
            if failed is not None:
                raise failed
            if step is None:
                return
            yield step

    def _on_steps(self, client_steps: int) -> None:
        for callback in self.callbacks:
            callback.on_steps(client_steps)

    def _result(self, status: str, done: RunState, message: str) -> Result:
        state = done.state
        path = self.folder.path if self.folder else None
        model = self.problem.state_dict(state)
        return Result(status, self.rounds.settled(), model, state.momentum, self.config, path, message)
