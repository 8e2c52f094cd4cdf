"""Your own images: a folder per class, as torchvision's ImageFolder reads it.

    python examples/image_folder.py

`images` is all that fedmom needs: data.dataset = "image_folder:images", data.data-dir = your folder.
"""

import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

import fedmom

SIZE = (16, 16)  # width, height: all images get it


def images(data_dir: str) -> dict[str, np.ndarray]:
    """data_dir/train/CLASS/*.png and data_dir/test/CLASS/*.png (or .jpg): uint8 [n, H, W, 3] and labels [n]."""
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        folder = ImageFolder(f"{data_dir}/{part}", transform=lambda image: np.asarray(image.resize(SIZE)))
        pictures, labels = zip(*folder, strict=True)
        arrays[f"x_{part}"], arrays[f"y_{part}"] = np.stack(pictures), np.array(labels)
    return arrays


def write_some(root: Path) -> None:
    """Real handwritten digits as PNG files, to have a folder to show."""
    from PIL import Image

    digits = load_digits()
    for place, (picture, label) in enumerate(zip(digits.images[:600], digits.target[:600], strict=True)):
        folder = root / ("test" if place % 5 == 0 else "train") / f"digit-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 15.9).astype(np.uint8)).save(folder / f"{place}.png")


def main() -> float:
    with tempfile.TemporaryDirectory() as folder:
        write_some(Path(folder))
        result = fedmom.run(
            {
                "data": {"dataset": "image_folder:images", "data-dir": folder, "num-clients": 5, "alpha": 0.5},
                "model": {"name": "mlp", "hidden": 64},
                "algorithm": {"lr": 0.05, "num-local-steps": 8},
                "run": {"num-rounds": 30, "eval-every": 10},
            }
        )
    accuracy = result.rounds[-1]["test_accuracy"]
    print(f"test accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
