"""What people's arrays may be: one rule each for dtypes, for the layout of images and for features.

Whatever comes in, from a file, a function or a client's folder, passes `checked_part`; what comes out is a uint8 image
[n, C, H, W], a float feature [n, ...] or a whole one, or several of them by name; and targets (targets.py).
docs/data.md has the table.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedmom.data.inputs import NARROW, Inputs, num_examples, pieces, readable
from fedmom.data.targets import TARGETS
from fedmom.errors import InputError

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint32, torch.uint64)
# What would do instead of a dtype that is neither; by numpy's kind.
_INSTEAD = {
    "O": "all examples need one shape and one dtype (np.stack them)",
    "U": "number the words: np.unique(words, return_inverse=True)[1]",
    "S": "number the words: np.unique(words, return_inverse=True)[1]",
    "T": "number the words: np.unique(words, return_inverse=True)[1]",
    "M": "give numbers, such as days since the first: (t - t.min()) / np.timedelta64(1, 'D')",
    "m": "give numbers, such as days: t / np.timedelta64(1, 'D')",
    "c": "give real and imaginary part side by side: np.stack([x.real, x.imag], axis=1)",
    "V": "give its fields side by side as one array of numbers",
    "f": "give float64 or float32",
}


def checked_part(
    key: str, split: str, x: object, y: object, channels: int | None = None, *, targets: str = "labels"
) -> tuple[Inputs, Tensor]:
    """One split by itself, "train" or "test": examples and targets, as many of the one as of the other.

    `channels`: how many the images have, where that is known. `targets`: a kind of TARGETS. Raises InputError naming
    the array and what would do.
    """
    if isinstance(x, Mapping):
        inputs: Inputs = _several(f"{key}: x_{split}", x)
    else:
        whole = plain_tensor(f"{key}: x_{split}", x)
        inputs = _inputs(f"{key}: x_{split}", whole, channels, mapped=is_mapped(x))
    what = f"{key}: y_{split}"
    given = plain_tensor(what, y)
    found = TARGETS[targets].check(what, given if targets == "tokens" else readable(given))
    if num_examples(inputs) != len(found):
        raise InputError(f"{key}: x_{split} has {num_examples(inputs)} examples, y_{split} has {len(found)}")
    return inputs, found


def _several(what: str, x: Mapping[str, object]) -> dict[str, Tensor]:
    """Inputs by name, each as it is alone."""
    if not x or not all(isinstance(name, str) and name.isidentifier() for name in x):
        names = ", ".join(map(repr, x)) or "none"
        raise InputError(f"{what} has the names {names}: inputs are called by names such as ids and mask")
    found = {}
    for name, value in x.items():
        tensor = plain_tensor(f"{what}[{name!r}]", value)
        tensor = tensor.to(torch.int64) if tensor.dtype == torch.bool else tensor  # a mask
        tensor = tensor[:, None] if tensor.ndim == 1 else tensor
        found[name] = _inputs(f"{what}[{name!r}]", tensor, None, mapped=is_mapped(value))
    counts = {name: len(one) for name, one in found.items()}
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"{what}: its inputs have {given} examples; every input needs as many")
    return found


def checked_whole(
    key: str, arrays: tuple[object, ...], channels: int | None = None, *, targets: str = "labels"
) -> tuple[Inputs, Tensor, Inputs, Tensor]:
    """x_train, y_train, x_test and y_test, each split right and both alike. Labels may be words, which are numbered."""
    if targets == "labels" and all(are_words(y) for y in (arrays[1], arrays[3])):
        names = np.unique(np.concatenate([np.asarray(arrays[1]).reshape(-1), np.asarray(arrays[3]).reshape(-1)]))
        numbered = [np.searchsorted(names, np.asarray(y)) for y in (arrays[1], arrays[3])]
        arrays = (arrays[0], numbered[0], arrays[2], numbered[1])
    x_train, y_train = checked_part(key, "train", arrays[0], arrays[1], channels, targets=targets)
    x_test, y_test = checked_part(key, "test", arrays[2], arrays[3], channels, targets=targets)
    for split, x in (("train", x_train), ("test", x_test)):
        if num_examples(x) == 0:
            raise InputError(f"{key}: x_{split} is empty")
    if kind_of(x_train) != kind_of(x_test):
        kinds = f"examples of x_train are {kind_of(x_train)}, those of x_test are {kind_of(x_test)}"
        raise InputError(f"{key}: {kinds}; give both in one dtype and one shape")
    if y_train.shape[1:] != y_test.shape[1:]:
        kinds = f"{list(y_train.shape[1:])}, those of y_test {list(y_test.shape[1:])}"
        raise InputError(f"{key}: targets of y_train have the shape {kinds}; give both in one shape")
    return x_train, y_train, x_test, y_test


def are_words(y: object) -> bool:
    """Whether labels are names, one for each example."""
    return isinstance(y, np.ndarray) and y.ndim == 1 and (y.dtype.kind in "UST" or _of_strings(y))


def _of_strings(y: np.ndarray) -> bool:
    return y.dtype.kind == "O" and all(isinstance(one, str) for one in y)


def kind_of(x: Inputs) -> str:
    """Dtype and shape of one example, as messages show them."""
    if isinstance(x, dict):
        return ", ".join(f"{name} {kind_of(one)}" for name, one in sorted(x.items()))
    return f"{dtype_as_used(x)} {list(x.shape[1:])}"


def dtype_as_used(x: Tensor) -> str:
    """That of minibatches: narrow integers, which stay as they are in a file, become int64 there."""
    return dtype_name(torch.int64 if x.dtype in NARROW else x.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Images


def channel_axis(shape: Sequence[int], channels: int | None = None) -> int | None:
    """0 where images of `shape` are [C, H, W], 2 where they are [H, W, C], None where it could be either.

    `channels`, if known, decides. Else the axis with 1 or 3 entries; else the one that leaves square images; else the
    one with fewer than both others have: at most half as many, or at most four. Two answers, or none, are no answer.
    """
    a, b, c = shape
    if channels in (a, c):
        return 0 if a == channels else 2
    first, last = a in (1, 3), c in (1, 3)
    if first == last:
        first, last = b == c, a == b
    if first == last:
        first, last = (k < min(rest) and (k <= 4 or 2 * k <= min(rest)) for k, rest in ((a, (b, c)), (c, (a, b))))
    return None if first == last else 0 if first else 2


def _images(what: str, x: Tensor, channels: int | None, *, mapped: bool) -> Tensor:
    """uint8 [n, H, W], [n, C, H, W] or [n, H, W, C] -> [n, C, H, W]."""
    shape = list(x.shape)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4:
        raise InputError(
            f"{what} has shape {shape}: uint8 images are [n, H, W] or [n, C, H, W]; features and ids are another dtype "
            "(astype(np.float32), astype(np.int64))"
        )
    axis = channel_axis(shape[1:], channels)
    if axis is None:
        raise InputError(
            f"{what} has shape {shape}: its channels could be axis 1 or axis 3; return a fedmom.Dataset from "
            'a "module:function": its mean has one number for each channel'
        )
    if axis == 0:
        return x
    return x.movedim(3, 1) if mapped else x.movedim(3, 1).contiguous()


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images / 255, exactly: from counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for counts in pixel_counts(images).to(torch.float64):
        weights = counts / counts.sum()
        mean.append(float(weights @ values))
        variance = float(weights @ (values - mean[-1]) ** 2)
        # A constant channel would be divided by zero; one keeps it at zero.
        std.append(math.sqrt(variance) if counts.count_nonzero() > 1 else 1.0)
    return tuple(mean), tuple(std)


def pixel_counts(images: Tensor) -> Tensor:
    """How often each channel has each of the 256 values: [C, 256] int64."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for piece in pieces(images):
        counts += torch.stack([torch.bincount(one.flatten(), minlength=256) for one in piece.unbind(1)])
    return counts


# Arrays, features, labels


def plain_tensor(what: str, array: object, *, narrow: bool = False) -> Tensor:
    """Any array as a strided tensor on the CPU; whole numbers but uint8 as int64.

    An array that is mapped from a file stays there, whole numbers as narrow as they are; nobody writes into it.
    `narrow`: so they stay in memory too.
    """
    if isinstance(array, Tensor):
        if array.layout != torch.strided or array.is_nested or array.is_quantized or array.is_meta:
            raise InputError(f"{what} is a tensor without plain values ({array.layout}): give it dense and in memory")
        tensor = array.detach().cpu().contiguous()
        if tensor.dtype not in (torch.uint8, torch.bool, *_FLOATS, *_INTEGERS):
            advice = _INSTEAD["c" if tensor.is_complex() else "f"]
            raise InputError(f"{what} has dtype {dtype_name(tensor.dtype)}: {advice}")
    elif isinstance(array, np.ndarray):
        if np.ma.is_masked(array):
            count = int(np.ma.count_masked(array))
            raise InputError(f"{what} has {count} masked values: fill them (x.filled(value)), or drop those examples")
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise InputError(f"{what} has dtype {array.dtype}, not numbers: {_INSTEAD[array.dtype.kind]}")
        # torch reads neither another machine's byte order nor negative strides, and warns where it may not write.
        plain = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
        if not plain.flags.writeable and is_mapped(plain):
            with warnings.catch_warnings(action="ignore"):
                tensor = torch.from_numpy(plain)
        else:
            tensor = torch.from_numpy(plain if plain.flags.writeable else plain.copy())
    else:
        hint = " (its to_numpy() may be one)" if hasattr(array, "to_numpy") else " (np.asarray may make it one)"
        raise InputError(f"{what} is a {type(array).__name__}, not a numpy array or tensor{hint}")
    if tensor.dtype not in _INTEGERS or (tensor.dtype != torch.uint64 and (narrow or is_mapped(array))):
        return tensor  # of a file that stays on the disk only what a minibatch needs is read, and widened
    whole = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64 and bool((whole < 0).any()):
        raise InputError(f"{what} has whole numbers of 2^63 and more: at most {2**63 - 1} fits")
    return whole


def is_mapped(array: object) -> bool:
    """Whether an array's values stay in a file until they are read."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def _inputs(what: str, x: Tensor, channels: int | None, *, mapped: bool) -> Tensor:
    """uint8 images as [n, C, H, W]; float and int64 features as they are."""
    shape = list(x.shape)
    if 0 in shape[1:]:
        raise InputError(f"{what} has shape {shape}: its examples are empty")
    if x.dtype == torch.uint8:
        return _images(what, x, channels, mapped=mapped)
    if x.dtype == torch.bool:
        raise InputError(f"{what} has dtype bool: give uint8 images, float features (astype(np.float32)) or int64 ids")
    if x.ndim < 2:
        raise InputError(f"{what} has shape {shape}: features are [n, d] or [n, ...]; x.reshape(-1, 1) for one each")
    if x.is_floating_point() and not all(bool(torch.isfinite(piece).all()) for piece in pieces(x)):
        raise InputError(f"{what} has values that are NaN or infinite: fill them, or drop those examples")
    return x


# What the run's dtype makes of them


def check_cast(key: str, split: str, x: Inputs, dtype: torch.dtype) -> None:
    """InputError where the run's `dtype` would turn finite features into infinite ones, or whole numbers into others.

    Rounding of real numbers is what a dtype is for. A feature that is a whole number in every example is an id or a
    count, and another one is another word. Integers are not cast.
    """
    if isinstance(x, dict):
        for one in x.values():
            check_cast(key, split, one, dtype)
        return
    if not x.is_floating_point() or torch.promote_types(x.dtype, dtype) == dtype or not len(x):
        return
    flat = x.reshape(len(x), -1)
    changed, whole = (torch.full(flat.shape[1:], value) for value in (False, True))
    for piece in flat.split(max(1, 2**20 // flat.shape[1])):
        cast = piece.to(dtype)
        if not bool(torch.isfinite(cast).all()):
            value = float(piece[~torch.isfinite(cast)][0])
            raise InputError(
                f"{key}: x_{split} has {value:g}, which run.dtype = {dtype_name(dtype)!r} makes infinite: scale the "
                "features, or run.dtype = 'float64'"
            )
        changed |= (cast.to(piece.dtype) != piece).any(0)
        whole &= (piece == piece.round()).all(0)
    if not bool((changed & whole).any()):
        return
    column = flat[:, int((changed & whole).int().argmax())]
    lost = column[column.to(dtype).to(column.dtype) != column][:1]
    before, after = lost.item(), lost.to(dtype).item()
    raise InputError(
        f"{key}: x_{split} has whole numbers that run.dtype = {dtype_name(dtype)!r} would change ({before:.0f} to "
        f"{after:.0f}): give ids as integers (astype(np.int64)), which reach the model as they are; scale counts, or "
        f"run.dtype = {_wider(column, dtype)!r}"
    )


def _wider(column: Tensor, dtype: torch.dtype) -> str:
    """The narrowest run.dtype that holds these whole numbers."""
    fits = bool((column.to(torch.float32).to(column.dtype) == column).all())
    return "float32" if fits and dtype != torch.float32 else "float64"
