"""Lion of Chen et al. (NeurIPS 2023), Algorithm 2."""

from torch import Tensor

from fedmom.method.optimizers.optimizer import Numbers
from fedmom.method.state import Tree


def lion(x: Tensor, states: Tree, g: Tensor, lr: float, by: Numbers) -> tuple[Tensor, Tree]:
    """x <- x − γ(sign(β₁m + (1−β₁)g) + λx) with the old m;  then m <- β₂m + (1−β₂)g."""
    m = states["m"]
    step = (by.beta * m + (1 - by.beta) * g).sign()
    if by.weight_decay:
        step = step + by.weight_decay * x
    return x - lr * step, {"m": by.beta2 * m + (1 - by.beta2) * g}
