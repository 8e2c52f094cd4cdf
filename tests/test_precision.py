"""Storage in bfloat16 and products in TF32: options, with an error that is bounded and what it should be."""

import pytest
import torch

from fedmom.config import load
from fedmom.convolutions import _described
from fedmom.errors import InputError
from fedmom.resolve import resolve
from fedmom.setup import set_up_torch
from runs import F64, image_task, run_plan, simple_plan


@pytest.fixture
def torch_as_it_was():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[:2]
    torch.set_num_threads(before[2])


def error(found, exact, start):
    """‖x − exact‖ over how far the exact run went, the worst tensor."""
    return max(
        float((x.double() - exact.params[n]).norm() / (exact.params[n] - start.params[n]).norm())
        for n, x in found.params.items()
    )


@pytest.mark.parametrize(
    ("model", "path"), [("cnn", "loop"), ("mlp", "vmap"), ("cnn", "vmap"), ("cnn", "stack"), ("mlp", "factors")]
)
def test_bfloat16_is_near_float64(model, path):
    """Three rounds: bfloat16 keeps 8 bits, so a step is right to a few per cent; float32 is right to 1e-5."""
    plan = simple_plan(3, lr=0.1)
    exact_task = image_task(model, 3)
    exact = run_plan(exact_task, plan)[0].state
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        task = image_task(model, 3, dtype=dtype)
        done, _ = run_plan(task, plan, path=path)
        assert all(x.dtype == dtype for x in done.state.params.values())
        errors[dtype] = error(done.state, exact, exact_task.start())
    assert errors[torch.float32] < 1e-4
    assert errors[torch.bfloat16] < 0.3


def test_a_task_in_another_dtype_leaves_the_first_alone():
    task = image_task("mlp", 3, dtype=torch.bfloat16)
    twin = task.in_dtype(F64)
    assert {x.dtype for x in twin.start().params.values()} == {F64}
    assert {x.dtype for x in task.start().params.values()} == {torch.bfloat16}


@pytest.mark.parametrize("changes", [{"run.backend": "simulation"}, {"engine.workers": 2}], ids=str)
def test_bfloat16_does_not_travel(changes):
    with pytest.raises(InputError, match=r"run\.dtype = 'bfloat16'"):
        resolve(load({"run.dtype": "bfloat16", **changes}))


@pytest.mark.parametrize(("matmul", "allowed"), [("float32", False), ("tf32", True)])
def test_tf32_is_a_key(torch_as_it_was, matmul, allowed):
    """torch's own default is TF32 in convolutions and not in products; here both are as the key says."""
    set_up_torch(load({"engine.matmul": matmul}).config.engine)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)


def test_on_a_cpu_tf32_is_no_other_shape(torch_as_it_was):
    x, w = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 1, 3, 3)
    options = ((1, 1), (0, 0), (1, 1), False, [0, 0], 1)
    shapes = set()
    for matmul in ("float32", "tf32"):
        set_up_torch(load({"engine.matmul": matmul}).config.engine)
        shapes.add(_described(x, w, None, False, options))
    assert len(shapes) == 1
