"""The command `fedmom`. Exit status: 0 done, 2 bad input (one line), 3 diverged, 4 clients failed, 130 interrupted."""

import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

from fedmom.cli import keys, results, show, supervise, sweep
from fedmom.cli.deploy import app as deploy_app
from fedmom.cli.first import commands as first
from fedmom.cli.options import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    BackendName,
    ConfigFile,
    Device,
    FlowerApp,
    Out,
    QuietOption,
    Resume,
    Sets,
    TensorBoardOption,
    Tracks,
    Verbose,
    exit_status,
    fresh_folder,
    heed_signals,
    show_run,
)
from fedmom.errors import ClientsFailedError, InputError
from fedmom.machine.files import at_home
from fedmom.machine.output import steady_output
from fedmom.user_code import memory_is_full, one_line

if TYPE_CHECKING:
    from fedmom.runs.callbacks import Callback


class Commands(TyperGroup):
    """Keeps Ctrl-C from ending the process in typer's own way."""

    def invoke(self, ctx: click.Context) -> int:
        try:
            return int(super().invoke(ctx) or DONE)
        except KeyboardInterrupt:
            raise click.Abort from None


def print_version(wanted: bool) -> None:
    """`fedmom --version`: fedmom's own; of the libraries a run's environment.json says."""
    if wanted:
        from importlib.metadata import version

        print(f"fedmom {version('fedmom')}")
        raise typer.Exit


app = typer.Typer(
    name="fedmom",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def fedmom(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Federated momentum SGD: N clients take I local momentum steps, then the model AND the momentum are averaged."""


app.add_typer(deploy_app)
app.command()(first.new)
app.command()(first.check)
app.command()(first.ls)


@app.command()
def run(
    config: ConfigFile = None,
    sets: Sets = None,
    out: Out = None,
    resume: Resume = None,
    device: Device = None,
    backend: BackendName = None,
    flower_app: FlowerApp = None,
    tensorboard: TensorBoardOption = False,
    track: Tracks = None,
    quiet: QuietOption = False,
    verbose: Verbose = False,
) -> int:
    """Run a configuration: train, record every round, draw the curves.

    CONFIG is a TOML file, or the name of one that comes with fedmom, and `fedmom keys` explains every key.

    fedmom run quickstart

    fedmom run quickstart --set algorithm.momentum-policy=reset --set run.num-rounds=50

    fedmom run quickstart --backend simulation

    fedmom run --resume runs/quickstart-20260101-120000 --set run.num-rounds=200

    The backend "engine" trains on this machine's device, "simulation" sends Flower's messages to Ray actors: the app
    that `flwr run` would deploy, with the same result.

    The run folder gets config.toml (resolved), environment.json, rounds.jsonl (a line per round), checkpoint and
    final.safetensors, curves.png, and status.json (how it is or ended). Ctrl-C, SIGTERM and a closed terminal leave a
    checkpoint; so does a kill, at most run.checkpoint-every rounds old.
    """
    from fedmom.experiments.run import run_folders
    from fedmom.records.files import CONFIG
    from fedmom.runs import progress
    from fedmom.runs.trackers import Tracking

    console = Console(highlight=False)
    changes = [*(sets or ()), *([f"run.backend={backend}"] if backend else [])]
    if config is not None and run_folders(config, changes, out, resume) == (None, None):
        out = fresh_folder(config)
    if _uses_ray(config, changes, resume):
        where = Path(next(filter(None, reversed(run_folders(config, changes, out, resume))), "."))
        supervise.stand_by(where / CONFIG, f"go on with: {_go_on(where)}")
    heed_signals()
    followers = progress.callbacks(console, quiet=quiet, verbose=verbose)
    if trackers := [*(track or ()), *(["tensorboard"] if tensorboard else [])]:
        followers.append(Tracking(trackers))
    how: Any = {"sets": changes, "out": out, "resume": resume, "device": device, "app": flower_app}
    return _train(followers, console, quiet, config, **how)


def _train(followers: Sequence["Callback"], console: Console, quiet: bool, *what: Any, **how: Any) -> int:
    """Run what is asked for, and say what came of it; the exit status."""
    from fedmom.config.strategies import OURS
    from fedmom.experiments.run import run as run_config
    from fedmom.runs.progress import Bar

    bars = [one for one in followers if isinstance(one, Bar)]
    for bar in bars:
        bar.on_prepare("starting")
    try:
        result = run_config(*what, callbacks=followers, **how)
    finally:
        for bar in bars:
            bar.on_error()  # the terminal in order, whoever raised
    assert result.folder is not None
    with contextlib.suppress(KeyboardInterrupt):  # once more: the picture is an extra, the last words are not
        show_run(result.folder, result.rounds, console, quiet=quiet)
    ours = result.config.server.strategy == OURS  # Flower's keep state that no checkpoint holds
    return exit_status(result.status, result.message, _go_on(result.folder) if ours else "")


def _go_on(folder: Path) -> str:
    return f"fedmom run --resume {shlex.quote(str(folder))}"


def _uses_ray(config: Path | None, sets: Sequence[str], resume: Path | None) -> bool:
    """Whether a run is about to start Ray; bad input is for the run to refuse."""
    from fedmom.config.load import load
    from fedmom.records.files import CONFIG

    try:
        keys = load(config or ({} if resume is None else resume / CONFIG), sets).config
    except (InputError, OSError):
        return False
    return keys.run.backend == "simulation" or keys.engine.workers > 0


@app.command(name="simulate-app")
def simulate_flower_app(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of any Flower app (with pyproject.toml).")],
    num_clients: Annotated[int, typer.Option("--num-clients", metavar="N", min=1, help="Nodes, with one client each.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the app's run config.")
    ] = None,
    num_actors: Annotated[int, typer.Option(metavar="A", min=0, help="Number of Ray actors; 0: as many as fit.")] = 0,
    num_cpus: Annotated[float, typer.Option(metavar="C", min=0, help="CPU cores per actor.")] = 1.0,
    num_gpus: Annotated[float, typer.Option(metavar="G", min=0, help="GPUs per actor, or a fraction.")] = 0.0,
    ray_address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address of a Ray cluster to join.")] = "",
    retries: Annotated[int, typer.Option(min=0, help="How often a message is sent again after its actor died.")] = 2,
    straggler_seconds: Annotated[float, typer.Option(min=0, help="Replace an actor that takes longer; 0: never.")] = 0,
    output: Annotated[bool, typer.Option("--show-output", help="Print what the clients print and log.")] = False,
) -> int:
    """Simulate any Flower app, unchanged, on resident Ray actors.

    fedmom simulate-app path/to/app --num-clients 1000 --num-actors 4 --set num-server-rounds=10

    Apps of Flower's message API run as under `flwr run`, but a message costs about a millisecond, an actor that
    dies is replaced and its message tried again, and a client that fails is an error reply that the app sees.
    """
    from fedmom.actors.cluster import PoolOptions
    from fedmom.config.load import parse_sets
    from fedmom.config.numbers import counted
    from fedmom.flower.app import simulate_app
    from fedmom.runs.progress import Replies, show_output

    console = Console(highlight=False, stderr=True)
    options = PoolOptions(num_actors, num_cpus, num_gpus, ray_address, retries, straggler_seconds)
    supervise.stand_by(None, "")
    heed_signals()
    begin = time.monotonic()
    with Replies(console) as replies:
        simulate_app(
            folder,
            num_nodes=num_clients,
            run_config=parse_sets(sets or ()),
            options=options,
            on_reply=replies.count,
            on_output=partial(show_output, console) if output else None,
        )
    seconds = time.monotonic() - begin
    told = f"{counted(replies.number, 'reply', 'replies')} of {counted(num_clients, 'client')}{replies.failed()}"
    console.print(f"{folder}: done in {seconds:.1f} s, {told}", soft_wrap=True, markup=False)
    return DONE


app.command()(show.partition)


app.command()(sweep.sweep)


for command in (
    show.bench,
    show.topology,
    results.compare,
    results.report,
    results.clients,
    results.watch,
    show.datasets,
    show.models,
    show.algorithms,
    keys.keys,
):
    app.command()(command)


def call(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status; a user's mistake costs one line on standard error."""
    with steady_output():
        return _call(sys.argv[1:] if arguments is None else arguments)


def _at_home(word: str) -> str:
    """A shell expands ~/x, but not --out=~/x."""
    option, equals, value = word.partition("=")
    if not equals or not option.startswith("--"):
        option, equals, value = "", "", word
    return option + equals + (str(at_home(value)) if value.startswith("~") else value)


def _call(words: Sequence[str]) -> int:
    try:
        return int(app(args=[_at_home(word) for word in words], standalone_mode=False) or DONE)
    except InputError as error:
        return _complain(str(error), BAD_INPUT)
    except ClientsFailedError as error:  # in an app that keeps no run folder
        return _complain(str(error), FAILED)
    except click.NoSuchOption as error:
        return _complain(keys.no_such_option(error, words), BAD_INPUT)
    except click.ClickException as error:
        return _complain(error.format_message(), BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        return _complain("interrupted", INTERRUPTED)
    except OSError as error:  # a name too long, a folder that may not be read
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error), BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        if not memory_is_full(error):
            raise
        advice = "lower data.batch-size, engine.chunk-size or data.num-clients"
        return _complain(f"the memory is full: {advice} ({one_line(error)})", BAD_INPUT)


def _complain(message: str, status: int) -> int:
    """One line on standard error; none where click has already shown its help."""
    if message:
        print(f"fedmom: {' '.join(message.split())}", file=sys.stderr)
    return status
