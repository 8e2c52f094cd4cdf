"""Adagrad of Duchi, Hazan, Singer (JMLR 2011), in its diagonal form."""

from torch import Tensor

from fedmom.method.optimizers.optimizer import Numbers
from fedmom.method.state import Tree


def adagrad(x: Tensor, states: Tree, g: Tensor, lr: float, by: Numbers) -> tuple[Tensor, Tree]:
    """v <- v + g²;  x <- x − γ g / (√v + ε). Equal to torch.optim.Adagrad: λ is part of g."""
    v = states["v"] + g * g
    return x - lr * g / (v.sqrt() + by.eps), {"v": v}
