"""Your own algorithm with state: SCAFFOLD (Karimireddy et al., ICML 2020), and a FedProx with memory.

    python examples/memory.py

A class is all of it: algorithm.correction = "memory:Scaffold" has every client keep a state between rounds.
"""

from torch import Tensor

import fedmom

Tree = dict[str, Tensor]
MU = 1.0
CONFIG = {  # three quadratics, whose optimum is 11/7; with I > 1 plain local steps end beside it
    "data": {"dataset": "quadratic", "curvatures": "0.5; 2; 1", "centers": "-1; 3; 0", "start": "0"},
    "algorithm": {"name": "local-sgd", "lr": 0.05, "num-local-steps": 5},
    "run": {"num-rounds": 300, "eval-every": 300},
}


class Scaffold(fedmom.Correction):
    """g − c_i + c, with c_i the mean gradient of the client's last round and c the mean of all c_i.

    With β = 0 that c_i is option II of the paper, c_i − c + (x_start − x) / Σγ, for a constant γ. With β > 0 it is not,
    and the displacement diverges, so the gradients themselves are added up.
    """

    def start(self, params: Tree) -> tuple[Tree, Tree]:
        zeros = {name: 0 * x for name, x in params.items()}
        return {**_named("c", zeros), **_named("sum", zeros)}, zeros

    def gradient(self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree) -> tuple[Tree, Tree]:
        total = {name: client[f"sum {name}"] + g[name] for name in g}
        return {n: g[n] - client[f"c {n}"] + server[n] for n in g}, client | _named("sum", total)

    def finish(
        self, x: Tree, x_start: Tree, client: Tree, server: Tree, num_steps: Tensor, total_lr: Tensor
    ) -> tuple[Tree, Tree]:
        new = {name: client[f"sum {name}"] / num_steps for name in x}
        message = {name: new[name] - client[f"c {name}"] for name in x}
        return {**_named("c", new), **_named("sum", {name: 0 * g for name, g in new.items()})}, message

    def gather(self, server: Tree, mean_message: Tree, share: float) -> Tree:
        return {name: c + share * mean_message[name] for name, c in server.items()}


class ProximalWithMemory(fedmom.Correction):
    """g + λ_i − λ + μ (x − x_start): FedProx whose pull back is remembered, λ_i ← λ_i − λ + μ (x − x_start); ours.

    λ is the mean of all λ_i. Where nothing moves any more, λ_i = −∇f_i, so the proximal term's own bias is gone.
    """

    def start(self, params: Tree) -> tuple[Tree, Tree]:
        zeros = {name: 0 * x for name, x in params.items()}
        return zeros, zeros

    def gradient(self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree) -> Tree:
        return {n: g[n] + client[n] - server[n] + MU * (x[n] - x_start[n]) for n in g}

    def finish(
        self, x: Tree, x_start: Tree, client: Tree, server: Tree, num_steps: Tensor, total_lr: Tensor
    ) -> tuple[Tree, Tree]:
        message = {n: MU * (x[n] - x_start[n]) - server[n] for n in x}
        return {n: client[n] + message[n] for n in x}, message

    def gather(self, server: Tree, mean_message: Tree, share: float) -> Tree:
        return {name: mean + share * mean_message[name] for name, mean in server.items()}


def proximal(g: Tree, x: Tree, x_start: Tree) -> Tree:
    """FedProx (Li et al. 2020), to compare with: it remembers nothing."""
    return {name: g[name] + MU * (x[name] - x_start[name]) for name in g}


def _named(kind: str, tree: Tree) -> Tree:
    return {f"{kind} {name}": value for name, value in tree.items()}


def main() -> float:
    away = {}
    for name in ("none", "memory:proximal", "memory:ProximalWithMemory", "memory:Scaffold"):
        result = fedmom.run(CONFIG, sets={"algorithm.correction": name})
        away[name] = result.rounds[-1]["distance"]
        print(f"{name:26} from the optimum {away[name]:.1e}, {result.rounds[-1]['bytes_sent']:,} bytes sent")
    return away["none"] - max(away["memory:Scaffold"], away["memory:ProximalWithMemory"])


if __name__ == "__main__":
    main()
