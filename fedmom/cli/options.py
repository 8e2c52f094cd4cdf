"""What the commands that run something share: options, the default run folder, the last words, exit statuses."""

import contextlib
import itertools
import shlex
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.console import Console

from fedmom.errors import InputError

if TYPE_CHECKING:
    from fedmom.rounds.loop import Record

DONE, BAD_INPUT, DIVERGED, FAILED, INTERRUPTED = 0, 2, 3, 4, 130
# By how a run ended; "refused": its configuration was wrong, as whoever ran it found.
EXIT_STATUS = {"done": DONE, "refused": BAD_INPUT, "diverged": DIVERGED, "failed": FAILED, "interrupted": INTERRUPTED}

_CONFIG = typer.Argument(metavar="CONFIG", help="A TOML file, or one of fedmom's own by name: quickstart.")
NeededConfig = Annotated[Path, _CONFIG]
ConfigFile = Annotated[Path | None, _CONFIG]  # another option may take its place
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the configuration. May be repeated."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder. Default: runs/NAME-TIME.")]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", metavar="DIR", help="Resume the run in this folder. CONFIG may be left out."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print how fast every way of running was that could have been taken.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print the path of the run folder and nothing else.")]
Tracks = Annotated[
    list[str] | None,
    typer.Option(
        "--track", metavar="tensorboard|mlflow|wandb", help="Report every round to this tracker. May be repeated."
    ),
]
Device = Annotated[str | None, typer.Option("--device", metavar="cpu|cuda|auto", help="Override engine.device.")]
BackendName = Annotated[
    str | None,
    typer.Option("--backend", metavar="engine|simulation", help="Override run.backend: what runs the clients."),
]
FlowerApp = Annotated[
    Path | None,
    typer.Option("--app", metavar="DIR", help="Backend simulation: folder of the Flower app. Default: this folder."),
]
TensorBoardOption = Annotated[
    bool, typer.Option("--tensorboard", help="Write event files into the run folder, as --track tensorboard.")
]


def fresh_folder(config: Path) -> Path:
    """runs/NAME-TIME or, where that is taken, with a number: made here, so that no other command takes it too.

    It goes when the command ends and has left nothing in it.
    """
    name, runs = f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}", Path("runs")
    made = not runs.exists()
    for number in itertools.count(1):
        path = runs / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            if not runs.is_dir():
                raise InputError(f"{runs}: is a file; name another folder by --out") from None
        except OSError as error:
            why = f"{Path.cwd()}: no folder can be made here ({error.strerror})"
            raise InputError(f"{why}; name another one by --out") from None
    if context := click.get_current_context(silent=True):

        def tidy() -> None:
            with contextlib.suppress(OSError):  # it is in use
                path.rmdir()
                if made:
                    runs.rmdir()

        context.call_on_close(tidy)
    return path


def heed_signals() -> None:
    """SIGTERM and SIGHUP (the terminal was closed) end a command as Ctrl-C does; ignored ones (nohup) stay ignored."""
    from fedmom.runs.callbacks import STOPPING

    for number in STOPPING:
        if number != signal.SIGINT and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def show_run(folder: Path, rounds: Sequence["Record"], console: Console, *, quiet: bool) -> None:
    """Draw the curves, print the table, and say where everything is; `quiet`: only that."""
    from fedmom.results.report import finished, next_command

    width = console.width if console.is_terminal else None
    lines = finished(folder, rounds, width)
    # The page is an extra; where it is not installed, the run is looked at in the terminal.
    what = "fedmom report" if find_spec("plotly") and find_spec("jinja2") else "fedmom watch --once"
    follows = next_command(f"{what} {shlex.quote(str(folder))}", width)
    for line in lines[-1:] if quiet else [*lines, *follows]:
        console.print(line, soft_wrap=True, markup=False)


def exit_status(status: str, message: str, go_on: str = "") -> int:
    """Say why a run did not get to its end, and by which command it would go on; its exit status."""
    if status != "done":
        print(f"fedmom: {message}", file=sys.stderr)
        if go_on and status in ("interrupted", "failed"):
            print(f"fedmom: go on with: {go_on}", file=sys.stderr)
    return EXIT_STATUS[status]
