"""MimeLite of Karimireddy, Jaggi, Kale, Mohri, Reddi, Stich, Suresh (2020), Algorithm 1, with SGD's momentum."""

import torch
from torch import Tensor

from fedmom.method.corrections import Correction
from fedmom.method.state import Tree


class MimeLite(Correction):
    """g <- g + βm, with m as the round began;  then m <- βm + Σ p_i ∇f_i(x_start).

    So clients take the server's momentum as it is, and it moves once in a round, by gradients at x before the round.
    With one step a round that is momentum SGD. Ours: where f_i is of examples, ∇f_i(x_start) is the gradient of the
    round's first minibatch, which the client computes anyway, and not that of all its examples.
    """

    shared_alone = True

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def start(self, params: Tree) -> tuple[Tree, Tree]:
        zeros = {name: 0 * x for name, x in params.items()}
        first = torch.ones((), device=next((x.device for x in params.values()), None))
        return zeros | {_FIRST: first}, zeros

    def gradient(self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree) -> tuple[Tree, Tree]:
        # Written without an if, for clients that are stacked.
        at_start = {name: torch.where(client[_FIRST] > 0, g[name], client[name]) for name in server}
        moved = {name: g[name] + self.beta * m for name, m in server.items()}
        return g | moved, at_start | {_FIRST: torch.zeros_like(client[_FIRST])}

    def finish(
        self, x: Tree, x_start: Tree, client: Tree, server: Tree, num_steps: Tensor, total_lr: Tensor
    ) -> tuple[Tree, Tree]:
        return client, {name: client[name] for name in server}

    def gather(self, server: Tree, mean_message: Tree, share: float) -> Tree:
        return {name: self.beta * m + mean_message[name] for name, m in server.items()}

    def forgets(self, name: str) -> bool:
        return True


_FIRST = " first step"  # no parameter's name, which a leading blank tells
