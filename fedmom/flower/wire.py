"""Tensors <-> Flower's records of .npy files, with no copy where none is needed: how arrays travel in its messages.

Where messages pass through a SuperLink the tensors of a dtype travel as one array (`bundle`): Flower sends every array
of a message as two objects, each in a request of its own.

Both sides of the wire share it. flwr is imported when a function here runs.
"""

import json
import math
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmom.errors import InputError
from fedmom.flower.npy import npy_header
from fedmom.method.state import Tree, as_tensor


def to_npy(tensor: Tensor) -> bytes:
    """What `np.save` would write of a tensor, with one copy instead of two; of bfloat16 its bits, as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    head = BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    return b"".join((head.getbuffer(), array.reshape(-1).view(np.uint8).data))


def array_bytes(array: Any) -> Any:
    """The bytes of one of Flower's arrays; without a copy where they lie in Ray's store."""
    view = getattr(array, "view", None)
    return array.data if view is None else view


def from_npy(data: Any) -> Tensor:
    """A tensor on the bytes of an .npy file (bytes, memoryview, uint8 array). It shares their memory: read it only.

    Raises InputError for bytes that are no such file, and for a dtype that torch has not.
    """
    view = memoryview(data).cast("B")
    header = npy_header(view)
    try:
        if header is None:
            raise ValueError("it does not begin as one")
        dtype, fortran, shape, begin = header
        array = np.frombuffer(view, dtype, offset=begin, count=math.prod(shape))
        array = array.reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"an array is not in numpy's format ({error})") from None
    try:
        return as_tensor(array if dtype.isnative else array.astype(dtype.newbyteorder("=")))
    except TypeError:  # text, dates, records and the like
        raise InputError(f"an array has numpy's dtype {dtype.str!r}, which torch has not") from None


def pack(tensors: Tree, *, bundled: bool = False) -> Any:
    """Tensors as Flower's ArrayRecord, under their names or one array per dtype (`bundle`)."""
    from flwr.app import Array, ArrayRecord

    arrays = {}
    for name, value in (bundle(tensors) if bundled else tensors).items():
        dtype = str(value.dtype).removeprefix("torch.")
        arrays[name] = Array(dtype=dtype, shape=tuple(value.shape), stype="numpy.ndarray", data=to_npy(value))
    return ArrayRecord(arrays)


def unpack(record: Mapping[str, Any]) -> Tree:
    """Flower's arrays as tensors that share their memory, bundled or not: for reading only.

    Raises InputError for an array that is no tensor, and for a bundle that is not as long as its name says.
    """
    return unbundle({name: _read(array) for name, array in record.items()})


def _read(array: Any) -> Tensor:
    found = from_npy(array_bytes(array))
    if array.dtype != "bfloat16":
        return found
    if found.dtype != torch.uint16:  # NumPy has no bfloat16
        raise InputError(f"an array of bfloat16 has {str(found.dtype).removeprefix('torch.')}, must have uint16")
    return found.view(torch.bfloat16)


def bundle(tensors: Tree) -> Tree:
    """One flat tensor per dtype, under a name that lists what lies in it: [["params/weight", 3, 4], …], as JSON."""
    groups = dict[torch.dtype, list[str]]()
    for name, value in tensors.items():
        groups.setdefault(value.dtype, []).append(name)
    return {
        json.dumps([[name, *tensors[name].shape] for name in names]): torch.cat([tensors[n].reshape(-1) for n in names])
        for names in groups.values()
    }


def unbundle(tensors: Mapping[str, Tensor]) -> Tree:
    """What was bundled, as views, in the order of the dtypes; tensors that were not are left as they are.

    Raises InputError where a bundle is not as long as its name says.
    """
    found: Tree = {}
    for name, value in tensors.items():
        if not is_bundle(name):
            found[name] = value
            continue
        try:
            places = {inner: shape for inner, *shape in json.loads(name)}
            if not all(isinstance(inner, str) for inner in places):
                raise ValueError("a name that is no text")
            parts = value.split([math.prod(shape) for shape in places.values()])
            found |= {inner: part.view(shape) for (inner, shape), part in zip(places.items(), parts, strict=True)}
        except (ValueError, TypeError, RuntimeError):
            what = f"an array of {value.numel():,} numbers is not what its name lists"
            raise InputError(f"{what}: {name[:80]}") from None
    return found


def is_bundle(name: str) -> bool:
    """Whether an array of this name holds several tensors."""
    return name.startswith("[[")
