"""SCAFFOLD of Karimireddy, Kale, Mohri, Reddi, Stich, Suresh (ICML 2020), Algorithm 1 with option II."""

from torch import Tensor

from fedmom.method.corrections import Correction
from fedmom.method.state import Tree


class Scaffold(Correction):
    """g <- g − c_i + c;  c_i⁺ = c_i − c + (x − y_i)/Σγ;  c <- c + Σ_cohort p_i (c_i⁺ − c_i), p_i of all N clients.

    y_i is the client's x at the end of the round, and Σγ is Iγ. Without momentum c_i⁺ is the mean of the client's
    gradients in the round, by their γ. Where nothing moves any more, x is the optimum for every I, and c = Σ p_i c_i
    at all times, whoever takes part.
    """

    shared_alone = True

    def start(self, params: Tree) -> tuple[Tree, Tree]:
        zeros = {name: 0 * x for name, x in params.items()}
        return _named("c", zeros), zeros

    def gradient(self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree) -> tuple[Tree, Tree]:
        return g | {name: g[name] - client[f"c {name}"] + c for name, c in server.items()}, client

    def finish(
        self, x: Tree, x_start: Tree, client: Tree, server: Tree, num_steps: Tensor, total_lr: Tensor
    ) -> tuple[Tree, Tree]:
        message = {name: (x_start[name] - x[name]) / total_lr - c for name, c in server.items()}
        return _named("c", {name: client[f"c {name}"] + change for name, change in message.items()}), message

    def gather(self, server: Tree, mean_message: Tree, share: float) -> Tree:
        return {name: c + share * mean_message[name] for name, c in server.items()}


class ScaffoldOfGradients(Scaffold):
    """The same with c_i⁺ = the mean of the client's gradients in the round.

    With momentum, or another local optimizer than SGD, a client's way divided by Σγ is no gradient: c_i would grow with
    what u remembers, and diverge. The mean of the gradients themselves is what option II stands for.
    """

    def start(self, params: Tree) -> tuple[Tree, Tree]:
        client, server = super().start(params)
        return client | _named("sum", server), server

    def gradient(self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree) -> tuple[Tree, Tree]:
        total = {name: client[f"sum {name}"] + g[name] for name in server}
        return super().gradient(g, x, x_start, client, server)[0], client | _named("sum", total)

    def finish(
        self, x: Tree, x_start: Tree, client: Tree, server: Tree, num_steps: Tensor, total_lr: Tensor
    ) -> tuple[Tree, Tree]:
        new = {name: client[f"sum {name}"] / num_steps for name in server}
        return client | _named("c", new), {name: new[name] - client[f"c {name}"] for name in server}

    def forgets(self, name: str) -> bool:
        return name.startswith("sum ")


def _named(kind: str, tree: Tree) -> Tree:
    return {f"{kind} {name}": value for name, value in tree.items()}
