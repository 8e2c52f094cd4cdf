"""FedCM of Xu, Wang, Wang, Yao (2021), Algorithm 1: a momentum that the server makes, and every client steps by."""

from fedmom.method.corrections import Correction
from fedmom.method.state import Tree

_UNTOLD: Tree = {}  # never written into


class FedCM(Correction):
    """g <- αg + (1−α)D;  D <- (x − x̂)/(Iγ) of the round.

    D is the mean of what the clients stepped by, without momentum of their own. The server makes it of x before the
    round and x̂, so that nothing more is sent up; with outer steps, of x̂ before these. Where clients take steps of
    other numbers or γ, Iγ is the mean of their Σγ.
    """

    shared_alone = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def start(self, params: Tree) -> tuple[Tree, Tree]:
        return {}, {name: 0 * x for name, x in params.items()}

    def gradient(self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree) -> Tree:
        return g | {name: self.alpha * g[name] + (1 - self.alpha) * d for name, d in server.items()}

    def gather(
        self,
        server: Tree,
        mean_message: Tree,
        share: float,
        x_start: Tree = _UNTOLD,
        x_mean: Tree = _UNTOLD,
        total_lr: float = 0.0,
    ) -> Tree:
        return {name: (x_start[name] - x_mean[name]) / total_lr for name in server} if total_lr else server
