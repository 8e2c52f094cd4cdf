"""Adam of Kingma and Ba (ICLR 2015), Algorithm 1, whose bias corrections keep clocks of their own."""

from torch import Tensor

from fedmom.method.optimizers.optimizer import Numbers
from fedmom.method.state import Tree


def adam(x: Tensor, states: Tree, g: Tensor, lr: float, by: Numbers) -> tuple[Tensor, Tree]:
    """m <- β₁m + (1−β₁)g;  v <- β₂v + (1−β₂)g²;  x <- x − γ (m/z_m) / (√(v/z_v) + ε).

    The clock z <- βz + (1−β) is the paper's 1 − β^t for a state that began at 0 t steps ago. It is a part of its state:
    averaged, mixed, reset and kept with it, so that it is right for a state that others made. Equal to
    torch.optim.Adam: λ is part of g.
    """
    m, z_m = by.beta * states["m"] + (1 - by.beta) * g, by.beta * states["m.clock"] + (1 - by.beta)
    v, z_v = by.beta2 * states["v"] + (1 - by.beta2) * g * g, by.beta2 * states["v.clock"] + (1 - by.beta2)
    x = x - lr * (m / z_m) / ((v / z_v).sqrt() + by.eps)
    return x, {"m": m, "v": v, "m.clock": z_m, "v.clock": z_v}
