"""A look at the user's model and correction before the first round: can a step be repeated, and is its state all there?

A run must give the same numbers whoever asks for a client's step, and in whatever order. So a step may not depend on
random numbers that nobody addressed, nor on attributes that a forward pass changes: no client has those of its own.
"""

import contextlib
import copy
import inspect
import itertools
import math
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor, nn

from fedmom.algorithms import Correction, takes_key
from fedmom.errors import InputError
from fedmom.imports import is_own_file, one_line
from fedmom.objective import Batch, Classification
from fedmom.rounds import Round
from fedmom.state import ClientState, Tree

_KEPT = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def look(task: Classification, start: ClientState, job: Round, correction: Correction | None) -> None:
    """One client's step three times, from the same state on the same minibatch, by a copy of the model.

    Raises InputError naming the model (or algorithm.correction) and what makes its step another one each time.
    """
    twin = task.in_dtype(task.dtype)
    batch = Batch(*(field[0] for field in next(iter(task.round_batches(job.clients[:1], job.first_steps[:1], 1)))))
    held = _held(twin)

    def step(of: Classification, at: Tree = start.params) -> tuple[Tree, Tree, Tensor]:
        own = Batch(*(field.clone() for field in batch))  # which the model may write into
        params = {name: x.clone() for name, x in at.items()}
        grads, buffers, loss = of.gradient_alone(params, start.buffers, own)
        if name := _first_that_differs((params, {}, loss), (at, {}, loss), ""):
            raise InputError(f"{task.called}: a training step writes into the parameter {name}; {_OPTIMIZER}")
        return grads, buffers, loss

    def judged() -> Tensor:
        try:
            logits = twin.judged(start, batch.x)
        except Exception:  # what fails in evaluation is said by check_evaluation, with the examples
            return torch.zeros(())
        return logits if isinstance(logits, Tensor) else torch.zeros(())

    def check(before: Mapping[str, Any], when: str) -> None:
        if name := _drawn(before):
            raise InputError(f"{task.called}: draws random numbers of {name} in {when}; {_DROPOUT}")
        if name := _changed(held, {name: t for name, t in _held(twin).items() if name in held}):
            if why := twin.places.constant.get(name, ""):
                advice = "the clients' have no mean; keep what changes in a buffer of finite real numbers or of int64"
                raise InputError(f"{task.called}: {when} changes the buffer {name}, which {why}: {advice}")
            raise InputError(f"{task.called}: {when} changes the tensor {name} of the model; {_STATE}")

    def unchanged(before: dict[str, Any], after: dict[str, Any], when: str) -> None:
        if name := _changed(before, after):
            advice = _LOGS if "the attribute" not in name else _STATE
            raise InputError(f"{task.called}: {when} changes {name} ({advice})")

    with _random_states() as before:
        step(twin)  # what is made at first use is made
        check(before, "a training step")
        judged()
        check(before, "an evaluation")
        held |= {name: t for name, t in _held(twin).items() if name not in held}
        # Training leaves what training left before, and evaluation what evaluation did: what is kept to be looked at
        # differs between the two. The step from another x in between moves what follows x (an average of its own).
        first, trained = step(twin), _attributes(twin.model)
        check(before, "a training step")
        step(twin, _elsewhere(start.params))
        check(before, "a training step")
        second = step(twin)
        unchanged(trained, _attributes(twin.model), "a training step")
        one, looked = judged(), _attributes(twin.model)
        other = judged()
        check(before, "an evaluation")
        unchanged(looked, _attributes(twin.model), "an evaluation")
        third, own = step(twin), step(task)
        unchanged(trained, _attributes(twin.model), "an evaluation between two training steps")
    if name := _first_that_differs(first, second) or _first_that_differs(({}, {}, one), ({}, {}, other)):
        raise InputError(f"{task.called}: {name} differs between two training steps from one state ({_REPEATED})")
    if name := _first_that_differs(first, third):
        raise InputError(f"{task.called}: {name} differs between training steps before and after an evaluation")
    if name := _first_that_differs(first, own):
        raise InputError(f"{task.called}: {name} is another by a copy of the model, which must hold all that it uses")
    try:
        twin.state_dict(start)
    except Exception as error:  # a user's own may raise anything
        raise InputError(f"{task.called}: the model's state_dict() fails ({one_line(error)})") from error
    _check_buffers(task, start, first[1])
    if correction is not None:
        look_at_correction(correction, first[0], start.params)


_DROPOUT = "use nn.Dropout layers, whose masks are addressed by (seed, client, step)"
_STATE = "clients have no attributes of their own; register it as a buffer"
_LOGS = "clients have no variables of their own; register it as a buffer, or log by Python's logging or a callback"
_OPTIMIZER = "only the optimizer may move parameters"
_REPEATED = "a step must be the same whenever it is repeated"


def _elsewhere(params: Tree) -> Tree:
    """Another x, one per cent away."""
    return {name: x * (1 + 0.01 * torch.cos(torch.arange(x.numel(), device=x.device)).reshape(x.shape).to(x.dtype))
            for name, x in params.items()}  # fmt: skip


def _held(task: Classification) -> dict[str, Tensor]:
    """The model's own tensors, in whose places no client's stand: frozen, complex, sparse, infinite ones."""
    places = task.places
    own = [*task.model.named_parameters(), *task.model.named_buffers()]
    free = {name: t for name, t in own if name not in places.params and name not in places.buffers}
    return {name: t.detach().clone() for name, t in free.items() if name not in places.dropout_keys}


def _check_buffers(task: Classification, start: ClientState, after: Tree) -> None:
    for name, b in start.buffers.items():
        if after[name].shape != b.shape or after[name].dtype != b.dtype:
            now = f"{list(b.shape)} {b.dtype} into {list(after[name].shape)} {after[name].dtype}"
            raise InputError(f"{task.called}: a training step turns the buffer {name} from {now}; keep its shape")


def look_at_correction(correction: Correction, grads: Tree, params: Tree) -> None:
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
        shared = _shared(owner)
        answers = [correction({n: g.clone() for n, g in grads.items()}, *given, **more) for _ in range(2)]
        if name := _drawn(before):
            advice = "take a parameter `key`, and fedmom.randomness.normal_like(g, key, number of g)"
            raise InputError(f"{said} draws random numbers of {name}, so that no run can be repeated; {advice}")
    for x in given:
        if name := _first_that_differs((x, {}, torch.zeros(())), (params, {}, torch.zeros(())), ""):
            raise InputError(f"{said} writes into the parameter {name} that it was given; return other gradients")
    if name := _changed(shared, _shared(owner)):
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
    return next((name for name, state in _states().items() if name in before and not _same(before[name], state)), "")


# --- attributes ----------------------------------------------------------------------------------------------


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Copies of what modules hold besides parameters, buffers and modules; of what cannot be copied nothing."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in _KEPT or key.endswith("_hooks") or isinstance(value, nn.Module):
                continue
            at = f"the attribute {key!r} of {type(module).__name__}" + (f" {name!r}" if name else "")
            with contextlib.suppress(Exception):  # a user's object may refuse
                found[at] = _copy(value)
    return found | _shared(*{cls for module in model.modules() for cls in type(module).__mro__})


def _shared(*owners: type | Callable[..., Any]) -> dict[str, Any]:
    """Copies of what stands on the user's own classes and functions, and in global variables beside these.

    owners: a model's classes, or a correction. Of their files, and of the user's files that these name.
    """
    found = dict[str, Any]()
    for owner in owners:
        if _own_file(owner.__module__) is not None:
            _add(found, vars(owner), f"of the {'class' if isinstance(owner, type) else 'function'} {owner.__name__}")
    homes = {id(home): home for owner in owners if (home := _own_file(owner.__module__)) is not None}
    for home in [*homes.values()]:
        named = [value for value in vars(home).values() if isinstance(value, ModuleType | FunctionType | type)]
        names = {value.__name__ if isinstance(value, ModuleType) else value.__module__ for value in named}
        homes |= {id(own): own for name in names if (own := _own_file(name)) is not None}
    for home in homes.values():
        for value in vars(home).values():
            if isinstance(value, type | FunctionType) and value.__module__ == home.__name__:
                kind = "class" if isinstance(value, type) else "function"
                _add(found, vars(value), f"of the {kind} {value.__name__}")
        _add(found, vars(home), f"of {home.__name__}, a global variable")
    return found


def _own_file(name: str | None) -> ModuleType | None:
    home = sys.modules.get(name or "")
    return home if home is not None and is_own_file(getattr(home, "__file__", None) or "<") else None


def _add(found: dict[str, Any], values: Mapping[str, Any], of: str) -> None:
    for key, value in [*values.items()]:
        own = isinstance(value, _COUNTS) or _own_file(type(value).__module__) is not None
        if own and not key.startswith("__") and not isinstance(value, _NO_STATE):
            with contextlib.suppress(Exception):  # a user's object may refuse
                found[f"{key!r} {of}"] = _copy(value, most=_MANY)


# What a class or a file counts, collects and draws with, beside objects of the user's own classes. What holds more
# values than so many (the data, say) is passed over.
_COUNTS = (
    *(bool, int, float, complex, str, Tensor, np.ndarray, list, dict, deque, set, itertools.count),
    *(torch.Generator, np.random.Generator, random.Random),
)
_MANY = 10_000


def _size(value: Any) -> int:
    if isinstance(value, Tensor | np.ndarray):
        return math.prod(value.shape)
    return len(value) if isinstance(value, Sized) else 1


def _copy(value: Any, depth: int = 4, most: float = math.inf) -> Any:
    """What can be compared later: tensors, arrays, plain values, and what objects of the user's own hold of them.

    most: numbers of a tensor, or values of a container; None for what has more.
    """
    if _size(value) > most:
        return None
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return _copy(value.bit_generator.state, most=most)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, itertools.count):
        return repr(value)
    if depth == 0 or isinstance(value, _NO_STATE):
        return None
    if isinstance(value, dict):
        return {key: _copy(v, depth - 1, most) for key, v in value.items()}
    if isinstance(value, list | tuple | deque):
        return [_copy(v, depth - 1, most) for v in value]
    if hasattr(value, "__dict__"):
        return _copy(vars(value), depth - 1, most)
    return copy.deepcopy(value)


# What holds nothing that a step could change, or is looked at by itself.
_NO_STATE = (
    nn.Module,
    ReferenceType,
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    torch.dtype,
    torch.device,
)


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    return next((name for name, value in after.items() if not _same(before.get(name), value)), "")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
            return False
        if one.layout != torch.strided:
            one, other = one.to_dense(), other.to_dense()
        if one.is_quantized or not (one.is_floating_point() or one.is_complex()):
            return torch.equal(one, other)
        finite = one.abs()[torch.isfinite(one)]
        scale = float(finite.max()) if finite.numel() else 0.0
        return torch.allclose(one, other, 1e-6, 1e-6 * scale, equal_nan=True)  # a card may add in another order
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if type(one) is not type(other):
        return False
    compared = False
    for compare in (lambda: bool(one == other), lambda: pickle.dumps(one) == pickle.dumps(other)):
        try:
            if compare():
                return True
            compared = True
        except Exception:  # a user's object may refuse
            continue
    return not compared  # what cannot be compared is not said to differ


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
