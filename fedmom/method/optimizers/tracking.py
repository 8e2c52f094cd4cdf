"""Gradient tracking of Pu and Nedić (2018), and of Nedić, Olshevsky, Shi (2017): DSGT, for Algorithm 2."""

from torch import Tensor

from fedmom.method.optimizers.optimizer import Numbers
from fedmom.method.state import Tree


def tracking(x: Tensor, states: Tree, g: Tensor, lr: float, by: Numbers) -> tuple[Tensor, Tree]:
    """y <- y + g − g_before;  x <- x − γy, where y and g_before are 0 at first.

    Under Algorithm 2 both x and y are mixed by W, and every client keeps its g: the mean of y is the mean of the last
    gradients, so that x stands still at the optimum of all clients for any number of local steps.
    """
    y = states["y"] + g - states["g"]
    return x - lr * y, {"y": y, "g": g}
