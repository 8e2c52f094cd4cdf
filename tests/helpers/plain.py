"""Algorithm 1 in plain torch: one module after another, torch.optim.SGD, averages by hand.

It takes from fedmom what says which examples a step sees and which masks its dropout has, and nothing that computes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmom.data.batches import Sampler
from fedmom.data.datasets import Dataset
from fedmom.method.randomness import DROPOUT, random_bits
from fedmom.tasks.dropout import KEY, address_dropout

F64 = torch.float64


class Plain(NamedTuple):
    """What training came to."""

    start: dict[str, Tensor]  # x, u and the buffers before the first round, as "params/NAME", …
    end: dict[str, Tensor]  # and after the last
    train_losses: list[float]  # of every round
    test_losses: list[float]
    test_accuracies: list[float]


def train(
    build: Callable[[], nn.Module],
    data: Dataset,
    sampler: Sampler,
    *,
    num_rounds: int,
    num_local_steps: int,
    lr: float,
    beta: float,
    nesterov: bool,
    weight_decay: float,
    seed: int,
) -> Plain:
    """Clients weigh by how many examples they have. `build` is called under the run's seed, once per client."""

    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return address_dropout(build())._apply(_double).train()

    clients = [made() for _ in sampler.sizes]
    weights = (sampler.sizes.double() / sampler.sizes.sum()).tolist()
    mean = first = _state(clients[0], {})
    losses, test_losses, accuracies = [], [], []
    for r in range(num_rounds):
        ended, loss = [], 0.0
        for c, (model, weight) in enumerate(zip(clients, weights, strict=True)):
            params = {n: p for n, p in model.named_parameters() if p.requires_grad}
            sgd = torch.optim.SGD(params.values(), lr, beta, nesterov=nesterov, weight_decay=weight_decay)
            _load(model, sgd, mean)
            rows = sampler.draw(torch.tensor([c]), torch.tensor([r * num_local_steps]), num_local_steps)[0]
            for s in range(num_local_steps):
                key = random_bits(DROPOUT, seed, torch.tensor(c), torch.tensor(r * num_local_steps + s))
                for name, buffer in model.named_buffers():
                    if name.endswith(KEY):
                        buffer.copy_(key)
                sgd.zero_grad()
                value = cross_entropy(model(data.x_train[rows[s]].to(F64)), data.y_train[rows[s]])
                value.backward()
                for p in params.values():  # L2 weight decay is part of f: it acts on what the model leaves out, too
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
                sgd.step()
                loss += weight * value.item() / num_local_steps
            ended.append(_state(model, {n: sgd.state[p]["momentum_buffer"] for n, p in params.items()}))
        mean = _mean(ended, weights)
        losses.append(loss)
        _load(clients[0], None, mean)
        with torch.no_grad():
            logits = clients[0].eval()(data.x_test.to(F64, copy=True))
        clients[0].train()
        test_losses.append(cross_entropy(logits, data.y_test).item())
        accuracies.append((logits.argmax(1) == data.y_test).double().mean().item())
    return Plain(first, mean, losses, test_losses, accuracies)


def _double(t: Tensor) -> Tensor:
    return t.to(torch.complex128) if t.is_complex() else t.to(F64) if t.is_floating_point() else t


def _state(model: nn.Module, momentum: dict[str, Tensor]) -> dict[str, Tensor]:
    """Complex parameters as real and imaginary parts, without complex and infinite buffers, which have no mean."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[f"params/{name}"] = _real(p).detach().clone()
            found[f"momentum/{name}"] = _real(momentum.get(name, torch.zeros_like(p))).detach().clone()
    for name, buffer in model.named_buffers():
        if not (name.endswith(KEY) or buffer.is_complex() or torch.isinf(buffer).any()):
            found[f"buffers/{name}"] = buffer.detach().clone()
    return found


@torch.no_grad()
def _load(model: nn.Module, sgd: torch.optim.SGD | None, state: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        if f"params/{name}" in state:
            _real(p).copy_(state[f"params/{name}"])
            if sgd is not None:
                momentum = state[f"momentum/{name}"].clone()
                sgd.state[p]["momentum_buffer"] = torch.view_as_complex(momentum) if p.is_complex() else momentum
    for name, buffer in model.named_buffers():
        if f"buffers/{name}" in state:
            buffer.copy_(state[f"buffers/{name}"])


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _mean(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """x, u and real buffers by weights, running variances pooled, integers the largest (docs/method.md)."""

    def mean(values: list[Tensor]) -> Tensor:
        return sum(w * value for w, value in zip(weights, values, strict=True))  # type: ignore[return-value]

    found = {}
    for name in states[0]:
        values = [state[name] for state in states]
        if not values[0].is_floating_point():
            found[name] = torch.stack(values).amax(0)
        elif all(torch.equal(value, values[0]) for value in values):
            found[name] = values[0]
        else:
            found[name] = mean(values)
        middle = name.removesuffix("running_var") + "running_mean"
        if name.endswith("running_var") and middle in states[0]:
            means = [state[middle] for state in states]
            found[name] = mean(values) + mean([m**2 for m in means]) - mean(means) ** 2
    return found
