"""Tensors as the bytes of .npy files: what numpy writes and reads, without copies where none is needed."""

from io import BytesIO

import numpy as np
import pytest
import torch

from fedmom.errors import InputError
from fedmom.wire import from_npy, to_npy

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


@pytest.mark.parametrize("name", TENSORS)
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


@pytest.mark.parametrize("array", [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(3, dtype=">f4")])
def test_other_layouts_that_numpy_writes_are_read(array):
    file = BytesIO()
    np.save(file, array)
    assert from_npy(file.getvalue()).tolist() == array.tolist()


@pytest.mark.parametrize(
    "data", [b"", b"x", b"PK\x03\x04" * 40, to_npy(torch.zeros(4))[:-1], to_npy(torch.zeros(4))[:20]]
)
def test_other_bytes_are_refused_in_one_line(data):
    with pytest.raises(InputError, match="an array is not in numpy's format") as caught:
        from_npy(data)
    assert "\n" not in str(caught.value)


def test_pickled_objects_are_refused():
    file = BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="numpy's format"):
        from_npy(file.getvalue())
