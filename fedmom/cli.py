"""The command `fedmom`. Exit status: 0 done, 2 bad input (one line), 3 diverged, 4 clients failed, 130 interrupted."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import click
import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from typer.core import TyperGroup

from fedmom import pictures, results_cli, supervise, tables
from fedmom.bench import as_rows, bench
from fedmom.config import KEYS, load, parse_sets, replace, toml_scalar
from fedmom.datasets import DATASETS, download
from fedmom.deploy.cli import app as deploy_app
from fedmom.errors import ClientsFailedError, InputError
from fedmom.executors import PoolOptions
from fedmom.flower_app import simulate_app
from fedmom.imports import one_line
from fedmom.models import MODELS
from fedmom.parsing import counted
from fedmom.progress import Replies, callbacks, show_output
from fedmom.records import CONFIG
from fedmom.report import draw_or_say_why
from fedmom.resolve import resolve
from fedmom.runner import run as run_config
from fedmom.runner import run_folders
from fedmom.setup import load_task_data, topology_of
from fedmom.sweep import Ended, best_table, cells_of, check, drawn, full, listed, metric_of, parse_grid, sweep
from fedmom.terminal import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    STATUS,
    ConfigFile,
    Out,
    Quiet,
    Resume,
    Sets,
    exit_status,
    fresh_folder,
    show_run,
)
from fedmom.topology import LARGEST_SPECTRUM
from fedmom.topology_pictures import draw_topology
from fedmom.trackers import TRACKERS, Tracking, make_trackers


class Commands(TyperGroup):
    """Keeps Ctrl-C and a lost reader of our output from ending the process in typer's own way."""

    def invoke(self, ctx: click.Context) -> int:
        try:
            status = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            raise click.Abort from None
        except (BrokenPipeError, SystemExit) as end:
            # rich makes it a SystemExit, as in `fedmom run … | head`; others are an app's own.
            if isinstance(end, SystemExit) and not isinstance(end.__context__, BrokenPipeError):
                raise
            # Nor will anybody read what is left in the buffer.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return INTERRUPTED
        return int(status or DONE)


app = typer.Typer(
    name="fedmom",
    cls=Commands,
    help="Federated momentum SGD: N clients take I local momentum steps, then the model AND the momentum are averaged.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(deploy_app)

Tracks = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="|".join(TRACKERS), help="Who else hears of every round; may be repeated."),
]


@app.command()
def run(
    config: ConfigFile = None,
    sets: Sets = None,
    out: Out = None,
    resume: Resume = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="cpu|cuda|auto", help="Overrules engine.device.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option("--backend", metavar="engine|simulation", help="Overrules run.backend: who runs the clients."),
    ] = None,
    flower_app: Annotated[
        Path | None,
        typer.Option("--app", metavar="DIR", help="Backend simulation: the Flower app's folder (default: here)."),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Event files in the run folder; the same as --track tensorboard.")
    ] = False,
    track: Tracks = None,
    quiet: Quiet = False,
) -> int:
    """Run a configuration: train, record every round, draw the curves.

    CONFIG is a TOML file; configs/ holds complete ones, and `fedmom keys` explains every key.

    fedmom run configs/quickstart.toml

    fedmom run configs/quickstart.toml --set algorithm.momentum-policy=reset --set run.num-rounds=50

    fedmom run configs/quickstart.toml --backend simulation

    fedmom run --resume runs/quickstart-20260101-120000 --set run.num-rounds=200

    The backend "engine" trains on this machine's device, "simulation" sends Flower's messages to Ray actors: the app
    that `flwr run` would deploy, with the same result.

    The run folder gets config.toml (resolved), environment.json, rounds.jsonl (a line per round), checkpoint and
    final.safetensors and curves.png. Ctrl-C leaves a checkpoint; so does a kill, at most run.checkpoint-every
    rounds old.
    """
    console = Console(highlight=False)
    changes = [*(sets or ()), *([f"run.backend={backend}"] if backend else [])]
    if config is not None and run_folders(config, changes, out, resume) == (None, None):
        out = fresh_folder(config)
    if _uses_ray(config, changes, resume):
        folder = run_folders(config, changes, out, resume)
        where = Path(folder[1] or folder[0] or ".")
        supervise.stand_by(where / CONFIG, f"go on with: fedmom run --resume {where}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    followers = callbacks(console, quiet=quiet)
    trackers = [*(track or ()), *(["tensorboard"] if tensorboard else [])]
    if trackers:
        followers.append(Tracking(trackers))
    result = run_config(
        config, sets=changes, out=out, resume=resume, device=device, callbacks=followers, app=flower_app
    )
    assert result.folder is not None
    show_run(result.folder, result.rounds, console, quiet=quiet)
    ours = result.config.server.strategy == "pr-sgd-m"  # Flower's keep state that no checkpoint holds
    return exit_status(result.status, result.message, f"fedmom run --resume {result.folder}" if ours else "")


def _uses_ray(config: Path | None, sets: Sequence[str], resume: Path | None) -> bool:
    """Whether a run is about to start Ray; bad input is for the run to refuse."""
    try:
        keys = load(config or ({} if resume is None else resume / CONFIG), sets).config
    except (InputError, OSError):
        return False
    return keys.run.backend == "simulation" or keys.engine.workers > 0


@app.command(name="simulate-app")
def simulate_flower_app(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of any Flower app (with pyproject.toml).")],
    num_clients: Annotated[int, typer.Option("--num-clients", metavar="N", min=1, help="Nodes, one client each.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the app's run config.")
    ] = None,
    num_actors: Annotated[int, typer.Option(metavar="A", min=0, help="Ray actors; 0: as many as fit.")] = 0,
    num_cpus: Annotated[float, typer.Option(metavar="C", min=0, help="CPU cores per actor.")] = 1.0,
    num_gpus: Annotated[float, typer.Option(metavar="G", min=0, help="GPUs per actor; fractions share one.")] = 0.0,
    ray_address: Annotated[str, typer.Option(metavar="HOST:PORT", help="A Ray cluster to join.")] = "",
    retries: Annotated[int, typer.Option(min=0, help="New tries of a message whose actor died.")] = 2,
    straggler_seconds: Annotated[float, typer.Option(min=0, help="Replace an actor that takes longer; 0: never.")] = 0,
    output: Annotated[bool, typer.Option("--show-output", help="Print what clients print and log.")] = False,
) -> int:
    """Simulate any Flower app, unchanged, on resident Ray actors.

    fedmom simulate-app path/to/app --num-clients 1000 --num-actors 4 --set num-server-rounds=10

    Apps of Flower's message API (1.41) run as under `flwr run`, but a message costs about a millisecond, an actor that
    dies is replaced and its message tried again, and a client that fails is an error reply that the app sees.
    """
    console = Console(highlight=False, stderr=True)
    options = PoolOptions(num_actors, num_cpus, num_gpus, ray_address, retries, straggler_seconds)
    supervise.stand_by(None, "")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    number = counted(replies.number, "reply", "replies")
    told = f"{number} of {counted(num_clients, 'client')}{replies.failed()}"
    console.print(f"{folder}: done in {seconds:.1f} s, {told}", soft_wrap=True, markup=False)
    return DONE


@app.command()
def partition(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.")],
    sets: Sets = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="The picture.")] = Path("partition.png"),
) -> int:
    """Show who would hold which data: a summary, and the class-by-client picture.

    fedmom partition configs/quickstart.toml --set data.alpha=0.05 --out skewed.png
    """
    settled = resolve(load(config, sets or ())).config
    data = settled.data
    if data.dataset == "quadratic":
        raise InputError("data.dataset = 'quadratic': has no examples to partition")
    dataset, split = load_task_data(settled)
    counts = split.class_counts(dataset.y_train.numpy(), dataset.num_classes)
    sizes, present = split.sizes, (counts > 0).sum(1)
    title = f"{data.dataset}, {data.partition}, N = {data.num_clients}"
    title += f", α = {data.alpha:g}" if "dirichlet" in data.partition else ""
    rows = [
        ["clients", f"{split.num_clients:,}"],
        ["examples", f"{sizes.sum():,}"],
        ["examples per client: min, median, max", f"{sizes.min():,}, {np.median(sizes):,.0f}, {sizes.max():,}"],
        ["classes per client: min, median, max", f"{present.min()}, {np.median(present):.0f}, {present.max()}"],
        ["share of a client's largest class, mean", f"{(counts.max(1) / sizes).mean():.3f}"],
    ]
    print(tables.as_text([title, ""], rows))
    draw_or_say_why(lambda: pictures.draw_partition(counts, out, title=title))
    print(out)
    return DONE


@app.command("sweep")
def sweep_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.")],
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="SECTION.KEY=V,V,…", help="Values of a key; several make all combinations."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Run every combination with run.seed 0 … n − 1.", min=1)] = 1,
    sets: Sets = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Holds the run folders (default: runs/NAME-sweep).")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Runs at a time, each in its process.", min=1)] = 1,
    ray: Annotated[
        str, typer.Option("--ray", metavar="local|HOST:PORT", help="Runs on Ray actors, --workers of them.")
    ] = "",
    some: Annotated[
        int, typer.Option("--random", metavar="N", help="That many combinations at random instead of all.", min=0)
    ] = 0,
    file: Annotated[
        Path | None, typer.Option("--list", metavar="FILE.toml", help="Combinations from tables [[run]] instead.")
    ] = None,
    metric: Annotated[
        str, typer.Option("--metric", help="A key of rounds.jsonl to rank by (default: accuracy, else loss).")
    ] = "",
    track: Tracks = None,
) -> int:
    """Run a configuration with every combination of some keys and several seeds; rank the combinations.

    fedmom sweep configs/quickstart.toml --grid algorithm.num-local-steps=1,4,16 --grid data.alpha=0.1,1 --seeds 3

    Every run is an ordinary run folder in DIR. The same command again goes on where the last one stopped: what is done
    is not run again.
    """
    if bool(grid) == bool(file):
        raise InputError("give --grid SECTION.KEY=V,V,… (once or more) or --list FILE.toml")
    values = parse_grid(grid or ())
    combinations = listed(file) if file else drawn(values, some, 0) if some else full(values)
    cells = cells_of(combinations, range(seeds))
    folder = out or Path("runs") / f"{config.stem}-sweep"
    make_trackers(track or ())  # one that is not installed is said before anything runs
    check(config, cells, folder, sets or ())
    if ray:
        supervise.stand_by(folder, f"the same command goes on from {folder}")
    console, ended = Console(stderr=True, highlight=False), list[Ended]()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=len(cells))
        for one in sweep(config, cells, folder, sets=sets or (), workers=workers, ray=ray, track=track or ()):
            ended.append(one)
            bar.advance(task)
            if one.status == "done":  # a wrong name is found at the first run's end, not at the last one's
                metric = metric_of(folder / one.cell.name, metric)
            if one.seconds or one.status != "done":
                why = f": {one.message}" if one.message else f" in {one.seconds:.0f} s"
                bar.console.print(f"{len(ended)}/{len(cells)} {one.cell.name}: {one.status}{why}")
    if ended and ended[-1].status == "interrupted":
        return _complain(f"interrupted; the same command goes on from {folder}", INTERRUPTED)
    if metric:
        print(tables.as_text(*best_table(ended, folder, metric)))
    print(folder)
    worst = [STATUS[one.status] for one in ended if one.status != "done"]
    return max(worst, default=DONE)


@app.command("bench")
def bench_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.")],
    sets: Sets = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long to run rounds.", min=0.1)] = 10.0,
) -> int:
    """Measure how fast a configuration runs on this machine, how near to its limits, and where the time goes.

    fedmom bench configs/fashion-mnist.toml --set algorithm.num-local-steps=16
    """
    loaded = load(config, sets or ())
    console = Console(stderr=True)
    with console.status("…") as status:
        found = bench(resolve(loaded).config, seconds=seconds, progress=lambda text: status.update(f"{text} …"))
    for note in found.notes:
        print(note)
    print(tables.as_text([str(config), ""], as_rows(found)))
    return DONE


@app.command()
def topology(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.")],
    sets: Sets = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="The picture.")] = Path("topology.png"),
) -> int:
    """Show who would exchange with whom: checks, spectral gap, mixing time, and a picture of graph and spectrum.

    fedmom topology configs/decentralized/ring.toml --set algorithm.topology=exponential --out exponential.png
    """
    loaded = load(config, sets or ())
    settled = resolve(loaded._replace(config=replace(loaded.config, "algorithm", name="d-sgd-m"))).config
    graph = topology_of(settled)
    assert graph is not None
    degrees = np.mean([matrix.out_degrees() for matrix in graph.matrices], axis=0)
    links = sum(matrix.num_links() for matrix in graph.matrices) / graph.period
    small = graph.num_clients <= LARGEST_SPECTRUM
    far = graph.rounds_to(0.01) if small else float("inf")
    rows = [
        ["clients", f"{graph.num_clients:,}"],
        ["W", "symmetric" if graph.is_symmetric else "directed"],
        ["rounds in a period", f"{graph.period}"],
        ["sends to, per round: min, mean, max", f"{degrees.min():g}, {degrees.mean():.3g}, {degrees.max():g}"],
        ["rows sent per round, all clients", f"{links:,.5g} × (x and u)"],
        ["doubly stochastic", "yes"],
        ["connected", "yes" if len(graph.components) == 1 else f"no, {len(graph.components)} parts"],
        ["|λ₂| per round", f"{graph.second_eigenvalue:.6g}" if small else tables.MISSING],
        ["spectral gap 1 − |λ₂|", f"{graph.spectral_gap:.6g}" if small else tables.MISSING],
        ["rounds until 1 % of disagreement", f"{far:,.0f}" if small and np.isfinite(far) else tables.MISSING],
    ]
    print(tables.as_text([graph.name, ""], rows))
    for warning in graph.warnings:
        print(f"fedmom: {warning}", file=sys.stderr)
    if small:
        draw_or_say_why(lambda: draw_topology(graph, out))
        print(out)
    return DONE


app.command()(results_cli.compare)
app.command()(results_cli.report)
app.command()(results_cli.watch)


@app.command()
def datasets(
    fetch: Annotated[str | None, typer.Option("--download", metavar="NAME", help="Fetch it by torchvision.")] = None,
    data_dir: Annotated[str, typer.Option("--data-dir", metavar="DIR", help="Where to put it.")] = "data",
) -> int:
    """List the data sets that a config can name, or download one.

    fedmom datasets --download cifar10 --data-dir data
    """
    if fetch is not None:
        download(fetch, data_dir)
        print(f"{fetch} is in {data_dir}")
        return DONE
    rows = [[name, entry.summary] for name, entry in DATASETS.items()]
    rows.append(["quadratic", "f_i(x) = Σ h/2 (x − c)², exact gradients: data.curvatures, centers, start, noise-sigma"])
    rows.append(["FILE.npz", "arrays x_train, y_train, x_test, y_test (uint8 images or float features)"])
    rows.append(["module:function", "your own: returns those four arrays"])
    _print_list(rows)
    return DONE


@app.command()
def models() -> int:
    """List the models that a config can name.

    fedmom run configs/quickstart.toml --set model.name=resnet20
    """
    rows = [[name, entry.summary] for name, entry in MODELS.items()]
    rows.append(["module:function", "your own: function(input_shape, num_classes) returns a torch.nn.Module"])
    _print_list(rows)
    return DONE


@app.command()
def keys(
    words: Annotated[list[str] | None, typer.Argument(metavar="[WORD]...", help="Only keys with such a word.")] = None,
) -> int:
    """Explain the keys of a config: default, meaning, and the values a key can take.

    fedmom keys momentum
    """
    rows = []
    for name, key in KEYS.items():
        names = ", ".join([*key.choices, key.also] if key.also else key.choices)
        row = [name, toml_scalar(key.default), f"{key.doc}: {names}" if names else key.doc]
        if not words or any(word.lower() in " ".join(row).lower() for word in words):
            rows.append(row)
    if not rows:
        raise InputError(f"{' '.join(words or [])}: is in no key, default or meaning; `fedmom keys` lists them all")
    _print_list(rows)
    return DONE


def _print_list(rows: Sequence[Sequence[str]]) -> None:
    """Columns of words, so to the left; the last one is a sentence."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for *words, sentence in rows:
        print("  ".join([*(word.ljust(width) for word, width in zip(words, widths, strict=True)), sentence]))


def call(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status; a user's mistake costs one line on standard error."""
    try:
        return int(app(args=arguments, standalone_mode=False) or DONE)
    except InputError as error:
        return _complain(str(error), BAD_INPUT)
    except ClientsFailedError as error:  # in an app that keeps no run folder
        return _complain(str(error), FAILED)
    except click.ClickException as error:
        return _complain(error.format_message(), BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        return _complain("interrupted", INTERRUPTED)
    except OSError as error:  # a name too long, a folder that may not be read
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error), BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        if not _memory_is_full(error):
            raise
        advice = "lower data.batch-size, engine.chunk-size or data.num-clients"
        return _complain(f"the memory is full: {advice} ({one_line(error)})", BAD_INPUT)


def _memory_is_full(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _complain(message: str, status: int) -> int:
    """One line on standard error; none where click has already shown its help."""
    if message:
        print(f"fedmom: {' '.join(message.split())}", file=sys.stderr)
    return status
