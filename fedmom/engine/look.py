"""A look at the user's model and correction before the first round: can a step be repeated, and is its state all there?

A run must give the same numbers whoever asks for a client's step, and in whatever order. So a step may not depend on
random numbers that nobody addressed, nor on attributes that a forward pass changes: no client has those of its own.
"""

import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fedmom.engine.own_state import attributes, changed, held_by, same, shared_by
from fedmom.errors import InputError
from fedmom.method.corrections import Correct, Correction, takes_key, takes_of_the_round
from fedmom.method.state import ClientState, Tree
from fedmom.rounds.round import Job
from fedmom.tasks.supervised import Batch, Supervised, one_of_batch
from fedmom.user_code import one_line


def look(problem: Supervised, start: ClientState, job: Job, correction: Correct | Correction | None) -> None:
    """One client's steps from one state on one minibatch, one from elsewhere between them, and evaluations, by a copy.

    Raises InputError naming the model (or algorithm.correction) and what makes its step another one each time.
    """
    twin = _Twin(problem, start, job)
    with _random_states() as before:
        twin.step()  # what is made at first use is made
        twin.check(before, _STEP)
        twin.judged()
        twin.check(before, _EVALUATION)
        twin.hold_more()
        # Training leaves what training left before, and evaluation what evaluation did: what is kept to be looked at
        # differs between the two. The step from another x in between moves what follows x (an average of its own).
        first, trained = twin.step(), twin.attributes()
        twin.check(before, _STEP)
        twin.step(_elsewhere(start.params))
        twin.check(before, _STEP)
        second = twin.step()
        twin.check_attributes(trained, _STEP)
        one, looked = twin.judged(), twin.attributes()
        other = twin.judged()
        twin.check(before, _EVALUATION)
        twin.check_attributes(looked, _EVALUATION)
        third, own = twin.step(), twin.step(of=problem)
        twin.check_attributes(trained, "an evaluation between two training steps")
    if name := _first_that_differs(first, second) or _first_that_differs(({}, {}, one), ({}, {}, other)):
        raise InputError(f"{problem.called}: {name} differs between two training steps from one state ({_REPEATED})")
    if name := _first_that_differs(first, third):
        raise InputError(f"{problem.called}: {name} differs between training steps before and after an evaluation")
    if name := _first_that_differs(first, own):
        why = "is another by a copy of the model, which must hold all that it uses"
        raise InputError(f"{problem.called}: {name} {why}")
    twin.check_state_dict()
    _check_buffers(problem, start, first[1])
    if correction is not None:
        look_at_any(correction, first[0], start)


class _Twin:
    """A copy of the model, which takes steps and evaluates on one minibatch of the first client."""

    def __init__(self, problem: Supervised, start: ClientState, job: Job) -> None:
        self.called, self.problem, self.start = problem.called, problem.in_dtype(problem.dtype), start
        fields = next(iter(problem.round_batches(job.clients[:1], job.first_steps[:1], 1)))
        self.batch = one_of_batch(fields, 0)
        self.held = _held(self.problem)

    def step(self, at: Tree | None = None, of: Supervised | None = None) -> tuple[Tree, Tree, Tensor]:
        """(gradients, buffers, loss) of a step from x `at`, or the start's, by the copy or the problem `of`."""
        at, of = self.start.params if at is None else at, of or self.problem
        own: Batch = tree_map(torch.clone, self.batch)  # which the model may write into
        params = {name: x.clone() for name, x in at.items()}
        grads, buffers, loss = of.gradient_alone(params, self.start.buffers, own)
        if name := _first_that_differs((params, {}, loss), (at, {}, loss), ""):
            raise InputError(f"{self.called}: a training step writes into the parameter {name}; {_OPTIMIZER}")
        return grads, buffers, loss

    def judged(self) -> Tensor:
        """The outputs of an evaluation, all in one row."""
        try:
            outputs = self.problem.judged(self.start, self.batch.x)
        except Exception:  # what fails in evaluation is said by check_evaluation, with the examples
            return torch.zeros(())
        found = [t.reshape(-1) for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
        return torch.cat(found) if found else torch.zeros(())

    def attributes(self) -> dict[str, Any]:
        """Copies of what its modules hold besides parameters, buffers and modules."""
        return attributes(self.problem.model)

    def hold_more(self) -> None:
        """Look from now on also at tensors that were made at first use."""
        self.held |= {name: t for name, t in _held(self.problem).items() if name not in self.held}

    def check(self, before: Mapping[str, Any], when: str) -> None:
        """InputError where random numbers were drawn since `before`, or a tensor that is no client's has changed."""
        if name := _drawn(before):
            raise InputError(f"{self.called}: draws random numbers of {name} in {when}; {_DROPOUT}")
        if name := changed(self.held, {name: t for name, t in _held(self.problem).items() if name in self.held}):
            if why := self.problem.places.constant.get(name, ""):
                advice = "the clients' have no mean; keep what changes in a buffer of finite real numbers or of int64"
                raise InputError(f"{self.called}: {when} changes the buffer {name}, which {why}: {advice}")
            raise InputError(f"{self.called}: {when} changes the tensor {name} of the model; {_STATE}")

    def check_attributes(self, before: dict[str, Any], when: str) -> None:
        """InputError where an attribute of a module is another than `before`."""
        if name := changed(before, self.attributes()):
            raise InputError(f"{self.called}: {when} changes {name} ({_STATE})")

    def check_state_dict(self) -> None:
        """InputError where the model cannot be handed out at the run's end."""
        try:
            self.problem.state_dict(self.start)
        except Exception as error:  # a user's own may raise anything
            raise InputError(f"{self.called}: the model's state_dict() fails ({one_line(error)})") from error


_STEP, _EVALUATION = "a training step", "an evaluation"
_DROPOUT = "use nn.Dropout layers, whose masks are addressed by (seed, client, step)"
_STATE = "clients have none of their own: register it as a buffer, or log by Python's logging or a callback"
_OPTIMIZER = "only the optimizer may move parameters"
_REPEATED = "a step must be the same whenever it is repeated"


def _elsewhere(params: Tree) -> Tree:
    """Another x, some per cent away; where x is 0, too."""
    moved = {}
    for name, x in params.items():
        wave = torch.cos(torch.arange(x.numel(), device=x.device)).reshape(x.shape).to(x.dtype)
        moved[name] = x + 0.01 * (x.abs() + 1e-3) * wave
    return moved


def _held(problem: Supervised) -> dict[str, Tensor]:
    """The model's own tensors, in whose places no client's stand: frozen, complex, sparse, infinite ones."""
    places = problem.places
    own = [*problem.model.named_parameters(), *problem.model.named_buffers()]
    free = {name: t for name, t in own if name not in places.params and name not in places.buffers}
    return {name: t.detach().clone() for name, t in free.items() if name not in places.dropout_keys}


def _check_buffers(problem: Supervised, start: ClientState, after: Tree) -> None:
    for name, b in start.buffers.items():
        if after[name].shape != b.shape or after[name].dtype != b.dtype:
            now = f"{list(b.shape)} {b.dtype} into {list(after[name].shape)} {after[name].dtype}"
            raise InputError(f"{problem.called}: a training step turns the buffer {name} from {now}; keep its shape")


def look_at_any(correction: Correct | Correction, grads: Tree, start: ClientState) -> None:
    """A look at a plain function, or at a class with state. Raises InputError that names what breaks its contract."""
    if isinstance(correction, Correction):
        look_at_memory(correction, grads, start)
    else:
        look_at_correction(correction, grads, start.params)


def look_at_memory(correction: Correction, grads: Tree, start: ClientState) -> None:
    """One client's round of one step twice, and the server's part of it.

    Raises InputError where the answers differ, random numbers were drawn, something beside the states has changed, or
    what was given is not what it was (through `.data`, which keeps no count of writes).
    """
    of = getattr(correction, "of", correction)  # the user's own object, in a wrapper that watches it
    owner = type(of)
    said, x = f"algorithm.correction: the class {owner.__name__}", start.params
    device, dtype = next(iter(x.values())).device, next(iter(x.values())).dtype
    count, lr = torch.ones((), dtype=torch.int64, device=device), torch.ones((), dtype=dtype, device=device)
    more = {"key": torch.zeros((), dtype=torch.int64, device=device)} if takes_key(correction) else {}
    answers, given = list[Tree](), list[tuple[Tree, Tree]]()

    def copied(tree: Tree) -> Tree:
        given.append((tree, {name: value.clone() for name, value in tree.items()}))
        return given[-1][1]

    with _random_states() as before:
        shared = shared_by(owner) | held_by(of)
        for _ in range(2):
            client, server = correction.start(copied(x))
            found = correction.gradient(copied(grads), copied(x), copied(x), copied(client), copied(server), **more)
            g, own = found if isinstance(found, tuple) else (found, client)
            after, message = correction.finish(copied(x), copied(x), copied(own), copied(server), count, lr)
            told = {"x_start": copied(x), "x_mean": copied(x), "total_lr": 1.0}
            wanted = {name: told[name] for name in takes_of_the_round(correction)}
            gathered = correction.gather(copied(server), copied(message), 0.5, **wanted)
            trees = {"g": g, "the client's": after, "the message's": message, "the server's": gathered}
            answers.append({f"{part} {name}": value for part, tree in trees.items() for name, value in tree.items()})
        if name := _drawn(before):
            advice = "give `gradient` a parameter `key`, and take fedmom.normal_like(g, key, number of g)"
            raise InputError(f"{said} draws random numbers of {name}, so that no run can be repeated; {advice}")
    nothing = torch.zeros(())
    for old, now in given:
        if name := _first_that_differs((now, {}, nothing), (old, {}, nothing), ""):
            raise InputError(f"{said} writes into the tensor {name} that it was given; return other tensors")
    if name := changed(shared, shared_by(owner) | held_by(of)):
        raise InputError(f"{said} changes {name} (what it remembers must be in the client's or the server's state)")
    if name := _first_that_differs((answers[0], {}, nothing), (answers[1], {}, nothing), ""):
        raise InputError(f"{said} gives two answers in the same place (of {name})")


def look_at_correction(correction: Correct, grads: Tree, params: Tree) -> None:
    """The same gradients twice.

    Raises InputError where the answers differ, random numbers were drawn, or x is not what it was (through `.data`,
    which keeps no count of writes).
    """
    said, device = "algorithm.correction: the function", next(iter(params.values())).device
    with _random_states() as before:
        more = {"key": torch.zeros((), dtype=torch.int64, device=device)} if takes_key(correction) else {}
        given = [{n: x.clone() for n, x in params.items()} for _ in range(2)]  # x, and the round's start
        function = inspect.unwrap(correction)
        owner = function if isinstance(function, FunctionType) else type(function)
        shared = shared_by(owner)
        answers = [correction({n: g.clone() for n, g in grads.items()}, *given, **more) for _ in range(2)]
        if name := _drawn(before):
            advice = "take a parameter `key`, and fedmom.normal_like(g, key, number of g)"
            raise InputError(f"{said} draws random numbers of {name}, so that no run can be repeated; {advice}")
    for x in given:
        if name := _first_that_differs((x, {}, torch.zeros(())), (params, {}, torch.zeros(())), ""):
            raise InputError(f"{said} writes into the parameter {name} that it was given; return other gradients")
    if name := changed(shared, shared_by(owner)):
        raise InputError(f"{said} changes {name} (a client's step knows its g, x and the round's start alone)")
    if name := _first_that_differs((answers[0], {}, torch.zeros(())), (answers[1], {}, torch.zeros(()))):
        raise InputError(f"{said} gives two answers for the same gradients (of {name})")


# --- random states -------------------------------------------------------------------------------------------

_GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "torch": (torch.get_rng_state, torch.set_rng_state),
    "numpy": (np.random.get_state, np.random.set_state),
    "Python's random": (random.getstate, random.setstate),
}


def _states() -> dict[str, Any]:
    found = {name: get() for name, (get, _) in _GENERATORS.items()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["torch.cuda"] = torch.cuda.get_rng_state()
    return found


@contextmanager
def _random_states() -> Iterator[dict[str, Any]]:
    """The states of the global generators, which are put back at the end."""
    before = _states()
    try:
        yield before
    finally:
        for name, (_, put) in _GENERATORS.items():
            put(before[name])
        if "torch.cuda" in before:
            torch.cuda.set_rng_state(before["torch.cuda"])


def _drawn(before: Mapping[str, Any]) -> str:
    """The generator that has moved on, or ""."""
    return next((name for name, state in _states().items() if name in before and not same(before[name], state)), "")


# --- gradients ------------------------------------------------------------------------------------------------


def _first_that_differs(
    one: tuple[Tree, Tree, Tensor], other: tuple[Tree, Tree, Tensor], of: str = "the gradient of "
) -> str:
    """The name of a gradient or buffer, or "the loss", that is not the same but for rounding."""
    pairs = [("the loss", one[2], other[2])]
    pairs += [(f"{of}{n}", g, other[0][n]) for n, g in one[0].items()]
    pairs += [(f"the buffer {n}", b, other[1][n]) for n, b in one[1].items()]
    sizes = [float(g.detach().abs().max()) for g in one[0].values() if g.numel()]
    scale = max((size for size in sizes if math.isfinite(size)), default=0.0)
    eps = 8 * torch.finfo(one[2].dtype).eps  # the same bits on a CPU; a card may add in another order
    for name, a, b in pairs:
        if not torch.allclose(a.detach().double(), b.detach().double(), eps, eps * scale, equal_nan=True):
            return name
    return ""
