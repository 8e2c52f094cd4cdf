"""`fedmom check`: what a configuration would run, how long and in how much memory, and one step of it really taken."""

import json
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedmom.backends.local import make_local
from fedmom.config.build import make_plan, make_problem, resolve_device
from fedmom.config.goals import clients_numbers
from fedmom.config.keys import Config
from fedmom.config.load import flat, load, replace, with_choices
from fedmom.config.numbers import counted
from fedmom.config.resolve import resolve
from fedmom.data.arrays import kind_of
from fedmom.data.inputs import num_examples, rows_of_inputs
from fedmom.data.targets import TARGETS, classes_of
from fedmom.engine.auto import bytes_per_client
from fedmom.engine.rates import rate, replayable
from fedmom.errors import InputError
from fedmom.experiments.run import check_place
from fedmom.machine.cache import nothing_kept
from fedmom.machine.files import at_home
from fedmom.machine.memory import free_bytes, most_bytes
from fedmom.method.state import ClientState, num_bytes
from fedmom.records.folder import RunFolder
from fedmom.rounds.evaluation import chosen_clients
from fedmom.rounds.loop import Record, run_rounds
from fedmom.rounds.plan import Plan, beginning, round_job
from fedmom.rounds.round import Backend
from fedmom.runs.cautions import cautions
from fedmom.tasks.problem import Problem
from fedmom.tasks.supervised import Supervised
from fedmom.user_code import blamed

_SHORT = 1.0  # seconds: rounds that take longer are estimated from a few of their steps
_ROUNDS = 3  # of the short ones, which are run
_NUMBER = 20  # bytes that one takes in clients.jsonl
_FEW = 2  # examples, by which the layers' outputs are seen


class Layer(NamedTuple):
    """One module of the model that has parameters of its own, or has no modules inside."""

    name: str  # as the model's state_dict begins; "" for the model itself
    kind: str  # its class
    output: str  # its shape, "[B, 64]"; "" where an evaluation does not call it
    parameters: int
    frozen: int  # of them, how many do not train


class Data(NamedTuple):
    """The examples, and who holds them."""

    num_train: int
    num_test: int
    outputs: str  # how many a model has for its targets, "10 classes"
    example: str  # dtype and shape, "float32 [16]"
    sizes: np.ndarray  # [N] examples of each client
    classes: np.ndarray | None  # [N] classes that each client has; None where examples have no class
    own_tests: np.ndarray | None  # [N] test examples of each client's own; None where nobody has any


class Checked(NamedTuple):
    """What a run of a configuration would be; sizes in bytes, times in seconds."""

    config: Config  # resolved, with what `auto` chose here
    notes: list[str]  # as the run would give them
    data: Data | None  # None where clients hold formulas
    layers: list[Layer]
    kinds: dict[str, str]  # {name: class} of all modules
    clients: int  # that took the step
    step: Record  # the line of a round of one step, evaluated
    step_seconds: float
    num_parameters: int  # that train, of one client
    rate: float  # client-steps per second
    client_steps: int  # of the whole run
    round_seconds: float  # without evaluation
    eval_seconds: float  # of one evaluation
    num_evals: int
    look_seconds: float  # of one look at every client, about
    num_looks: int
    setup_seconds: float
    client_bytes: int  # that one of K clients takes during a step
    memory: int  # the most that the run will use, about
    free: int  # before anything was made
    checkpoint_bytes: int  # of x, u and buffers
    rows_bytes: int  # of what every client keeps of its own

    @property
    def seconds(self) -> float:
        """Of the whole run, about."""
        rounds, looks = self.config.run.num_rounds * self.round_seconds, self.num_looks * self.look_seconds
        return self.setup_seconds + rounds + self.num_evals * self.eval_seconds + looks

    @property
    def rounds_bytes(self) -> int:
        """Of rounds.jsonl, about."""
        return self.config.run.num_rounds * (len(json.dumps(self.step)) + 1)

    @property
    def results_bytes(self) -> int:
        """Of clients.jsonl, about; 0 where nobody looks at the clients."""
        return self.num_looks * self.config.data.num_clients * len(clients_numbers(self.config)) * _NUMBER


def check_config(
    source: str | Path, sets: Iterable[str] = (), *, progress: Callable[[str], None] = lambda text: None
) -> Checked:
    """Make data and model of a configuration, take one step of two clients, time a few more, and keep nothing.

    Whatever the backend, the clients are those of this process's engine. Raises InputError as a run would, and
    DivergedError where the loss is no number within the first steps.
    """
    begin = time.monotonic()
    resolved = resolve(load(source, sets))
    config = resolve_device(resolved.config)
    _check_run(config)
    with blamed(flat(config)), nothing_kept():
        progress("data and model")
        device = torch.device(config.engine.device)
        free = free_bytes(device)
        problem = make_problem(config, config.engine.device)
        plan = make_plan(config, problem)
        progress("comparing with plain torch, timing the ways to run it")
        backend = make_local(replace(config, "engine", workers=0), problem, plan)
        setup = time.monotonic() - begin
        progress("one step of two clients")
        found = _measured(config, problem, plan, backend, progress)
    layers, kinds = _layers(problem, found["start"]) if isinstance(problem, Supervised) else ([], {})
    memory = most_bytes(device) + 2 * found["rows_bytes"]  # rows before, after the steps, and mixed
    del found["start"]
    return Checked(
        config=with_choices(config, {**backend.settled, "engine.workers": config.engine.workers}),
        notes=[*resolved.notes, *cautions(config, problem, plan), *backend.notes],
        data=_data(problem) if isinstance(problem, Supervised) else None,
        layers=layers,
        kinds=kinds,
        setup_seconds=setup,
        memory=memory,
        free=free,
        **found,
    )


def _check_run(config: Config) -> None:
    """What a run would refuse before it reads any data."""
    check_place(config, here=True)
    run = config.run
    if run.resume:
        raise InputError(f"run.resume = {run.resume!r}: a check looks at a new run; leave it out")
    if run.out:
        RunFolder.check_new(at_home(run.out))


def _measured(
    config: Config, problem: Problem, plan: Plan, backend: Backend, progress: Callable[[str], None]
) -> dict[str, Any]:
    """The fields of Checked that come of steps, and the state before them."""
    begun = beginning(problem, plan)
    clients, step, seconds = _one_step(problem, plan, backend)
    progress("a few steps more")
    job = round_job(problem, plan, begun)._replace(rows=None, own=None, keeps=False)
    path, size = str(backend.settled["engine.path"]), min(int(backend.settled["engine.chunk-size"]), len(job.clients))
    replays = replayable(plan.method, job, plan.topology is not None or bool(problem.personal))
    speed = rate(problem, plan.method, begun.state, job, path, size, replays=replays)
    per_round = plan.cohort_size * float(plan.steps_of(problem.sizes).mean())
    rows = [] if begun.client_correction is None else [begun.client_correction]
    rows += [tree for own in (begun.rows, begun.own) if own is not None for tree in own]
    state = [*begun.state, *(begun.outer or {}).values(), begun.reference or {}]
    return {
        "start": begun.state,
        "clients": clients,
        "step": step,
        "step_seconds": seconds,
        "num_parameters": sum(x.numel() for x in begun.state.params.values()),
        "rate": speed,
        "client_steps": round(plan.num_rounds * per_round),
        "round_seconds": _round_seconds(problem, plan, backend, per_round / speed),
        "eval_seconds": _eval_seconds(problem, plan, begun.state),
        "num_evals": math.ceil(plan.num_rounds / plan.eval_every),
        "look_seconds": _look_seconds(problem, plan, begun.state, speed),
        "num_looks": math.ceil(plan.num_rounds / plan.client_eval_every) if plan.client_eval_every else 0,
        "client_bytes": bytes_per_client(problem, begun.state),
        "checkpoint_bytes": sum(map(num_bytes, state)),
        "rows_bytes": sum(map(num_bytes, rows)),
    }


def _one_step(problem: Problem, plan: Plan, backend: Backend) -> tuple[int, Record, float]:
    """(how many clients, the line, seconds) of a round in which two clients take one step, or all under Algorithm 2."""
    few = plan.cohort_size if plan.topology is not None else min(2, plan.cohort_size)
    short = plan._replace(cohort_size=few, num_local_steps=1, local_epochs=0, eval_every=1, client_eval_every=0)
    _, record = next(run_rounds(problem, short, backend, beginning(problem, short)))
    return few, record, few / record["client_steps_per_second"]


def _round_seconds(problem: Problem, plan: Plan, backend: Backend, expected: float) -> float:
    """Of a round without its evaluation: that of a few whole ones where they are short."""
    if expected > _SHORT:
        return expected
    blind = plan._replace(num_rounds=max(plan.num_rounds, _ROUNDS) + 1, eval_every=plan.num_rounds + _ROUNDS + 2)
    blind = blind._replace(client_eval_every=0)
    ends = [0.0]
    for new, _ in islice(run_rounds(problem, blind, backend, beginning(problem, blind)), _ROUNDS):
        ends.append(new.wall_seconds)
    return min(after - before for before, after in pairwise(ends))


def _eval_seconds(problem: Problem, plan: Plan, start: ClientState) -> float:
    """Of the mean model's evaluation, and of the clients' own models where they have some."""
    begin = time.perf_counter()
    problem.evaluate(start)
    models = 1 if plan.topology is None else 1 + len(chosen_clients(len(problem.sizes), plan.eval_clients))
    return models * (time.perf_counter() - begin)


def _look_seconds(problem: Problem, plan: Plan, start: ClientState, speed: float) -> float:
    """Of x̂ on every client's own test examples, and of as much for models of their own after their steps."""
    if not plan.client_eval_every:
        return 0.0
    begin = time.perf_counter()
    problem.evaluate_own(start)
    models = 2 if plan.topology is not None or plan.personal_steps or problem.personal else 1
    return models * (time.perf_counter() - begin) + len(problem.sizes) * plan.personal_steps / speed


def _data(problem: Supervised) -> Data:
    dataset, sampler = problem.dataset, problem.sampler
    sizes = sampler.sizes.cpu()
    owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    labels, classes = classes_of(problem.task.targets, dataset.y_train.cpu().numpy()), None
    if labels is not None:
        held = torch.stack([owners, torch.from_numpy(labels)[sampler.indices.cpu()]])
        classes = torch.bincount(torch.unique(held, dim=1)[0], minlength=len(sizes)).numpy()
    train, test = int(sizes.sum()), num_examples(dataset.x_test)
    grows = TARGETS[problem.task.targets].grows
    outputs = counted(
        dataset.num_classes, *(("class", "classes") if grows else ("number to predict", "numbers to predict"))
    )
    return Data(train, test, outputs, kind_of(dataset.x_train), sizes.numpy(), classes, problem.own_sizes)


def _layers(problem: Supervised, start: ClientState) -> tuple[list[Layer], dict[str, str]]:
    """(the model's layers in its own order, {name: class} of all its modules).

    Each parameter is counted once; outputs are as an evaluation makes them.
    """
    twin = problem.in_dtype(problem.dtype)  # whose hooks nobody else sees
    outputs: dict[str, str] = {}
    modules = dict(twin.model.named_modules())

    def look(name: str, _module: nn.Module, _inputs: Any, made: Any) -> None:
        outputs.setdefault(name, _shape(made))

    for name, module in modules.items():
        module.register_forward_hook(partial(look, name))
    first = torch.zeros(1, dtype=torch.int64)
    batch = next(iter(twin.round_batches(first, first, 1)))
    try:
        twin.judged(start, rows_of_inputs(rows_of_inputs(batch.x, 0), slice(_FEW)))
    except Exception:  # the run itself says so, with the examples
        outputs.clear()
    # As the user wrote them: dropout was swapped for the addressed one.
    kinds = {name: type(module).__name__.removeprefix("Addressed") for name, module in modules.items()}
    layers, seen = list[Layer](), set[int]()
    for name, module in modules.items():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        if own or not [*module.children()]:
            frozen = sum(p.numel() for p in own if not p.requires_grad)
            layers.append(Layer(name, kinds[name], outputs.get(name, ""), sum(p.numel() for p in own), frozen))
    return layers, kinds


def _shape(made: Any) -> str:
    tensors = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
    if not tensors:
        return ""
    sizes = list(tensors[0].shape)
    return "[" + ", ".join(["B" if not place and size == _FEW else str(size) for place, size in enumerate(sizes)]) + "]"
