"""Your own arrays in a file: x_train, y_train, x_test, y_test; float features [n, d] or uint8 images.

    python examples/npz_file.py

On the command line: fedmom run CONFIG --set data.dataset=wine.npz
"""

import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

import fedmom


def write(path: Path) -> None:
    """569 real tumours, 30 features each, scaled by what the training part shows."""
    data = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, y = data.data[order].astype(np.float32), data.target[order].astype(np.int64)
    x = (x - x[:400].mean(0)) / x[:400].std(0)
    np.savez(path, x_train=x[:400], y_train=y[:400], x_test=x[400:], y_test=y[400:])


def main() -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tumours.npz"
        write(path)
        result = fedmom.run(
            {
                "data": {"dataset": str(path), "num-clients": 8, "alpha": 0.3, "batch-size": 16},
                "model": {"name": "logistic"},
                "algorithm": {"lr": 0.02, "num-local-steps": 8},
                "run": {"num-rounds": 20},
            }
        )
    accuracy = result.rounds[-1]["test_accuracy"]
    print(f"test accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
