"""The test bench: f_i(x) = Σ_k h_ik/2 (x_k − c_ik)², whose every number can be checked by hand.

Clients with different curvatures are the smallest problem on which averaging, keeping and resetting the momentum
end at different points (docs/method.md).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.method.randomness import NOISE, normal
from fedmom.method.state import ClientState, Tree, initial_state

X = "x"  # the name of the one parameter


class Sample(NamedTuple):
    """One client's step; stacked, every field gains a leading K."""

    h: Tensor  # [d] curvatures
    c: Tensor  # [d] center
    noise: Tensor  # [d] what is added to the exact gradient


class Quadratic:
    """N clients with curvatures h [N, d] and centers c [N, d]; exact gradients plus Gaussian noise of deviation σ."""

    small = True
    personal: frozenset[str] = frozenset()
    measures: tuple[str, ...] = ("loss", "optimal_loss", "optimum", "distance")

    def __init__(
        self,
        curvatures: Sequence[Sequence[float]],
        centers: Sequence[Sequence[float]],
        start: Sequence[float],
        *,
        noise_sigma: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.h = torch.tensor(curvatures, dtype=dtype, device=self.device)
        self.c = torch.tensor(centers, dtype=dtype, device=self.device)
        self.x0 = torch.tensor(start, dtype=dtype, device=self.device)
        self.noise_sigma, self.seed = noise_sigma, seed
        self.sizes = np.ones(len(self.h), dtype=np.int64)

    def start(self) -> ClientState:
        return initial_state({X: self.x0.clone()}, {})

    def round_batches(self, clients: Tensor, first_steps: Tensor, num_steps: int) -> Iterator[Sample]:
        places = clients.to(self.device)
        h, c = self.h[places], self.c[places]
        coordinate = torch.arange(h.shape[1])
        for s in range(num_steps):
            noise = torch.zeros_like(h)
            if self.noise_sigma:
                address = (NOISE, self.seed, clients[:, None], (first_steps + s)[:, None], coordinate)
                noise = (self.noise_sigma * normal(*address)).to(self.device, h.dtype)
            yield Sample(h, c, noise)

    def gradient_alone(self, params: Tree, buffers: Tree, sample: Sample) -> tuple[Tree, Tree, Tensor]:
        return self.gradient(params, buffers, sample)

    def gradient(self, params: Tree, buffers: Tree, sample: Sample) -> tuple[Tree, Tree, Tensor]:
        """h (x − c) + noise, in that order of operations: the golden runs are compared bit for bit."""
        away = params[X] - sample.c
        return {X: sample.h * away + sample.noise}, buffers, (sample.h * away**2).sum() / 2

    def optimum(self) -> Tensor:
        """[d] the minimiser of the mean objective, Σ h c / Σ h."""
        return (self.h * self.c).sum(0) / self.h.sum(0)

    def state_dict(self, state: ClientState) -> Tree:
        return {X: state.params[X].clone()}

    def check_evaluation(self, state: ClientState) -> None:
        """Nothing can fail."""

    def evaluate(self, state: ClientState) -> dict[str, Any]:
        """At the mean model: "loss" (1/N) Σ f_i(x̄), "optimal_loss", "optimum" x_opt [d], "distance" ‖x̄ − x_opt‖."""

        def objective(x: Tensor) -> float:
            return float((self.h * (x - self.c) ** 2).sum() / 2 / len(self.h))

        x, best = state.params[X], self.optimum()
        return {
            "loss": objective(x),
            "optimal_loss": objective(best),
            "optimum": best.tolist(),
            "distance": float(torch.linalg.vector_norm(x - best)),
        }

    def evaluate_clients(self, state: ClientState, clients: Tensor) -> dict[str, float]:
        """ "loss": the mean of f_i(x) over clients [K]."""
        places = clients.to(self.device)
        h, c = self.h[places], self.c[places]
        return {"loss": float((h * (state.params[X] - c) ** 2).sum() / 2 / len(clients))}

    own_sizes: np.ndarray | None = None  # there are no examples to hold out

    def evaluate_own(self, state: ClientState) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def evaluate_own_rows(self, rows: ClientState, clients: Tensor) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def activation_bytes(self, start: ClientState) -> int:
        return 4 * self.x0.numel() * self.x0.element_size()
