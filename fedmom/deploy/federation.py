"""Bring a deployment up, see how it is, and take it down; and tell whose the containers are.

Compose finds a project by its name, which two deployments may share. Volumes have the deployment's identity in their
names (compose.py), and containers are labelled with it.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from fedmom.deploy.certificates import as_sent
from fedmom.deploy.commands import CommandError, Commands, build_command, image_of, superlink
from fedmom.deploy.deployment import Deployment
from fedmom.deploy.initialise import certificate_notes, write_flower_config
from fedmom.errors import InputError

Say = Callable[[str], None]
T = TypeVar("T")
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_BE_HEALTHY = 180.0
_FIRST = ("superlink", "door")  # what `flwr` needs
LABEL = "fedmom.deployment"
_PROJECT, _PLACE = "com.docker.compose.project", "com.docker.compose.project.working_dir"
_BUSY = re.compile(r"Server error '50[234] ")
_REFUSED = re.compile(r'"POST /v1/fleet/[a-z-]+ [^"]*" 401 refused, public key (\S+)')


class Service(NamedTuple):
    """One container of the project."""

    name: str
    state: str  # Docker's: running, restarting, exited, …
    health: str  # healthy, starting, unhealthy, or empty

    @property
    def well(self) -> bool:
        return self.state == "running" and self.health in ("healthy", "")


def up(commands: Commands, app: Path, say: Say, *, build_arguments: Sequence[str] = (), wait: float = 300.0) -> None:
    """Build the image where there is none, start everything, register the nodes' keys, wait until all are online.

    Raises InputError naming the service or the number of nodes that did not come within `wait` seconds.
    """
    deployment, image = commands.deployment, image_of(commands.deployment)
    commands.flwr()  # that it is missing is said before an image is built
    if not commands.dry:
        write_flower_config(deployment)
    if commands.dry or not _has_image(commands, image):
        say(f"building the image {image}: minutes, once")
        commands.do(build_command(app, image, build_arguments), quiet=False, seconds=3600)
    say("starting the SuperLink")
    commands.do(commands.compose("up", "--detach", "--no-build", *_FIRST))
    _wait_for(commands, _FIRST)
    say(f"registering the keys of {deployment.num_clients} nodes")
    begin, told = time.monotonic(), -1
    for key in deployment.node_keys():
        command = superlink("supernode", "register", str(key))
        if commands.dry:
            commands.do(command)
            continue
        try:
            _once_it_answers(partial(commands.json, command), begin + wait)
        except CommandError as error:
            if "already in use" not in str(error).lower():
                raise
    say("starting the rest")
    commands.do(commands.compose("up", "--detach", "--no-build", "--remove-orphans"))
    if commands.dry:
        return
    if deployment.address:
        say(f"clients: bring {deployment.folder}/client-… to their machines, and there `docker compose up --detach`")
    begin = time.monotonic()
    while (online := _once_it_answers(partial(num_online, commands), begin + wait)) < deployment.num_clients:
        if online != told:
            say(f"nodes online: {online} of {deployment.num_clients}")
            told = online
        if time.monotonic() - begin > wait:
            raise InputError(
                f"--wait {wait:g}: {online} of {deployment.num_clients} nodes are online; "
                + ("; ".join(refused(commands)) or _SAY_MORE)
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    _wait_for(commands, None)
    say(f"nodes online: {online} of {deployment.num_clients}")


def _once_it_answers(ask: Callable[[], T], until: float) -> T:
    """What the SuperLink answers; a busy machine's may take no connection for seconds, and the door says so."""
    while True:
        try:
            return ask()
        except CommandError as error:
            if not _BUSY.search(str(error)) or time.monotonic() > until:
                raise
        time.sleep(_SECONDS_BETWEEN_LOOKS)


_SAY_MORE = "`fedmom deploy status`, or the logs of the missing node's supernode, say more"


def refused(commands: Commands, minutes: int = 5) -> list[str]:
    """What the gate's log says of clients whose registered keys were refused lately."""
    try:
        log = commands.do(commands.compose("logs", "--no-log-prefix", "--since", f"{minutes}m", "gate"), changes=False)
    except CommandError:
        return []
    seen = set(_REFUSED.findall(log))
    keys = enumerate(commands.deployment.node_keys())
    return [
        f"client {c}: its key is registered, and was refused (401): is its clock right? More than 5 s ahead of this "
        "machine's or 300 s behind is taken for an intruder; the log of its supernode has the difference"
        for c, key in keys
        if key.is_file() and as_sent(key) in seen
    ]


def _has_image(commands: Commands, image: str) -> bool:
    try:
        commands.do(["docker", "image", "inspect", "--format", "{{.Id}}", image], changes=False)
    except CommandError as error:
        if "no such image" not in str(error).lower():
            raise
        return False
    return True


def is_up(commands: Commands) -> bool:
    """Whether all of this machine's services are well and all nodes are online."""
    try:
        here = services(commands)
        well = bool(here) and all(service.well for service in here)
        return well and num_online(commands) >= commands.deployment.num_clients
    except CommandError:
        return False


def services(commands: Commands) -> list[Service]:
    """The containers of this machine's project."""
    text = commands.do(commands.compose("ps", "--all", "--format", "json"), changes=False)
    found = [json.loads(line) for line in text.splitlines() if line.strip().startswith("{")]
    return [Service(one["Service"], one["State"], one.get("Health", "")) for one in found]


def num_online(commands: Commands) -> int:
    """Nodes that the SuperLink hears of."""
    return sum(node["status"] == "online" for node in nodes(commands))


def nodes(commands: Commands) -> list[dict[str, str]]:
    """The registered nodes, as Flower lists them."""
    return list(commands.json(superlink("supernode", "list"))["nodes"])


def status(commands: Commands) -> list[str]:
    """One line for each container, node and certificate."""
    lines = [f"{one.name}: {one.state}{f', {one.health}' if one.health else ''}" for one in services(commands)]
    if not lines:
        lines = ["nothing is running here: `fedmom deploy up`"]
    else:
        with contextlib.suppress(CommandError):
            for node in nodes(commands):
                since = node["online-elapsed"] if node["status"] == "online" else node["offline-at"]
                lines.append(f"node {node['node-id']}: {node['status']} ({since or 'never seen'})")
        lines += refused(commands)
    return [*lines, *certificate_notes(commands.deployment)]


def down(commands: Commands, *, volumes: bool) -> None:
    """Stop and remove the containers; with `volumes` also Flower's state and the run folders in them."""
    commands.do(commands.compose("down", "--remove-orphans", *(["--volumes"] if volumes else [])))


def _wait_for(commands: Commands, names: Sequence[str] | None) -> None:
    """Until these services (None: all of this machine's) are healthy."""
    if commands.dry:
        return
    deadline = time.monotonic() + _SECONDS_TO_BE_HEALTHY
    while True:
        found = {service.name: service for service in services(commands)}
        wanted = found if names is None else {name: found.get(name) for name in names}
        ill = [name for name, service in wanted.items() if service is None or not service.well]
        if not ill:
            return
        if time.monotonic() > deadline:
            one = found.get(ill[0])
            how = f"{one.state} {one.health}".strip() if one else "not there"
            raise InputError(
                f"{ill[0]}: is {how} after {_SECONDS_TO_BE_HEALTHY:g} s; see `docker compose logs {ill[0]}`"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


class Found(NamedTuple):
    """A container, as the engine has it."""

    name: str
    project: str
    identity: str  # of the deployment that made it; empty where that is older than identities
    place: str  # the folder that it was started from


def check_ours(commands: Commands) -> None:
    """InputError where this deployment's name, or its folder, is at work as another deployment's."""
    wrong = conflict(commands.deployment, _found(commands))
    if wrong:
        raise InputError(f"--dir {commands.deployment.folder}: {wrong}")


def conflict(deployment: Deployment, found: list[Found]) -> str:
    """What is wrong with what the engine has; empty where nothing is."""
    name, place = deployment.project_name, os.path.realpath(deployment.project)
    for one in found:
        here = os.path.realpath(one.place) == place
        if one.project == name and one.identity != deployment.identity:
            whose = "an earlier deployment in the same folder" if here else f"the deployment in {one.place}"
            return (
                f"the project {name!r} is that of {whose} (it has {one.name}); take another name (`fedmom deploy init "
                f"--name NAME`), or take that one down: "
                f"`docker compose --project-name {name} down`"
            )
        # The same identity elsewhere: the folder was moved, or it is a copy of one that is still there.
        if one.project == name and not here and _is_there(one.place):
            return (
                f"the project {name!r} was started from {one.place}, which is still there (it has {one.name}); use "
                "that folder, or take another name and port for this one (`fedmom deploy init --name NAME --port PORT`)"
            )
        if one.project != name and here and one.identity == deployment.identity:
            return (
                f"its containers are there as the project {one.project!r} (one is {one.name}); take them down first: "
                f"`docker compose --project-name {one.project} down`, or give the deployment that name again"
            )
    return ""


def _is_there(place: str) -> bool:
    """Whether the folder of a deployment is where it was; one that cannot be looked into is."""
    try:
        os.stat(Path(place) / ".env")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _found(commands: Commands) -> list[Found]:
    """The containers of all of Compose's projects on this engine."""
    labels = "".join(f'\\t{{{{.Label "{label}"}}}}' for label in (_PROJECT, LABEL, _PLACE))
    words = ["docker", "ps", "--all", "--filter", f"label={_PROJECT}", "--format", "{{.Names}}" + labels]
    return [
        Found(*line.split("\t")) for line in commands.do(words, changes=False).splitlines() if line.count("\t") == 3
    ]
