"""`fedmom deploy …`: real clients in containers."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedmom.cli.options import (
    ConfigFile,
    Out,
    QuietOption,
    Resume,
    Sets,
    exit_status,
    fresh_folder,
    heed_signals,
    show_run,
)
from fedmom.errors import InputError
from fedmom.machine.files import at_home
from fedmom.user_code import app_root

if TYPE_CHECKING:
    from fedmom.deploy.commands import Commands
    from fedmom.deploy.following import Following

app = typer.Typer(
    name="deploy",
    help="Real clients in containers: keys and certificates, up, run, down.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Option("--dir", metavar="DIR", help="Folder that `init` made.")]
Checkout = Annotated[
    Path | None,
    typer.Option("--app", metavar="DIR", help="Dockerfile and Flower app: a checkout (default: here, else fedmom's)."),
]
Dry = Annotated[bool, typer.Option("--dry-run", help="Print the docker and flwr commands instead of running them.")]
BuildArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--build-arg", metavar="NAME=VALUE", help="Argument of `docker build`, if it is needed. May be repeated."
    ),
]
Wait = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", help="Longest wait for the nodes, in seconds.", min=0)
]
HERE = Path("deployment")


@app.command()
def init(
    clients: Annotated[
        int | None, typer.Option("--clients", metavar="N", help="Number of clients. Default: 3.", min=1)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST", help="Address of this machine, for clients on other machines."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            help="Port of the server for clients; flwr here uses the next one. Default: 8000.",
            min=1,
            max=65534,
        ),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="NAME", help="Another name for the server's certificate. May be repeated."),
    ] = None,
    gpu: Annotated[bool | None, typer.Option("--gpu/--no-gpu", help="The clients have NVIDIA GPUs.")] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the Compose project. Default: fedmom- and a part of its identity."),
    ] = None,
    folder: Folder = HERE,
) -> int:
    """Make the CA, the server's certificate, every client's key and the Compose files; keep what is there.

    fedmom deploy init --clients 5

    fedmom deploy init --clients 5 --address fl.example.org   # clients on machines of their own

    A key or certificate is never written over: to renew one, move it away and call this again. Settings that are not
    given stay as they are.
    """
    from fedmom.deploy.initialise import initialise

    notes = initialise(folder, num_clients=clients, address=address, port=port, hosts=host or (), name=name, gpu=gpu)
    for note in notes:
        print(note)
    print(folder)
    return 0


@app.command()
def up(
    folder: Folder = HERE,
    checkout: Checkout = None,
    build_arg: BuildArguments = None,
    wait: Wait = 300.0,
    dry_run: Dry = False,
) -> int:
    """Build the image if there is none, start the containers, register the nodes, wait until all are online."""
    from fedmom.deploy import federation

    federation.up(_ours(folder, dry_run), _checkout(checkout), _say, build_arguments=build_arg or (), wait=wait)
    return 0


@app.command()
def status(folder: Folder = HERE) -> int:
    """Show the state of each container and node, and when the certificates expire."""
    from fedmom.deploy import federation

    for line in federation.status(_ours(folder, False)):
        print(line)
    return 0


@app.command()
def run(
    config: ConfigFile = None,
    sets: Sets = None,
    out: Out = None,
    resume: Resume = None,
    quiet: QuietOption = False,
    folder: Folder = HERE,
    checkout: Checkout = None,
    build_arg: BuildArguments = None,
    wait: Wait = 300.0,
    dry_run: Dry = False,
) -> int:
    """Train on the deployment as CONFIG says, and bring the run folder here.

    Containers that are not up are started first.

    fedmom deploy run deploy

    fedmom deploy run --resume runs/deploy-20260101-120000 --set run.num-rounds=50

    Progress, run folder and exit status are those of `fedmom run`. Ctrl-C stops the run; what it had checkpointed
    comes along. Where this command is killed, the run goes on: --resume with the folder's name (it need not exist)
    follows it, or fetches it and goes on from its checkpoint once it has ended.
    """
    from fedmom.deploy import federation
    from fedmom.deploy.following import Following
    from fedmom.deploy.remote_runs import checked_name
    from fedmom.records.folder import RunFolder

    if out is not None and resume is not None:
        raise InputError(f"--out {out}: goes with a new run; --resume {resume} writes into its own folder")
    if config is None and resume is None:
        raise InputError("CONFIG is missing: name a TOML file, or one of fedmom's own (quickstart), or --resume DIR")
    say = (lambda text: None) if quiet else _say
    commands, source = _commands(folder, dry_run), _checkout(checkout)
    target = resume or out or fresh_folder(config or Path("run"))
    following = Following(commands, source, checked_name(target), target, say)
    if resume is None:
        RunFolder.check_new(target)
        cargo = following.pack(config, sets or ())
    heed_signals()
    if not dry_run:
        federation.check_ours(commands)
    if dry_run or not federation.is_up(commands):
        federation.up(commands, source, say, build_arguments=build_arg or (), wait=wait)
    if resume is None:
        following.begin(cargo)
    else:
        following.go_on(config, sets or ())
    return 0 if dry_run else _follow(following, folder, quiet)


def _follow(following: "Following", deployment: Path, quiet: bool) -> int:
    """Show a run that was started or taken up until it ends; the exit status."""
    from fedmom.records.files import CONFIG
    from fedmom.records.history import read_rounds
    from fedmom.runs.callbacks import Callback
    from fedmom.runs.progress import Bar, Lines

    target, console = following.target, Console(highlight=False)
    where = ["--dir", str(deployment)] if deployment != HERE else []
    go_on = shlex.join(["fedmom", "deploy", "run", "--resume", str(target), *where])
    num_nodes = following.commands.deployment.num_clients
    goes = "is still going on, followed from here" if following.going_on else f"on {num_nodes} nodes"
    following.say(f"run {following.run_id} {goes}")
    followers = list[Callback]() if quiet else [Bar(console, follows=True) if console.is_terminal else Lines(console)]
    try:
        ended = following.to_the_end(followers)
    except KeyboardInterrupt:  # a second one, while the run was being stopped
        return exit_status("interrupted", following.left_alone(), go_on)
    if (target / CONFIG).is_file():
        show_run(target, read_rounds(target), console, quiet=quiet)
    if ended.status == "done" and ended.message:  # why it stopped early
        following.say(ended.message)
    goes_on = ended.status == "interrupted" and not following.stopped
    return exit_status(ended.status, ended.message, go_on if target.is_dir() or goes_on else "")


@app.command()
def down(
    volumes: Annotated[
        bool, typer.Option("--volumes", help="Also remove Flower's state and the run folders in the server's volume.")
    ] = False,
    folder: Folder = HERE,
    dry_run: Dry = False,
) -> int:
    """Stop and remove the containers. Keys, certificates and fetched run folders stay."""
    from fedmom.deploy import federation

    federation.down(_ours(folder, dry_run), volumes=volumes)
    return 0


def _commands(folder: Path, dry: bool) -> "Commands":
    from fedmom.deploy.commands import Commands
    from fedmom.deploy.deployment import open_deployment

    return Commands(open_deployment(folder), dry=dry)


def _ours(folder: Path, dry: bool) -> "Commands":
    """The same where the engine has nothing of another deployment under its name."""
    from fedmom.deploy.federation import check_ours

    commands = _commands(folder, dry)
    if not dry:
        check_ours(commands)
    return commands


def _checkout(given: Path | None) -> Path:
    """The folder with Dockerfile and Flower app: as given, or here, or what came with fedmom."""
    places = [at_home(given)] if given is not None else [Path.cwd(), app_root()]
    found = [place for place in places if all((place / name).exists() for name in ("Dockerfile", "deploy/image"))]
    if not found:
        raise InputError(f"--app {places[0]}: is no checkout of fedmom (it has no Dockerfile, or no deploy/image)")
    return found[0]


def _say(text: str) -> None:
    print(text, flush=True)
