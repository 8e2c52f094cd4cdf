"""Tensors as the bytes of .npy files: what numpy writes and reads, without copies where none is needed."""

from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array

from fedmom.errors import InputError
from fedmom.flower.wire import bundle, from_npy, is_bundle, to_npy, unbundle, unpack
from laws import table

TENSORS = {
    "matrix": torch.randn(3, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 2),
    "transposed": torch.randn(4, 5).T,
    "strided": torch.arange(12)[::3],
    "bools": torch.tensor([True, False]),
    "half": torch.randn(5, dtype=torch.float16),
    "with a gradient": torch.randn(3, requires_grad=True),
}


@table("name", TENSORS)
def test_the_bytes_are_numpys_and_come_back(name):
    tensor = TENSORS[name]
    data = to_npy(tensor)
    file = BytesIO()
    np.save(file, tensor.detach().contiguous().numpy())
    assert data == file.getvalue()
    for form in (data, memoryview(data), bytearray(data), np.frombuffer(data, np.uint8)):
        back = from_npy(form)
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back, tensor)


def test_reading_shares_the_memory():
    data = bytearray(to_npy(torch.zeros(1000)))
    back = from_npy(data)
    data[-4:] = np.float32(3).tobytes()
    assert back[-1] == 3


@table("array", [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(3, dtype=">f4")])
def test_other_layouts_that_numpy_writes_are_read(array):
    file = BytesIO()
    np.save(file, array)
    assert from_npy(file.getvalue()).tolist() == array.tolist()


@table("data", [b"", b"x", b"PK\x03\x04" * 40, to_npy(torch.zeros(4))[:-1], to_npy(torch.zeros(4))[:20]])
def test_other_bytes_are_refused_in_one_line(data):
    with pytest.raises(InputError, match="an array is not in numpy's format") as caught:
        from_npy(data)
    assert "\n" not in str(caught.value)


def test_pickled_objects_are_refused():
    file = BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="numpy's format"):
        from_npy(file.getvalue())


@table(
    "array",
    [
        np.array(["a"]),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, np.longdouble),
        np.zeros(2, ">U3"),
    ],
)
def test_a_dtype_that_torch_has_not_is_refused_by_its_name(array):
    file = BytesIO()
    np.save(file, array)
    with pytest.raises(InputError, match=r"^an array has numpy's dtype '.*', which torch has not$"):
        from_npy(file.getvalue())


@table("text", ["(", "{[]: 1}", "{'descr': '<f4', 'fortran_order': False, 'shape': (1" + "0" * 30 + ",), }"])
def test_a_header_that_is_no_python_is_refused_in_one_line(text):
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    with pytest.raises(InputError, match=r"^an array is not in numpy's format"):
        from_npy(data + bytes(16))


TREES = {
    "nothing": {},
    "one scalar": {"params/x": torch.tensor(2.0)},
    "an empty one": {"params/x": torch.zeros(0, 3), "params/y": torch.ones(2)},
    "rows": {"params/w": torch.randn(3, 4, 5), "momentum/w": torch.randn(3, 4, 5)},
    "three dtypes": {
        "params/w": torch.randn(4, 2),
        "buffers/count": torch.tensor(3),
        "params/b": torch.randn(2).double(),
        "momentum/w": torch.randn(2, 4).T,
    },
    "odd names": {'params/a b"[[,é': torch.ones(1), "params/[[1": torch.zeros(2)},
}


@table("name", TREES)
def test_a_bundle_is_one_array_per_dtype_and_comes_back(name):
    tensors = TREES[name]
    bundled = bundle(tensors)
    assert len(bundled) == len({value.dtype for value in tensors.values()})
    assert all(value.ndim == 1 and is_bundle(key) for key, value in bundled.items())
    back = unbundle(bundled)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype
        assert back[key].shape == value.shape
        assert torch.equal(back[key], value)


def test_what_is_no_bundle_stays_as_it_is():
    tensors = TREES["three dtypes"]
    assert not any(map(is_bundle, tensors))
    assert all(value is tensors[name] for name, value in unbundle(tensors).items())


@table(
    "name",
    [
        '[["a", 2]]',
        '[["a", 4]',
        "[[1, 4], [",
        '[["a", -1, -4]]',
        '[["a", "b"]]',
        "[[1, 4]]",
        "[[null, 4]]",
        '[["a", 1.5]]',
        '[[["a"], 4]]',
        "[[]]",
    ],
)
def test_bundles_that_are_not_what_they_say_are_refused_in_one_line(name):
    with pytest.raises(InputError, match="4 numbers is not what its name lists"):
        unbundle({name: torch.zeros(4)})
    with pytest.raises(InputError, match="is not what its name lists"):
        unbundle({'[["a", 2], ["b", 2]]': torch.zeros(4, 4)})


@table("shape", [(), (3,), (2, 2)])
def test_bfloat16_travels_as_its_bits_and_what_only_says_so_is_refused(shape):
    value = torch.randn(shape).to(torch.bfloat16)
    array = Array(dtype="bfloat16", shape=shape, stype="numpy.ndarray", data=to_npy(value))
    assert np.load(BytesIO(array.data)).dtype == np.uint16
    assert torch.equal(unpack({"a": array})["a"], value)
    false = Array(dtype="bfloat16", shape=shape, stype="numpy.ndarray", data=to_npy(value.float()))
    with pytest.raises(InputError, match="bfloat16 has float32, must have uint16"):
        unpack({"a": false})
