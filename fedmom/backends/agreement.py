"""What all nodes of a cluster must hold as this machine does: the data, code and files that a configuration names."""

from functools import partial

from fedmom.actors.nodes import Agreement
from fedmom.config.build import make_task
from fedmom.config.keys import Config
from fedmom.config.load import flat
from fedmom.records.identity import identity_of
from fedmom.tasks.task import Task, task_kind


def agreement(config: Config, task: Task | None = None) -> Agreement:
    """Of a resolved configuration. `task`: as it is here; None: it is read, should there be other nodes to compare."""
    return Agreement(partial(held, config), partial(held, config, task))


def held(config: Config, task: Task | None = None) -> dict[str, str]:
    """{the key and its value: a fingerprint of what it names here}. Raises InputError where something is missing."""
    if task is None and not task_kind(config.data.dataset).own_data:
        task = make_task(config, "cpu")
    settings = flat(config)
    return {f"{key} = {settings[key]!r}": found for key, found in identity_of(config, task).contents.items()}
