"""The one table of local optimizers, which the keys, the engine and the policies read."""

from types import MappingProxyType

from fedmom.method.optimizers.adagrad import adagrad
from fedmom.method.optimizers.adam import adam
from fedmom.method.optimizers.adamw import adamw
from fedmom.method.optimizers.lion import lion
from fedmom.method.optimizers.optimizer import Optimizer
from fedmom.method.optimizers.sgd import sgd
from fedmom.method.optimizers.tracking import tracking
from fedmom.method.states.rules import StateRule

_ADAM = ("beta", "beta2", "eps")
OPTIMIZERS = {
    "sgd": Optimizer(
        sgd, "SGD with momentum u, options I and II: the paper", ("u",), reads=("beta", "nesterov"), linear=True
    ),
    "adamw": Optimizer(
        adamw,
        "AdamW: m and v, with weight decay beside the gradient",
        ("m", "v"),
        clocks=True,
        decoupled=True,
        reads=_ADAM,
        beta2=0.999,
    ),
    "adam": Optimizer(adam, "Adam: m and v", ("m", "v"), clocks=True, reads=_ADAM, beta2=0.999),
    "lion": Optimizer(
        lion,
        "Lion: the sign of a momentum m, with weight decay beside the gradient",
        ("m",),
        decoupled=True,
        reads=("beta", "beta2"),
        beta2=0.99,
    ),
    "adagrad": Optimizer(adagrad, "Adagrad: v, the sum of squared gradients", ("v",), reads=("eps",)),
    "gradient-tracking": Optimizer(
        tracking,
        "d-sgd-m alone: y follows the mean of all clients' gradients (Pu, Nedić 2018)",
        ("y", "g"),
        reads=(),
        gossip_only=True,
        rules=MappingProxyType({"y": StateRule("average"), "g": StateRule("local")}),
    ),
}
