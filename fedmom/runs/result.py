"""What a run came to, as Python has it: of one that has just ended, or of a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmom.config.keys import Config
from fedmom.config.load import load as load_config
from fedmom.errors import InputError
from fedmom.machine.files import at_home
from fedmom.method.state import ClientState, Tree, unflatten
from fedmom.records.files import BEST, CHECKPOINT, CONFIG, FINAL, read_tensors, whole_model
from fedmom.records.history import ClientHistory, read_clients, read_rounds
from fedmom.records.status import read_status
from fedmom.results.notebook import Table, run_figure, run_html, run_table, said_of
from fedmom.rounds.loop import Record


class Result(NamedTuple):
    """What a run came to; a notebook shows it with its curves."""

    status: str  # "done", "interrupted", "diverged" or "failed" (clients did not answer); of a folder see fedmom.Status
    rounds: Sequence[Record]  # the lines of rounds.jsonl; of a run of many thousands read from there
    state_dict: Tree  # of the mean model, as model.load_state_dict takes it
    momentum: Tree  # û
    config: Config  # resolved
    folder: Path | None
    message: str = ""  # what went wrong, or why it stopped early, in one line

    @property
    def clients(self) -> ClientHistory | None:
        """What every single client got, where run.client-eval-every asked for it: read from the run folder now.

        None where there is no folder, or no clients.jsonl in it. Raises InputError where that file is none of ours.
        """
        return None if self.folder is None else read_clients(self.folder)

    def table(self) -> Table:
        """Where it ended, as text that a notebook shows as a table. Raises InputError where it has no round."""
        return run_table(self)

    def plot(self, *, clients: bool = False) -> Any:
        """A matplotlib Figure of loss and accuracy over the rounds. Raises InputError where there is no round.

        clients: how the clients' own results are spread instead; InputError where no round looked at them.
        """
        return run_figure(self, clients=clients)

    def __repr__(self) -> str:
        return f"<Result: {said_of(self)}>"

    def _repr_html_(self) -> str:
        return run_html(self)


def load(folder: str | Path, *, best: bool = False) -> Result:
    """The Result of a run folder, finished or not: its status says which (see fedmom.Status).

    Model and momentum are those of the last round that was kept; with `best` those of best.safetensors, which
    run.keep-best asks for. Raises InputError for what is no run folder; a configuration is read by fedmom.load_config.
    """
    if not isinstance(folder, str | Path):
        raise InputError("fedmom.load reads a run folder; a configuration is read by fedmom.load_config")
    path = at_home(folder)
    if path.is_file() or path.suffix == ".toml":
        raise InputError(f"{path}: is no run folder; a configuration is read by fedmom.load_config")
    if not (path / CONFIG).is_file():
        inside = path.is_dir() and any(path.glob(f"*/{CONFIG}"))
        advice = "fedmom.compare takes the folder of a sweep" if inside else f"it has no {CONFIG}"
        raise InputError(f"{path}: is no run folder ({advice})")
    config, status = load_config(path / CONFIG).config, read_status(path)
    state = _state(path, [BEST] if best else [FINAL, CHECKPOINT], needed=best)
    model = whole_model(path, {**state.params, **state.buffers})
    return Result(status.status, read_rounds(path), model, state.momentum, config, path, status.reason)


def _state(folder: Path, names: Sequence[str], *, needed: bool) -> ClientState:
    """The newest of these files that are there; empty where none is, unless one is needed."""
    found = [read_tensors(folder / name) for name in names if needed or (folder / name).is_file()]
    if not found:
        return ClientState({}, {}, {})
    tensors, _ = max(found, key=lambda pair: int(pair[1]["round"]))
    return unflatten({name: value for name, value in tensors.items() if name.partition("/")[0] in ClientState._fields})
