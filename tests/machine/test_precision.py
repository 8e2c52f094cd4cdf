"""Storage in bfloat16 and products in TF32: options, with an error that is bounded and what it should be."""

import contextlib
import functools
import itertools

import pytest
import torch

from fedmom.config.build import set_up_torch
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.engine.stacked.convolutions import _described
from fedmom.engine.stacked.updates.sgd import first_update, update
from fedmom.errors import InputError
from fedmom.machine.precision import allow_tf32, convolves_in_tf32, multiplies_in_tf32
from fedmom.method.algorithms import Method
from fedmom.method.optimizers.sgd import sgd
from laws import table
from pretend_cuda import pretend
from runs import F64, image_problem, run_plan, simple_plan


@pytest.fixture
def torch_as_it_was():
    with left_as_it_was():
        yield


@contextlib.contextmanager
def left_as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.fp32_precision = "none"
    allow_tf32(False)
    torch.set_num_threads(threads)


def error(found, exact, start):
    """‖x − exact‖ over how far the exact run went, the worst tensor."""
    return max(
        float((x.double() - exact.params[n]).norm() / (exact.params[n] - start.params[n]).norm())
        for n, x in found.params.items()
    )


@functools.cache
def in_float64(model):
    """(problem, state): three rounds, one client after another."""
    problem = image_problem(model, 3)
    return problem, run_plan(problem, simple_plan(3, lr=0.1))[0].state


@table("model, path", [("cnn", "loop"), ("mlp", "vmap"), ("cnn", "vmap"), ("cnn", "stack"), ("mlp", "factors")])
def test_bfloat16_is_near_float64(model, path):
    """Three rounds: bfloat16 keeps 8 bits, so a step is right to a few per cent; float32 is right to 1e-5."""
    plan, errors = simple_plan(3, lr=0.1), {}
    exact_problem, exact = in_float64(model)
    for dtype in (torch.bfloat16, torch.float32):
        problem = image_problem(model, 3, dtype=dtype)
        done, _ = run_plan(problem, plan, path=path)
        assert all(x.dtype == dtype for x in done.state.params.values())
        errors[dtype] = error(done.state, exact, exact_problem.start())
    assert errors[torch.float32] < 1e-4
    assert errors[torch.bfloat16] < 0.3


def test_a_task_in_another_dtype_leaves_the_first_alone():
    problem = image_problem("mlp", 3, dtype=torch.bfloat16)
    twin = problem.in_dtype(F64)
    assert {x.dtype for x in twin.start().params.values()} == {F64}
    assert {x.dtype for x in problem.start().params.values()} == {torch.bfloat16}


@table("changes", [{"server.strategy": "fedavg"}, {"engine.workers": 2}])
def test_bfloat16_does_not_go_where_arrays_are_numpys(changes):
    with pytest.raises(InputError, match=r"run\.dtype = 'bfloat16'"):
        resolve(load({"run.dtype": "bfloat16", **changes}))


@table("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_the_updates_are_the_methods_in_every_dtype(monkeypatch, dtype):
    """Also with γ as a tensor. On a CPU torch 2.11's fused SGD writes garbage in 16 bits, from the 16th number on."""
    fused = torch._fused_sgd_

    def as_in_torch_2_11(xs, *rest, **options):
        fused(xs, *rest, **options)
        if dtype.itemsize < 4:
            xs[0].flatten()[16:] = 7.0

    monkeypatch.setattr(torch, "_fused_sgd_", as_in_torch_2_11)
    bound = 4 * torch.finfo(dtype).eps  # a rounding for each operation
    cases = itertools.product(
        [0.1, torch.tensor(0.1, dtype=F64)], [(0.9, True, 0.01), (0.9, False, 0.0), (0.0, False, 0.01)]
    )
    for lr, (beta, nesterov, weight_decay) in cases:
        method = Method(beta, nesterov, weight_decay)
        x, u, g = (torch.linspace(-1, 1, 40).roll(place).to(dtype) for place in (0, 7, 20))
        grads = g.double() + weight_decay * x.double()
        want_x, after = sgd(x.double(), {"u": u.double()}, grads, 0.1, method.numbers)
        rows = first_update(method, x, u, g.expand(2, -1).clone(), lr)
        update(method, [x], [u], [g], lr)
        for own, right in zip((x, u), (want_x, after["u"]), strict=True):
            torch.testing.assert_close(own.double(), right, rtol=bound, atol=bound)
        for own, right in zip(rows, (want_x, after["u"]), strict=True):
            torch.testing.assert_close(own.double(), right.expand(2, -1), rtol=bound, atol=bound)


USERS = {
    "nothing": "pass",
    "the old way": "b.cuda.matmul.allow_tf32 = True; b.cudnn.allow_tf32 = False",
    "one kind, the new way": "b.cudnn.conv.fp32_precision = 'ieee'",
    "all kinds, the new way": "b.fp32_precision = 'tf32'",
    "cuDNN, the new way": "b.cudnn.fp32_precision = 'tf32'; b.cuda.matmul.fp32_precision = 'ieee'",
    "by words": "torch.set_float32_matmul_precision('medium')",
}


@table("user", USERS)
def test_tf32_is_a_key_whatever_the_user_set(user):
    """torch's own default is TF32 in convolutions and not in products; here both are as the key says."""
    b = torch.backends
    with left_as_it_was(), pretend():
        x = torch.zeros(1, device="cuda")
        for matmul, allowed in (("float32", False), ("tf32", True), ("float32", False)):
            exec(USERS[user], {"torch": torch, "b": b})
            convolves_in_tf32(x), multiplies_in_tf32(x)  # may be asked before the first engine is made
            set_up_torch(load({"engine.matmul": matmul}).config.engine)
            assert (b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, convolves_in_tf32(x)) == (allowed,) * 3
            new = {part.fp32_precision for part in (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn)}
            assert new == {"tf32" if allowed else "ieee"}
            assert multiplies_in_tf32(x) == allowed
            assert not convolves_in_tf32(x.double())
            assert not multiplies_in_tf32(x.double())
            torch.get_float32_matmul_precision()  # raises where both ways disagree


def test_on_a_cpu_tf32_is_no_other_shape(torch_as_it_was):
    x, w = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 1, 3, 3)
    options = ((1, 1), (0, 0), (1, 1), False, [0, 0], 1)
    shapes = set()
    for matmul in ("float32", "tf32"):
        set_up_torch(load({"engine.matmul": matmul}).config.engine)
        shapes.add(_described(x, w, None, False, options))
    assert len(shapes) == 1
