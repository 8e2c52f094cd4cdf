"""Folders of images, LABEL/FILE: each file is read as Pillow reads it, or named with what would do.

Nothing is left out without a word, and nothing is read by halves: 16 bits, transparent pixels, several pictures in
one file and files that are no images are refused. pillow is imported when a folder is read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmom.errors import InputError, missing_package
from fedmom.user_code import one_line

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_LITTER = ("thumbs.db", "desktop.ini")  # of file managers; so are names that begin with a point
_DEEP = ("I", "F")  # how Pillow's names of modes with more than 8 bits begin: I, I;16, I;16B, F


def read_images(key: str, folder: Path, classes: str) -> tuple[Tensor, Tensor]:
    """Images of folder/LABEL/…, in the order of labels and file names: uint8 [n, C, H, W] and int64 [n].

    `classes`: the labels' names in their order, by commas; without them folders are numbers. Raises InputError.
    """
    names = named_classes(classes)
    x, y, first, places = list[np.ndarray](), list[int](), None, dict[int, Path]()
    for place in entries(folder):
        if not place.is_dir():
            raise InputError(f"{key}: {place}: lies beside the folders of labels; it belongs into one of them")
        label = _label(key, place, names)
        if label in places:
            raise InputError(f"{key}: {place}: is label {label}, as {places[label].name} is; put both into one folder")
        places[label] = place
        for path in entries(place):
            if path.suffix.lower() not in IMAGES or path.is_dir():
                what = "is a folder" if path.is_dir() else f"is no image ({', '.join(IMAGES)})"
                raise InputError(f"{key}: {path}: {what}; a folder of a label holds images and nothing else")
            pixels = _pixels(key, path)
            first = first or (path, pixels.shape)
            if pixels.shape != first[1]:
                raise InputError(
                    f"{key}: {path}: is {list(pixels.shape)}, {first[0].name} is {list(first[1])}; all images of all "
                    "clients need the same channels, height and width"
                )
            x.append(pixels)
            y.append(label)
    if not x:
        raise InputError(f"{key}: {folder}: has no images ({', '.join(IMAGES)}) in folders of labels")
    order = np.argsort(y, kind="stable")
    return torch.from_numpy(np.ascontiguousarray(np.stack(x)[order])), torch.from_numpy(
        np.array(y, dtype=np.int64)[order]
    )


def named_classes(classes: str) -> list[str]:
    """The names in data.classes, in the order of their labels. InputError where one comes twice."""
    names = [name.strip() for name in classes.split(",")] if classes else []
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"data.classes = {classes!r}: names {twice!r} twice; every label needs a name of its own")
    return names


def entries(folder: Path) -> Sequence[Path]:
    """What a folder holds, by name, without what is hidden and without the litter of file managers."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in _LITTER)


def _label(key: str, place: Path, names: Sequence[str]) -> int:
    """The number that a folder's name stands for; clients lack classes, so it cannot be its place in the alphabet."""
    if place.name in names:
        return names.index(place.name)
    if not names and place.name.isdecimal() and len(place.name) < 19:  # 64 bits hold 18 digits
        return int(place.name)
    right = f"one of data.classes = {','.join(names)!r}" if names else "a number, or data.classes must name it"
    raise InputError(f"{key}: {place}: the folder's name must be {right}")


def _pixels(key: str, path: Path) -> np.ndarray:
    """One file as uint8 [1, H, W] where it is grey, [3, H, W] else, turned as its EXIF says."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise missing_package(f"{key}: {path}", "pillow", "vision") from error
    try:
        with Image.open(path) as image:
            trouble = _trouble(image)
            # A camera held upright writes a picture that lies, and says so.
            pixels = _values(ImageOps.exif_transpose(image)) if not trouble else np.empty(0)
    except Exception as error:  # each of Pillow's formats has errors of its own
        raise InputError(f"{key}: cannot read {path}: {one_line(error)}") from None
    if trouble:
        raise InputError(f"{key}: {path}: {trouble}")
    return pixels


def as_pixels(what: str, image: Any) -> np.ndarray:
    """A picture of Pillow's as uint8 [1, H, W] where it is grey, [3, H, W] else, turned as its EXIF says."""
    from PIL import ImageOps

    if trouble := _trouble(image):
        raise InputError(f"{what}: {trouble}")
    return _values(ImageOps.exif_transpose(image))


def _values(image: Any) -> np.ndarray:
    pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _trouble(image: Any) -> str:
    """Why 8 bits of grey or of red, green and blue would not be the picture, and what would do; or ""."""
    if image.mode.startswith(_DEEP):
        return f"has more than 8 bits (Pillow's mode {image.mode}); save it with 8, or give float features in an .npz"
    # A telephone's JPEG may carry a preview behind the picture (format MPO).
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        return f"holds {image.n_frames} pictures; save each as a file"
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        return "has transparent pixels; put it on a background (Image.alpha_composite) and save it without alpha"
    return ""
