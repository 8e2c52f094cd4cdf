"""Your own algorithm: FedProx's proximal term (Li et al. 2020) on top of averaged momentum.

    python examples/fedprox.py

`proximal` is all of it: algorithm.correction = "fedprox:proximal" changes every local gradient of a client.
"""

from torch import Tensor

import fedmom

MU = 0.01
CONFIG = {
    "data": {"num-clients": 10, "alpha": 0.1},  # real digits, very skewed
    "model": {"name": "logistic"},
    "algorithm": {"lr": 0.1, "num-local-steps": 32},
    "run": {"num-rounds": 10},
    "engine": {"threads": 1},
}


def proximal(grads: dict[str, Tensor], params: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """g ← g + μ (x − x̂): of one client, x̂ being where the round began."""
    return {name: g + MU * (params[name] - start[name]) for name, g in grads.items()}


def main() -> float:
    far = {}
    for name in ("none", "fedprox:proximal"):
        result = fedmom.run(CONFIG, sets={"algorithm.correction": name})
        last = result.rounds[-1]
        far[name] = last["consensus_distance"]
        print(f"{name:17} accuracy {100 * last['test_accuracy']:.1f} %, clients apart {far[name]:.3g}")
    return far["none"] - far["fedprox:proximal"]


if __name__ == "__main__":
    main()
