"""AdamW of Loshchilov and Hutter (ICLR 2019), Algorithm 2: Adam, with the weight decay beside the gradient."""

from torch import Tensor

from fedmom.method.optimizers.adam import adam
from fedmom.method.optimizers.optimizer import Numbers
from fedmom.method.state import Tree


def adamw(x: Tensor, states: Tree, g: Tensor, lr: float, by: Numbers) -> tuple[Tensor, Tree]:
    """x <- (1 − γλ)x, then Adam's step by g alone. Equal to torch.optim.AdamW."""
    return adam(x - lr * by.weight_decay * x if by.weight_decay else x, states, g, lr, by)
