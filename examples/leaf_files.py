"""Natural clients: files in the format of LEAF, in which every user is a client.

    python examples/leaf_files.py           # trains on them
    python examples/leaf_files.py writers   # writes them to the folder writers, for configs/tasks/by-writer.toml

The images are real handwritten digits. Who wrote which is not known: the thirty writers are made up here, each with a
pen of its own. For LEAF's FEMNIST: data.dataset = "leaf/data/femnist/data/", and model.name = "cnn".
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import fedmom
from fedmom.data.datasets import load_dataset

NUM_WRITERS = 30


def write(folder: Path) -> None:
    """train/digits.json and test/digits.json: 64 numbers in [0, 1] for each image."""
    data, rng = load_dataset("digits"), np.random.default_rng(0)
    pens = rng.uniform(0.5, 1.0, NUM_WRITERS)  # how dark each one writes
    shares = rng.dirichlet(np.full(NUM_WRITERS, 3.0))  # how much
    for split, images, labels in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        writer = rng.choice(NUM_WRITERS, size=len(labels), p=shares)
        users, parts = [], {}
        for one in np.unique(writer):
            own, user = writer == one, f"writer-{one:02d}"
            x = pens[one] * images[own].numpy().reshape(-1, 64) / 255
            users.append(user)
            parts[user] = {"x": x.round(4).tolist(), "y": labels[own].tolist()}
        counts = [len(parts[user]["y"]) for user in users]
        (folder / split).mkdir(parents=True, exist_ok=True)
        content = {"users": users, "num_samples": counts, "user_data": parts}
        (folder / split / "digits.json").write_text(json.dumps(content))


def main() -> float:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        result = fedmom.run(
            {
                "data": {
                    "dataset": f"{folder}/",
                    "partition": "natural",
                    "clients": "users",
                    "num-clients": 0,  # all users
                    "batch-size": 16,
                },
                "model": {"name": "mlp", "hidden": 64},
                "algorithm": {"lr": 0.05, "num-local-steps": 8, "cohort-size": 10},
                "run": {"num-rounds": 30, "eval-every": 10},
            }
        )
    accuracy = result.rounds[-1]["test_accuracy"]
    print(f"{result.config.data.num_clients} writers, 10 in a round: test accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    if sys.argv[1:]:
        write(Path(sys.argv[1]))
        print(f"{sys.argv[1]}: {NUM_WRITERS} writers; fedmom run tasks/by-writer")
    else:
        main()
