"""SGD with momentum: Polyak's (option I) and Nesterov's (option II) of Yu, Jin, Yang (ICML 2019), Algorithm 1."""

from torch import Tensor

from fedmom.method.optimizers.optimizer import Numbers
from fedmom.method.state import Tree


def sgd(x: Tensor, states: Tree, g: Tensor, lr: float, by: Numbers) -> tuple[Tensor, Tree]:
    """u <- βu + g;  x <- x − γu (option I)  or  x <- x − γ(βu + g) with the new u (option II).

    γ stays outside u, so that a schedule changes the step and not the memory. Equal to torch.optim.SGD(momentum=β,
    dampening=0) without and with nesterov=True. λ is part of g.
    """
    u = by.beta * states["u"] + g
    step = by.beta * u + g if by.nesterov else u
    return x - lr * step, {"u": u}
