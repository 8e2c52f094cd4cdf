"""What a run may aim at: "test_accuracy=0.9", and the measure that is watched where nobody named one."""

from math import isfinite

from fedmom.config.keys import Config
from fedmom.config.numbers import as_number, parse_numbers
from fedmom.errors import InputError, unknown
from fedmom.method.algorithms import ALGORITHMS
from fedmom.rounds.evaluation import client_measures
from fedmom.rounds.results import COUNT, DIVERGED, OWN, PERSONAL, client_names, statistics, summary_names
from fedmom.tasks.kinds import Asked, make_task
from fedmom.tasks.metrics import METRICS, is_share, named
from fedmom.tasks.problem import data_kind
from fedmom.tasks.task import Task

ALIASES = {name: f"test_{name}" for name in METRICS}
# The numbers that every record has, and those of Algorithm 2 (docs/method.md).
_ALWAYS = (
    *("round", "steps", "joint_epochs", "lr", "train_loss", "consensus_distance", "momentum_spread"),
    *("bytes_sent", "wall_seconds", "client_steps_per_second", "num_clients", "num_failed"),
)
_DOWN = "bytes_received"  # where what goes down is encoded
_MIXED = ("consensus_distance_after", "momentum_spread_after")


def task_of(config: Config) -> Task:
    """The task of a configuration whose data have examples. Raises InputError naming the key that is wrong."""
    keys = config.model
    weights = parse_numbers("model.class-weights", keys.class_weights) if keys.class_weights else ()
    if any(weight <= 0 for weight in weights):
        raise InputError(f"model.class-weights = {keys.class_weights!r}: must be positive numbers")
    return make_task(config.data.task, Asked(keys.loss, config.run.metrics, keys.label_smoothing, weights))


def measures_of(config: Config) -> tuple[str, ...]:
    """The names of what an evaluation of a run records."""
    kind = data_kind(config.data.dataset)
    return named(task_of(config).metrics) if kind.has_examples else kind.measures


def measured_by(config: Config) -> set[str]:
    """The names of all numbers that a run may record."""
    own = measures_of(config)
    mixes = ALGORITHMS[config.algorithm.name].decentralized
    of_clients = {name for one in clients_numbers(config) for name in statistics(one)}
    if of_clients:
        of_clients |= {COUNT, f"{PERSONAL}_{DIVERGED}"}
    down = {_DOWN} if config.algorithm.codecs_down else set()
    return {*_ALWAYS, *down, *own, *((*_MIXED, *client_measures(own)) if mixes else ()), *of_clients} - {"optimum"}


def clients_numbers(config: Config) -> tuple[str, ...]:
    """The names of every client's own results: "own_loss", "own_accuracy", …; none where nobody looks at them."""
    if not config.run.client_eval_every:
        return ()
    mixes, steps = ALGORITHMS[config.algorithm.name].decentralized, config.run.personal_steps
    personal = [PERSONAL] if mixes or steps or config.algorithm.personal else []
    return client_names([OWN, *personal], task_of(config).metrics)


def of_rounds(config: Config, evaluation: bool, look: bool) -> set[str]:
    """What an evaluation of x̂ adds to a round's record, and what a look at every client does."""
    own = measures_of(config)
    found = {*own, *client_measures(own)} if evaluation else set[str]()
    of_clients = {name for one in clients_numbers(config) for name in summary_names(one)}
    return found | ({*of_clients, COUNT, f"{PERSONAL}_{DIVERGED}"} if look else set())


def unmeasured(config: Config, key: str, name: str) -> InputError:
    """The error for a key that aims at what the run does not measure; of clients' own numbers it says who does."""
    if name.partition("_")[0] in (OWN, PERSONAL) and not config.run.client_eval_every:
        return InputError(f"{key} = {name!r}: needs run.client-eval-every, the rounds between two looks at the clients")
    return unknown(key, name, sorted(measured_by(config)))


def parse_goal(text: str) -> tuple[str, float] | None:
    """ "test_accuracy=0.9", "accuracy=90%", "test_loss=0.5" -> (measure, value); None for anything else."""
    name, _, number = (part.strip() for part in text.partition("="))
    value = as_number(number.removesuffix("%").strip())
    if not name.isidentifier() or value is None or not isfinite(value):
        return None
    value = value / 100 if number.endswith("%") else float(value)
    name = ALIASES.get(name, name)
    return None if is_share(name) and not 0 < value <= 1 else (name, value)


def monitored(config: Config, wanted: str = "auto") -> str:
    """The measure by which a run is judged: the one that is wanted, else the test accuracy, else the loss."""
    if wanted != "auto":
        return ALIASES.get(wanted, wanted)
    measures = measures_of(config)
    return next((name for name in ("test_accuracy", "test_loss", "loss") if name in measures), "train_loss")
