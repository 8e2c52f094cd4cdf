"""Small real data sets that come with fedmom or with scikit-learn, split without a random generator."""

import numpy as np

from fedmom.data.sources.array_files import read_digits
from fedmom.errors import missing_package

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
