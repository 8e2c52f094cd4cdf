"""FedProx of Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith (MLSys 2020), Algorithm 2."""

from dataclasses import dataclass

from fedmom.method.state import Tree


@dataclass(frozen=True)
class FedProx:
    """g <- g + μ (x − x_start): every client minimises f_i(x) + μ/2 ‖x − x_start‖².

    What a client keeps at home by algorithm.personal is held as well, to where the client itself began the round.
    """

    mu: float  # μ

    def __call__(self, g: Tree, x: Tree, x_start: Tree) -> Tree:
        return {name: g[name] + self.mu * (x[name] - x_start[name]) for name in g}
