"""A partitioner of Flower's `flwr-datasets` (pip install flwr-datasets) as the rule that splits the data.

    python examples/flower_partitioner.py

`dirichlet` is all that fedmom needs: data.partition = "flower_partitioner:dirichlet". `parts_of` does the same for
every partitioner that splits by rows: it has `dataset`, `num_partitions` and `load_partition`.
"""

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, Partitioner

import fedmom


def parts_of(partitioner: Partitioner, labels: np.ndarray) -> list[np.ndarray]:
    """The numbers of the examples that each client gets; the partitioner sees the column "label"."""
    partitioner.dataset = Dataset.from_dict({"label": labels, "example": np.arange(len(labels))})
    clients = range(partitioner.num_partitions)
    return [np.array(partitioner.load_partition(client)["example"]) for client in clients]


def dirichlet(labels: np.ndarray, num_clients: int, seed: int, *, alpha: float, min_size: int) -> list[np.ndarray]:
    """data.alpha, data.min-size and run.seed as Flower's partitioner takes them."""
    partitioner = DirichletPartitioner(
        num_clients, "label", alpha, min_partition_size=min_size, self_balancing=True, seed=seed
    )
    return parts_of(partitioner, labels)


def main() -> float:
    result = fedmom.run(
        {
            "data": {"num-clients": 8, "partition": "flower_partitioner:dirichlet", "alpha": 0.5},
            "model": {"name": "mlp", "hidden": 64},
            "algorithm": {"lr": 0.05, "num-local-steps": 8},
            "run": {"num-rounds": 20, "eval-every": 10},
        }
    )
    accuracy = result.rounds[-1]["test_accuracy"]
    print(f"test accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
