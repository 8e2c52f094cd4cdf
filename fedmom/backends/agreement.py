"""What all nodes of a cluster must hold as this machine does: the data, code and files that a configuration names."""

from functools import partial

from fedmom.actors.nodes import Agreement
from fedmom.config.build import make_problem
from fedmom.config.keys import Config
from fedmom.config.load import flat
from fedmom.records.identity import identity_of
from fedmom.tasks.problem import Problem, data_kind


def agreement(config: Config, problem: Problem | None = None) -> Agreement:
    """Of a resolved configuration. `problem`: as it is here; None: it is read, should other nodes be compared."""
    return Agreement(partial(held, config), partial(held, config, problem))


def held(config: Config, problem: Problem | None = None) -> dict[str, str]:
    """{the key and its value: a fingerprint of what it names here}. Raises InputError where something is missing."""
    if problem is None and not data_kind(config.data.dataset).own_data:
        problem = make_problem(config, "cpu")
    settings = flat(config)
    return {f"{key} = {settings[key]!r}": found for key, found in identity_of(config, problem).contents.items()}
