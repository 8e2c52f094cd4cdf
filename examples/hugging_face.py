"""A data set of Hugging Face's `datasets` (pip install 'datasets>=4,<5').

    python examples/hugging_face.py

`digits` is all that fedmom needs: data.dataset = "hugging_face:digits". For a data set of the hub, replace
`make_local` by datasets.load_dataset("ylecun/mnist") and the names of its columns.
"""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

import fedmom


def make_local() -> DatasetDict:
    """Real handwritten digits as a DatasetDict with pictures, as most of the hub's image data sets are."""
    from PIL import Image as Picture
    from sklearn.datasets import load_digits

    source = load_digits()
    pictures = [Picture.fromarray((image * 15.9).astype(np.uint8)) for image in source.images[:800]]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    columns = {"image": pictures, "label": source.target[:800].tolist()}
    return Dataset.from_dict(columns, features=features).train_test_split(test_size=0.25, seed=0)


def digits() -> dict[str, np.ndarray]:
    """uint8 images [n, H, W] and labels [n], of both splits."""
    data = make_local()
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = np.stack([np.asarray(image) for image in data[part]["image"]])
        arrays[f"y_{part}"] = np.array(data[part]["label"])
    return arrays


def main() -> float:
    result = fedmom.run(
        {
            "data": {"dataset": "hugging_face:digits", "num-clients": 5, "alpha": 0.5},
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
