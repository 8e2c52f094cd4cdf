"""What several keys, or the algorithm's name, decide together, so that a run folder's config.toml says what ran."""

import math
from typing import NamedTuple

from fedmom.config.examples import count_clients
from fedmom.config.goals import measured_by, monitored, parse_goal, unmeasured
from fedmom.config.keys import KEYS, AlgorithmConfig, Config
from fedmom.config.load import Loaded, flat, replace
from fedmom.config.method.codecs import check_codecs, codecs_said
from fedmom.config.method.interval import check_interval, settle_interval
from fedmom.config.method.named import settle_named
from fedmom.config.method.optimizer import settle_optimizer
from fedmom.config.method.outer import check_outer, outer_of
from fedmom.config.method.presets import check_presets
from fedmom.config.method.states import rules_of, settle_states
from fedmom.config.numbers import parse_numbers, parse_table
from fedmom.config.strategies import OURS, STRATEGIES, check_strategy, idle_keys
from fedmom.data.given.natural import is_natural
from fedmom.errors import InputError
from fedmom.method.algorithms import ALGORITHMS, INTERVALS
from fedmom.tasks.problem import data_kind
from fedmom.user_code import is_spec


class Resolved(NamedTuple):
    """A configuration in which nothing is left open but the engine's own choices, and what was overruled."""

    config: Config
    notes: tuple[str, ...]


def resolve(loaded: Loaded, *, here: bool = True) -> Resolved:
    """Settle the N of the quadratic and of all natural clients, the dtype, the cohort, named baselines, I, and R.

    `here`: whether the data are on this machine. Where they are not and data.num-clients = 0 asks for all natural
    clients, N and what depends on it stay open; who reads the data resolves again. What depends on which keys were
    given does not stay open: whoever gets the configuration cannot know them.
    Resolving a resolved configuration changes nothing. Raises InputError naming the keys that disagree.
    """
    config, given = loaded
    notes: list[str] = []
    _check_clients(config)
    config = _settle_data(config, given)
    if not data_kind(config.data.dataset).has_examples:
        idle = [name for name in _TASK_KEYS if name in given and flat(config)[name] != KEYS[name].default]
        if idle:
            notes.append(f"{config.data.dataset} has no examples: {', '.join(idle)} changes nothing")
    config = settle_named(config, given, notes)
    config = settle_optimizer(config, given, notes)
    if not config.data.num_clients:
        if not here:
            return Resolved(config, tuple(notes))
        config = replace(config, "data", num_clients=count_clients(config))
    config = _settle_cohort(config)
    _check_decentralized(config, given, notes)
    config = settle_interval(config, given, notes)
    config = settle_states(config)
    check_presets(config, given, notes)
    check_interval(config)
    check_outer(config, given, notes)
    check_codecs(config)
    config = _settle_rounds(config, given, notes)
    _check_strategy(config, given, notes)
    _check_personal(config)
    _check_schedule(config.algorithm)
    _check_clients_results(config)
    _check_goals(config)
    model = config.model
    if model.lora_rank and not model.start and not is_spec(model.name) and data_kind(config.data.dataset).has_examples:
        begun = "the frozen model is drawn by run.seed; model.start begins from a trained one"
        notes.append(f"model.lora-rank = {model.lora_rank}: {begun}")
    return Resolved(config, tuple(notes))


# Keys of a model, and of what is asked of it, that none but a problem with examples reads.
_TASK_KEYS = (
    *("data.task", "data.client-test-share", "model.start", "model.lora-rank"),
    *("model.loss", "model.label-smoothing", "model.class-weights", "run.metrics"),
)


def _settle_data(config: Config, given: frozenset[str]) -> Config:
    quadratic = not data_kind(config.data.dataset).has_examples
    if quadratic:
        num_clients = _quadratic_clients(config)
        if "data.num-clients" in given and config.data.num_clients != num_clients:
            raise InputError(
                f"data.num-clients = {config.data.num_clients}: data.curvatures = {config.data.curvatures!r} has "
                f"{num_clients} clients, separated by ;"
            )
        config = replace(config, "data", num_clients=num_clients, batch_size=1, augment="none")
    if config.run.dtype == "auto":
        config = replace(config, "run", dtype="float64" if quadratic else "float32")
    if config.run.dtype == "bfloat16" and config.engine.workers:
        raise InputError(
            "run.dtype = 'bfloat16': workers exchange NumPy's arrays, and it has no bfloat16; take float32, or "
            "engine.workers = 0"
        )
    if config.run.dtype == "bfloat16" and config.server.strategy != OURS:
        named = config.server.strategy
        raise InputError(
            f"run.dtype = 'bfloat16': server.strategy = {named!r} adds up NumPy's arrays, and it has no bfloat16; take "
            f"float32, or {OURS!r}"
        )
    return config


def _check_clients(config: Config) -> None:
    """The keys of natural clients go together, and N = 0 goes with them alone."""
    data, kind = config.data, data_kind(config.data.dataset)
    natural = is_natural(data.partition)
    if data.clients and not natural:
        raise InputError(f"data.clients = {data.clients!r}: needs data.partition = 'natural', not {data.partition!r}")
    if not natural:
        if data.num_clients == 0 and kind.has_examples:
            raise InputError("data.num-clients = 0: must be >= 1; 0 takes all clients of data.partition = 'natural'")
        return
    if kind.own_data or not kind.has_examples:
        raise InputError(f"data.partition = {data.partition!r}: data.dataset = {data.dataset!r} has clients of its own")
    if not data.clients:
        raise InputError(
            f"data.partition = {data.partition!r}: needs data.clients, the name of the array with the id of each "
            "example's client ('users' in LEAF's format, 'folders' for folders of images)"
        )


def _quadratic_clients(config: Config) -> int:
    """N of the quadratic, whose strings must agree with one another and have a minimiser."""
    data = config.data
    curvatures = parse_table("data.curvatures", data.curvatures)
    centers = parse_table("data.centers", data.centers)
    start = parse_numbers("data.start", data.start)
    if len(curvatures) != len(centers):
        raise InputError(
            f"data.centers = {data.centers!r}: has {len(centers)} clients, data.curvatures {len(curvatures)}"
        )
    widths = {len(row) for row in (*curvatures, *centers, start)}
    if len(widths) > 1:
        raise InputError(
            f"data.curvatures = {data.curvatures!r}, data.centers = {data.centers!r}, data.start = {data.start!r}: "
            f"every client and the start need the same number of coordinates, got {sorted(widths)}"
        )
    # One client's own f_i may be flat or bend down; the mean of all must have a minimum.
    sums = [sum(column) for column in zip(*curvatures, strict=True)]
    if not all(0 < total < math.inf for total in sums):
        raise InputError(
            f"data.curvatures = {data.curvatures!r}: the clients' sum must be > 0 in every coordinate, or there is no "
            f"minimum; got {', '.join(f'{total:g}' for total in sums)}"
        )
    return len(curvatures)


def _settle_cohort(config: Config) -> Config:
    size, num_clients = config.algorithm.cohort_size or config.data.num_clients, config.data.num_clients
    if size > num_clients:
        raise InputError(f"algorithm.cohort-size = {size}: must be at most data.num-clients = {num_clients} (0: all)")
    return replace(config, "algorithm", cohort_size=size)


# Keys that only Algorithm 2 reads.
_TOPOLOGY_KEYS = ("topology", "mixing-weights", "topology-degree", "topology-p")


def _check_decentralized(config: Config, given: frozenset[str], notes: list[str]) -> None:
    """Algorithm 2 has every client in every step, with equal weights; Algorithm 1 has no topology."""
    algorithm = config.algorithm
    if not ALGORITHMS[algorithm.name].decentralized:
        idle = [f"algorithm.{name}" for name in _TOPOLOGY_KEYS if f"algorithm.{name}" in given]
        idle = [name for name in idle if flat(config)[name] != KEYS[name].default]
        if idle:
            notes.append(f"{algorithm.name} has no topology: {', '.join(idle)} changes nothing (d-sgd-m has)")
        return
    right = {
        "algorithm.cohort-size": (algorithm.cohort_size, config.data.num_clients, "every client takes part"),
        "algorithm.local-epochs": (algorithm.local_epochs, 0, "all clients take equally many steps"),
        "algorithm.client-weights": (algorithm.client_weights, "uniform", "W decides; its mean is the plain one"),
        "algorithm.interval": (algorithm.interval, "fixed", _interval_is_of(algorithm.interval)),
        "algorithm.slow-momentum": (algorithm.slow_momentum, 0.0, "there is no server"),
        "algorithm.slow-lr": (algorithm.slow_lr, 1.0, "there is no server"),
        "algorithm.outer": (algorithm.outer, "none", "there is no server"),
        "server.strategy": (config.server.strategy, OURS, "Flower's own strategies average"),
    }
    for name, (value, wanted, why) in right.items():
        if value != wanted:
            raise InputError(f"{name} = {value!r}: with {algorithm.name} {why}; leave it {wanted!r}")


def _interval_is_of(rule: str) -> str:
    """Why Algorithm 2 takes no other I than the given one."""
    return "the theorem is Algorithm 1's" if INTERVALS[rule].follow is None else "there is no x̂ that a rule looks at"


def _check_strategy(config: Config, given: frozenset[str], notes: list[str]) -> None:
    """Flower's strategies suppose things of their clients that other keys decide."""
    server, algorithm = config.server, config.algorithm
    if server.strategy != OURS and (codecs := codecs_said(config)):
        raise InputError(
            f"server.strategy = {server.strategy!r}: algorithm.{codecs} is decoded by {OURS} alone; leave it ''"
        )
    fewest = server.min_clients if server.on_failure == "proceed" else algorithm.cohort_size
    check_strategy(
        server.strategy,
        rules=rules_of(algorithm),
        states=algorithm.states,
        outer=outer_of(config) is not None,
        client_weights=algorithm.client_weights,
        on_failure=server.on_failure,
        fewest=min(fewest, algorithm.cohort_size),
        cohort_size=algorithm.cohort_size,
        trim=server.trim,
        num_malicious=server.num_malicious,
    )
    if server.own_rows == "nodes" and not keeps_at_nodes(config, leaves=True):
        notes.append(
            "server.own-rows = 'nodes': under Algorithm 2, a strategy of Flower's, and a period of x with an I that "
            "changes, the server keeps the rows all the same"
        )
    idle = [name for name in idle_keys(server.strategy) if name in given and flat(config)[name] != KEYS[name].default]
    if idle:
        notes.append(f"server.strategy = {server.strategy!r} does not read {', '.join(idle)}: it changes nothing")
    if STRATEGIES[server.strategy].adds_noise and not server.noise_multiplier:
        notes.append(f"server.noise-multiplier = 0: {server.strategy} clips, and adds no noise: nothing is private")


def keeps_at_nodes(config: Config, *, leaves: bool) -> bool:
    """Whether Flower's nodes keep what is their clients' own; `leaves`: whether messages leave the machine."""
    algorithm, word = config.algorithm, config.server.own_rows
    if ALGORITHMS[algorithm.name].decentralized or config.server.strategy != OURS:
        return False
    # A rule that looks at how far clients are apart must see x in every round.
    looks = INTERVALS[algorithm.interval].follow is not None and not rules_of(algorithm).moves_x
    said = algorithm.states or algorithm.fragments > 1 or codecs_said(config)
    return not looks and (word == "nodes" or (word == "auto" and leaves and bool(said)))


def _check_clients_results(config: Config) -> None:
    """The keys of every client's own results go together."""
    run, every = config.run, config.run.client_eval_every
    if every and not data_kind(config.data.dataset).has_examples:
        raise InputError(f"run.client-eval-every = {every}: data.dataset = {config.data.dataset!r} has no examples")
    said = f"run.personal-steps = {run.personal_steps}"
    if run.personal_steps and not every:
        raise InputError(f"{said}: needs run.client-eval-every, the rounds between two evaluations of clients' models")
    if run.personal_steps and ALGORITHMS[config.algorithm.name].decentralized:
        why = "every client has a model of its own already, and that is measured"
        raise InputError(f"{said}: with {config.algorithm.name} {why}; leave it 0")


def _check_personal(config: Config) -> None:
    """What stays with a client is a model's, and must be left out of what the others average."""
    said = f"algorithm.personal = {config.algorithm.personal!r}"
    if not config.algorithm.personal:
        return
    if not config.algorithm.personal.replace(",", "").strip():
        raise InputError(f"{said}: names nothing; name norm, head or beginnings of names by commas, or leave it ''")
    if not data_kind(config.data.dataset).has_examples:
        raise InputError(f"{said}: data.dataset = {config.data.dataset!r} has no model; leave it ''")
    if ALGORITHMS[config.algorithm.name].decentralized:
        raise InputError(f"{said}: needs Algorithm 1, and {config.algorithm.name} is Algorithm 2; leave it ''")
    if config.server.strategy != OURS:
        raise InputError(f"{said}: needs server.strategy = {OURS!r}, not {config.server.strategy!r}, or leave it ''")


def _check_goals(config: Config) -> None:
    """What a run is judged by must be among what it measures."""
    measured = measured_by(config)
    goal = parse_goal(config.run.stop_at)
    if config.run.stop_at and goal is None:
        right = "must be METRIC=VALUE, such as accuracy=90% or test_loss=0.5 (an accuracy is in (0, 1])"
        raise InputError(f"run.stop-at = {config.run.stop_at!r}: {right}")
    named = {"run.monitor": monitored(config, config.run.monitor)}
    for key, name in (named | ({"run.stop-at": goal[0]} if goal else {})).items():
        if name not in measured:
            raise unmeasured(config, key, name)


def _settle_rounds(config: Config, given: frozenset[str], notes: list[str]) -> Config:
    """R = ⌈T / I⌉ where T was given."""
    run = config.run
    if not run.num_steps:
        return config
    rounds = -(-run.num_steps // config.algorithm.num_local_steps)
    if "run.num-rounds" in given and run.num_rounds != rounds:
        notes.append(f"run.num-steps = {run.num_steps} gives {rounds} rounds: it overrules num-rounds")
    return replace(config, "run", num_rounds=rounds)


def _check_schedule(algorithm: AlgorithmConfig) -> None:
    milestones = parse_numbers("algorithm.lr-milestones", algorithm.lr_milestones)
    fraction = algorithm.lr_unit == "fraction"
    if list(milestones) != sorted(milestones) or milestones[0] < 0:
        raise InputError(f"algorithm.lr-milestones = {algorithm.lr_milestones!r}: must rise from 0")
    if algorithm.lr_schedule == "step" and fraction and milestones[-1] > 1:
        raise InputError(
            f"algorithm.lr-milestones = {algorithm.lr_milestones!r}: must be at most 1 in lr-unit = 'fraction' "
            "(or use lr-unit = 'joint-epochs')"
        )
    if fraction and algorithm.lr_warmup > 1:
        raise InputError(f"algorithm.lr-warmup = {algorithm.lr_warmup}: must be at most 1 in lr-unit = 'fraction'")
    if algorithm.lr_schedule == "cosine" and algorithm.lr_min > algorithm.lr:
        raise InputError(f"algorithm.lr-min = {algorithm.lr_min}: must be at most algorithm.lr = {algorithm.lr}")
    if algorithm.lr_schedule == "theory" and algorithm.local_epochs:
        raise InputError("algorithm.lr-schedule = 'theory': needs num-local-steps, not local-epochs")
