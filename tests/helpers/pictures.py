"""Pictures are decoded and looked at, colour by colour."""

import numpy as np
from PIL import Image


def pixels(path):
    """[H, W, 3] of a PNG that is whole."""
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def where(image, colour):
    """[H, W]: the pixels of an exact "#RRGGBB"."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(image.astype(int) - rgb).max(axis=2) <= 2
