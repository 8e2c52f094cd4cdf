"""One client's step and the server's, on numbers that a reader can follow and against torch's own optimizer."""

import pytest
import torch

from fedmom.method.outer import OuterNumbers, slowmo
from fedmom.method.state import ClientState
from fedmom.method.step import local_step
from laws import table

F64 = torch.float64
H, C = torch.tensor([0.5, 2.0], dtype=F64), torch.tensor([3.0, -1.0], dtype=F64)


def gradient(params, buffers, batch):
    """Of Σ h/2 (x − c)²."""
    return {"x": H * (params["x"] - C)}, buffers, (H * (params["x"] - C) ** 2).sum() / 2


def start() -> ClientState:
    x = torch.tensor([1.0, -2.0], dtype=F64)
    return ClientState({"x": x}, {"x": torch.zeros_like(x)}, {})


@table("nesterov", [False, True])
def test_weight_decay_is_in_the_gradient_as_in_torch_sgd(nesterov):
    """λx enters g, and so the momentum; γ changes on the way."""
    state, lrs = start(), [0.1, 0.1, 0.02, 0.02]
    x = state.params["x"].clone().requires_grad_()
    optimizer = torch.optim.SGD([x], 0.1, momentum=0.9, weight_decay=0.3, nesterov=nesterov)
    for lr in lrs:
        state, _ = local_step(state, None, gradient=gradient, lr=lr, beta=0.9, nesterov=nesterov, weight_decay=0.3)
        optimizer.param_groups[0]["lr"] = lr
        x.grad = (H * (x - C)).detach()
        optimizer.step()
    torch.testing.assert_close(state.params["x"], x.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(state.momentum["x"], optimizer.state[x]["momentum_buffer"], rtol=1e-14, atol=1e-14)


def test_a_correction_is_of_the_gradient_with_its_weight_decay():
    """Twice the gradient by a correction is twice (∇F + λx), not 2∇F + λx."""
    doubled = {"correction": lambda grads, params, at: {n: 2 * g for n, g in grads.items()}, "start": start().params}
    state, _ = local_step(start(), None, gradient=gradient, lr=1.0, beta=0.0, weight_decay=0.5, **doubled)
    # ∇F = (0.5 · −2, 2 · −1) = (−1, −2), λx = (0.5, −1): twice their sum is (−1, −6).
    assert state.momentum["x"].tolist() == [-1.0, -6.0]


def test_slow_momentum_by_hand():
    """u_s = ½ · 3 + (2 − 1)/½ = 3.5 and x = 2 − ¼ · ½ · 3.5 = 1.5625."""
    before, mean, slow = ({"x": torch.tensor([v], dtype=F64)} for v in (2.0, 1.0, 3.0))
    x, memory = slowmo(before, mean, {"b": slow}, 0.5, OuterNumbers(lr=0.25, momentum=0.5))
    assert memory["b"]["x"].item() == pytest.approx(3.5)
    assert x["x"].item() == pytest.approx(1.5625)
