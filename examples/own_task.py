"""A task of one's own: ten clients learn, together, a number that nine of ten patients stay below.

    python examples/own_task.py

The loss is the pinball loss of Koenker and Bassett (Econometrica, 1978); what is measured is how many stay below.
"""

import torch

import fedmom


class Quantile(fedmom.Task):
    """The 90 % quantile of one number."""

    targets = "numbers"
    metrics = ("below_score",)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[B, 1] each -> the mean over the minibatch. An error upwards costs 0.1, downwards 0.9."""
        away = targets - outputs
        return torch.maximum(0.9 * away, -0.1 * away).mean()

    def measure(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, tuple[torch.Tensor, int]]:
        """How many patients are below, and of how many."""
        return {"below_score": ((targets <= outputs).sum(), targets.numel())}


def main() -> float:
    config = {
        "data.dataset": "diabetes",
        "data.task": "own_task:Quantile",
        "data.num-clients": 10,
        "data.partition": "iid",
        "data.batch-size": 16,
        "model.name": "mlp",
        "model.hidden": 16,
        "algorithm.lr": 0.05,
        "algorithm.num-local-steps": 4,
        "run.num-rounds": 80,
    }
    last = fedmom.run(config).rounds[-1]
    print(f"{100 * last['test_below_score']:.1f} % of the test patients are below what the model says")
    return float(last["test_below_score"])


if __name__ == "__main__":
    main()
