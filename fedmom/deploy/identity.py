"""Whose containers they are: Compose finds a project by its name, which two deployments may share.

Volumes have the deployment's identity in their names (compose.py).
"""

import os
from pathlib import Path
from typing import NamedTuple

from fedmom.deploy.commands import Commands
from fedmom.deploy.initialise import Deployment
from fedmom.errors import InputError

LABEL = "fedmom.deployment"
_PROJECT, _PLACE = "com.docker.compose.project", "com.docker.compose.project.working_dir"


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
