"""A resolved configuration becomes a plan: the method, its numbers, the user's correction and the topology."""

import inspect

import torch
from torch import Tensor

from fedmom.config.build.watched import watched_class
from fedmom.config.keys import Config
from fedmom.config.method.codecs import DOWN, UP, parse_codecs
from fedmom.config.method.interval import interval_milestones
from fedmom.config.method.numbers import clients_beta
from fedmom.config.method.outer import outer_of
from fedmom.config.method.presets import correction_numbers
from fedmom.config.method.states import parse_states
from fedmom.config.numbers import parse_numbers
from fedmom.config.strategies import OURS
from fedmom.errors import InputError
from fedmom.method.algorithms import ALGORITHMS, Method
from fedmom.method.corrections import Correct, Correction, takes_key
from fedmom.method.decentralized.graphs import GraphOptions
from fedmom.method.decentralized.topology import Topology, make_topology
from fedmom.method.named.table import NAMED_CORRECTIONS
from fedmom.method.randomness import CORRECTION, random_bits
from fedmom.method.schedules import LearningRate
from fedmom.method.state import Tree, X
from fedmom.method.states.fragments import Fragments, fragments_of
from fedmom.method.states.rules import StateRule
from fedmom.rounds.own import shared_of
from fedmom.rounds.plan import Plan
from fedmom.tasks.problem import Problem
from fedmom.tasks.supervised import Supervised
from fedmom.user_code import is_spec, load_object, one_line


def make_plan(config: Config, problem: Problem | None = None) -> Plan:
    """The plain numbers of a resolved configuration; `problem`: of which algorithm.fragments makes parts.

    Raises InputError for numbers that do not fit together.
    """
    algorithm = config.algorithm
    _check_numbers(config)
    rate = LearningRate(
        lr=algorithm.lr,
        schedule=algorithm.lr_schedule,
        milestones=parse_numbers("algorithm.lr-milestones", algorithm.lr_milestones),
        decay=algorithm.lr_decay,
        unit=algorithm.lr_unit,
        warmup=algorithm.lr_warmup,
        minimum=algorithm.lr_min,
    )
    return Plan(
        method=_method_of(config, problem),
        rate=rate,
        num_rounds=config.run.num_rounds,
        cohort_size=algorithm.cohort_size,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        num_local_steps=algorithm.num_local_steps,
        local_epochs=algorithm.local_epochs,
        interval=algorithm.interval,
        milestones=interval_milestones(algorithm),
        client_weights=algorithm.client_weights,
        eval_every=config.run.eval_every,
        num_steps=config.run.num_steps,
        outer=outer_of(config),
        topology=topology_of(config),
        codecs_down=parse_codecs(DOWN, algorithm.codecs_down),
        client_eval_every=config.run.client_eval_every,
        personal_steps=config.run.personal_steps,
        eval_clients=config.run.eval_clients,
        normalised=ALGORITHMS[algorithm.name].normalised,
    )


def _method_of(config: Config, problem: Problem | None) -> Method:
    algorithm = config.algorithm
    return Method(
        beta=clients_beta(config),
        nesterov=algorithm.nesterov,
        weight_decay=algorithm.weight_decay,
        momentum_policy=algorithm.momentum_policy,
        running_var=algorithm.running_var,
        correction=_correction_of(config),
        optimizer=algorithm.optimizer,
        beta2=algorithm.beta2,
        eps=algorithm.eps,
        states=parse_states(algorithm.states),
        fragments=_fragments_of(config, problem),
        codecs=parse_codecs(UP, algorithm.codecs),
    )


def _fragments_of(config: Config, problem: Problem | None) -> Fragments:
    count = config.algorithm.fragments
    if count == 1:
        return Fragments()
    assert problem is not None, "the parts are of a model"
    start = shared_of(problem, problem.start())
    order = [*problem.places.names] if isinstance(problem, Supervised) else []
    try:
        return fragments_of(start.params, start.buffers, count, order)
    except ValueError as error:
        right = "a part is whole tensors, so it must be at most that"
        raise InputError(f"algorithm.fragments = {count}: {error} that are averaged; {right}") from None


def _check_numbers(config: Config) -> None:
    """What the method multiplies by must be a number of the dtype in which it is done."""
    largest = torch.finfo(getattr(torch, config.run.dtype)).max
    for key in ("lr", "weight_decay", "slow_lr", "outer_lr", "prox_mu"):
        value = getattr(config.algorithm, key)
        if value > largest:
            name, dtype = key.replace("_", "-"), config.run.dtype
            raise InputError(f"algorithm.{name} = {value:g}: in run.dtype = {dtype!r} it must be at most {largest:.3g}")


def _correction_of(config: Config) -> Correct | Correction | None:
    """The named one, or the user's function or an object of the user's class, watched over."""
    if (named := NAMED_CORRECTIONS.get(config.algorithm.name)) is not None:
        return named.make(correction_numbers(config))
    spec = config.algorithm.correction
    found = load_object("algorithm.correction", spec) if is_spec(spec) else None
    if isinstance(found, Correction):
        raise InputError(f"algorithm.correction = {spec!r}: is an object; name its class, {type(found).__name__}")
    if not isinstance(found, type):
        return _correction(spec, config.run.seed)
    said, algorithm, strategy = f"algorithm.correction = {spec!r}", config.algorithm.name, config.server.strategy
    if ALGORITHMS[algorithm].decentralized:
        raise InputError(f"{said}: a correction with state needs a server, and {algorithm} has none")
    if strategy != OURS:
        raise InputError(f"server.strategy = {strategy!r}: a correction with state needs {OURS}; {said}")
    if (period := parse_states(config.algorithm.states).get(X, StateRule()).period) > 1:
        raise InputError(
            f"{said}: a correction with state needs x in every round, not every {period}; set 'x: average'"
        )
    return watched_class(said, found, config.run.seed)


def _correction(spec: str, seed: int) -> Correct | None:
    """The user's function, watched over.

    It must give every gradient back, in its shape and dtype, and leave x alone.
    """
    if not is_spec(spec):
        return None
    function = load_object("algorithm.correction", spec)
    said, keyed = f"algorithm.correction = {spec!r}", takes_key(function)

    def correction(grads: Tree, params: Tree, start: Tree, key: Tensor | None = None) -> Tree:
        more = {"key": random_bits(CORRECTION, seed, key)} if keyed and key is not None else {}
        versions = [t._version for tree in (params, start) for t in tree.values()]
        try:
            found = function(dict(grads), dict(params), dict(start), **more)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{said}: the function raised {one_line(error)}") from error
        if not isinstance(found, dict) or set(found) != set(grads):
            raise InputError(f"{said}: must return a dict of the gradients it was given")
        for name, g in grads.items():
            got, form = found[name], f"its shape {list(g.shape)}, dtype {g.dtype} and device {g.device}"
            kept = isinstance(got, Tensor) and (got.shape, got.dtype, got.device) == (g.shape, g.dtype, g.device)
            if not kept:
                raise InputError(f"{said}: the gradient of {name} must keep {form}")
        if versions != [t._version for tree in (params, start) for t in tree.values()]:
            raise InputError(f"{said}: the function writes into the parameters it was given; return other gradients")
        return found

    if keyed:
        watched: Correct = correction
    else:
        watched = lambda grads, params, start: correction(grads, params, start)  # noqa: E731
    watched.__wrapped__ = inspect.unwrap(function)  # type: ignore[attr-defined]  # for who looks at its file
    return watched


def topology_of(config: Config) -> Topology | None:
    """W_t of a resolved configuration; None where the algorithm is not decentralized."""
    algorithm = config.algorithm
    if not ALGORITHMS[algorithm.name].decentralized:
        return None
    options = GraphOptions(algorithm.topology_degree, algorithm.topology_p, config.run.seed)
    return make_topology(algorithm.topology, config.data.num_clients, weights=algorithm.mixing_weights, options=options)
