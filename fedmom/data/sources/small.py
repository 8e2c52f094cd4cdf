"""Small real data that come with fedmom, with scikit-learn or with Python, split without a random generator."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedmom.data.sources.array_files import read_digits
from fedmom.errors import InputError, missing_package

RawArrays = tuple[object, object, object, object]  # x_train, y_train, x_test, y_test, not yet checked


def digits() -> RawArrays:
    """The digits of digits.json: values 0 to 16 become round(255 v / 16), every fifth example of a class is test.

    The split uses no random generator, so that it is the same for ever: 1,437 + 360 examples.
    """
    images, labels = read_digits()
    images = ((images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[:, None]
    is_test = np.zeros(len(images), dtype=bool)
    is_test[np.argsort(labels, kind="stable")[::5]] = True
    return images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def digit_traits() -> RawArrays:
    """The same images; of each digit whether it is even, is above 4, and has a closed loop (0, 6, 8, 9)."""
    x_train, y_train, x_test, y_test = digits()
    return x_train, _traits(np.asarray(y_train)), x_test, _traits(np.asarray(y_test))


def _traits(digit: np.ndarray) -> np.ndarray:
    return np.stack([digit % 2 == 0, digit > 4, np.isin(digit, (0, 6, 8, 9))], axis=1).astype(np.uint8)


def diabetes() -> RawArrays:
    """442 patients of Efron, Hastie, Johnstone, Tibshirani (Annals of Statistics, 2004), as scikit-learn has them.

    Ten measurements each, of mean 0 and deviation 1 over all, and the disease's progress a year later; every fifth is
    test.
    """
    try:
        from sklearn.datasets import load_diabetes
    except ModuleNotFoundError as error:
        raise missing_package("data.dataset = 'diabetes'", "scikit-learn", "") from error
    x, y = load_diabetes(return_X_y=True)
    x = x * np.sqrt(len(x))  # scikit-learn's columns have the norm 1
    is_test = np.arange(len(x)) % 5 == 4
    return x[~is_test], y[~is_test], x[is_test], y[is_test]


# Text that every machine with Python has. Which files there are, and what is in them, depends on the version.

NUM_TOKENS = 256
WINDOW = 64  # tokens, where data.context says nothing
_OTHERS = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")  # not Python's, or tests
_BUILT = "_sysconfigdata"  # names the machine that Python was built on


def python_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(top-level module or package, content) of every file, by path."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).parts
        if not set(inside) & {*_OTHERS} and not path.name.startswith(_BUILT) and path.is_file():
            yield inside[0].removesuffix(".py"), path.read_bytes()


def read_python_sources(key: str, context: int) -> dict[str, np.ndarray]:
    """Windows x_train, y_train, x_test, y_test, int16 [n, T], in the order of the files.

    y is x shifted by one, and the last tenth of each file's windows are test. `module` and
    `module_test` [n] are the top-level module or package of each window. InputError where there are no files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    size = context or WINDOW
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("x_train", "y_train", "x_test", "y_test")}
    modules: dict[str, list[str]] = {"module": [], "module_test": []}
    for module, content in python_files(root):
        tokens = np.frombuffer(content, dtype=np.uint8).astype(np.int16)
        count = max(0, len(tokens) - 1) // size
        first = count - count // 10  # of the test windows
        for name, shift in (("x", 0), ("y", 1)):
            windows = tokens[shift : shift + count * size].reshape(-1, size) if count else tokens[:0].reshape(0, size)
            parts[f"{name}_train"].append(windows[:first])
            parts[f"{name}_test"].append(windows[first:])
        modules["module"] += [module] * first
        modules["module_test"] += [module] * (count - first)
    if not sum(map(len, parts["x_test"])):
        raise InputError(f"{key}: {root} has no .py files with ten windows of {size} bytes; give a text of your own")
    arrays = {name: np.concatenate(found) for name, found in parts.items()}
    return arrays | {name: np.array(found) for name, found in modules.items()}
