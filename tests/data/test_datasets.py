"""Data sets: the same digits for ever, files of every kind that we read, and one line for every bad one."""

import gzip
import hashlib
import json
import pickle
import struct
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmom.data import shipped
from fedmom.data.datasets import ARRAYS, Dataset, load_dataset
from fedmom.data.shipped import DATASETS, DEBIAN_FASHION_MNIST, download
from fedmom.data.sources.array_files import DIGITS, read_digits
from fedmom.errors import InputError
from laws import table


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def arrays(*shape: int, num_train: int = 6, num_test: int = 3, num_classes: int = 3) -> dict[str, np.ndarray]:
    """Small uint8 images of `shape`; every class is in the training labels."""
    labels = np.arange(num_train + num_test) % num_classes
    x = images(num_train + num_test, *shape)
    return dict(zip(ARRAYS, (x[:num_train], labels[:num_train], x[num_train:], labels[num_train:]), strict=True))


def save(path: Path, **content: np.ndarray) -> str:
    np.savez(path, **content)
    return str(path)


def refused(name: str, *words: str, data_dir: str = "data", load=load_dataset) -> str:
    with pytest.raises(InputError) as caught:
        load(name, data_dir)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data.dataset = {name!r}")
    for word in words:
        assert word in message
    return message


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module of the user's into the current directory; gone again after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file changed twice in a second would be taken from it
    name = "fedmom_test_user_data"

    def write(source: str) -> str:
        header = "import numpy as np, torch\nfrom fedmom.data.datasets import Dataset\n"
        (tmp_path / f"{name}.py").write_text(header + textwrap.dedent(source))
        sys.modules.pop(name, None)
        return name

    yield write
    sys.modules.pop(name, None)


# digits


def test_digits_never_change():
    """Sizes, split and pixel values, by checksum: a different split would make old results incomparable."""
    data = load_dataset("digits")
    assert data.x_train.shape == (1437, 1, 8, 8)
    assert data.x_test.shape == (360, 1, 8, 8)
    assert (data.num_classes, data.augment, data.input_shape) == (10, "none", (1, 8, 8))
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.uint8, torch.int64)
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in data[:4])).hexdigest()
    assert digest == "d6ed6a79482fa5ad37267a2859bcc3901fda33cca6fd9bc1afe3f4defafeec51"


def test_digits_are_stratified_and_use_all_256_values():
    data = load_dataset("digits")
    train, test = torch.bincount(data.y_train), torch.bincount(data.y_test)
    assert ((test - (train + test) / 5).abs() < 1).all()
    assert (data.x_train.min(), data.x_train.max()) == (0, 255)
    assert len(data.x_train.unique()) == 17


def test_the_digits_split_has_no_example_twice():
    data = load_dataset("digits")
    pixels = torch.cat([data.x_train, data.x_test]).flatten(1).numpy()
    given = ((read_digits()[0].reshape(-1, 64).astype(int) * 255 + 8) // 16).astype(np.uint8)
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, given))


@pytest.mark.slow
def test_the_digits_are_scikit_learns():
    """Also in their order, on which the split depends; and the file says whose they are."""
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    pixels, labels = read_digits()
    assert (pixels.dtype, labels.dtype, labels.tobytes()) == (np.uint8, np.int64, theirs.target.tobytes())
    assert pixels.astype(float).tobytes() == theirs.images.tobytes()
    about = json.loads(DIGITS.read_text(encoding="utf-8"))
    assert "CC BY 4.0" in about["licence"]
    assert "doi.org" in about["source"]


# mean and std


@pytest.mark.parametrize("name", ["digits", pytest.param("fashion-mnist", marks=pytest.mark.slow)])
def test_quoted_statistics_are_those_of_the_training_images(name):
    if name == "fashion-mnist" and not Path(DEBIAN_FASHION_MNIST).is_dir():
        pytest.skip(f"{DEBIAN_FASHION_MNIST} is not there (apt install dataset-fashion-mnist)")
    data = load_dataset(name)
    counts, values = np.bincount(data.x_train.numpy().ravel(), minlength=256), np.arange(256)
    mean = np.average(values / 255, weights=counts)
    np.testing.assert_allclose(data.mean, [mean], atol=6e-5)
    np.testing.assert_allclose(data.std, [np.average((values / 255 - mean) ** 2, weights=counts) ** 0.5], atol=6e-5)


def test_fashion_mnist_of_debian():
    if not Path(DEBIAN_FASHION_MNIST).is_dir():
        pytest.skip(f"{DEBIAN_FASHION_MNIST} is not there (apt install dataset-fashion-mnist)")
    data = load_dataset("fashion-mnist", "no-such-folder")
    assert data.x_train.shape == (60_000, 1, 28, 28)
    assert data.x_test.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.y_train).tolist() == [6000] * 10
    assert torch.bincount(data.y_test).tolist() == [1000] * 10
    assert data.y_train[:4].tolist() == [9, 0, 0, 3]


@pytest.mark.parametrize("channels", [1, 4])
def test_statistics_of_user_images(tmp_path, channels):
    content = arrays(channels, 5, 7)
    data = load_dataset(save(tmp_path / "mine.npz", **content))
    x = content["x_train"].astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, x.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, x.std(axis=(0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_channel_has_std_one(tmp_path, value):
    content = arrays(2, 5, 7)
    content["x_train"][:, 1] = value
    data = load_dataset(save(tmp_path / "mine.npz", **content))
    assert data.std[1] == 1.0
    assert data.mean[1] == pytest.approx(value / 255)
    assert 0 < data.std[0] < 1


# .npz files of the user's: tests/data/test_data_zoo.py has what they may hold


def test_a_class_may_occur_in_the_test_set_only(tmp_path):
    content = arrays(2, 2)
    content["y_test"][0] = 8
    assert load_dataset(save(tmp_path / "mine.npz", **content)).num_classes == 9


def test_an_npz_file_may_be_cut_anywhere(tmp_path):
    path = tmp_path / "mine.npz"
    refused(str(path), "there is no file", "mine.npz")
    save(path, **arrays(3, 4, 5))
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(str(path), "mine.npz is not an .npz file, or truncated")


# functions of the user's


@table(
    "result",
    [
        "x, y, x, y",
        "[x, y, x, y]",
        "dict(x_train=x, y_train=y, x_test=x, y_test=y, more=3)",
        "torch.tensor(x), torch.tensor(y), torch.tensor(x), torch.tensor(y)",
        "x[::-1][::-1], y, torch.tensor(x).requires_grad_(), y",
        "Dataset(torch.tensor(x), torch.tensor(y), torch.tensor(x), torch.tensor(y), 2, (), (), 'none')",
    ],
)
def test_what_a_users_function_may_return(user_module, result):
    module = user_module(f"""
        def load():
            x, y = np.arange(8.0).reshape(4, 2), np.array([0, 1, 0, 1])
            return {result}
    """)
    data = load_dataset(f"{module}:load")
    assert data.x_train.tolist() == data.x_test.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert data.y_train.tolist() == data.y_test.tolist() == [0, 1, 0, 1]
    assert (data.num_classes, data.mean, data.std, data.augment) == (2, (), (), "none")
    assert not data.x_test.requires_grad


@table(
    "signature, value",
    [("", 0), ("data_dir", 5), ("path", 5), ("*, data_dir='/abc'", 5), ("size=0, data_dir='/'", 5), ("n='12'", 2)],
)
def test_a_users_function_gets_data_dir_if_it_asks(user_module, signature, value):
    module = user_module(f"""
        def load({signature}):
            given = [value for value in locals().values() if isinstance(value, str)]
            x = np.full((2, 1), float(len(given[-1]) if given else 0))
            return x, np.array([0, 1]), x, np.array([0, 1])
    """)
    assert load_dataset(f"{module}:load", "abcde").x_train[0, 0] == value


def test_a_users_dataset_keeps_its_statistics(user_module):
    module = user_module("""
        x, y = torch.zeros(4, 3, 5, 5, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])

        def load():
            return Dataset(x, y, x, y, 7, (0.1, 0.2, 0.3), (1, 2, 3), "crop-flip")
    """)
    data = load_dataset(f"{module}:load")
    assert data[4:8] == (7, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "crop-flip")


@table(
    "body, words",
    [
        ("return 3", ["must return a Dataset", "returned int"]),
        ("return x, y", ["must return", "returned tuple of 2"]),
        ("return x.tolist(), y, x, y", ["x_train is a list"]),
        ("return dict(x_train=x, y_train=y)", ["has no x_test, y_test"]),
        ("raise OSError('two\\nlines')", ["raised OSError: two lines"]),
        ("return Dataset(x, y, x, y, 1, (0,) * 3, (1,) * 3, 'none')", ["num_classes = 1", "label 1"]),
        ("return Dataset(x, y, x, y, 2.5, (0,) * 3, (1,) * 3, 'none')", ["num_classes = 2.5"]),
        ("return Dataset(x, y, x, y, 2, (0,) * 2, (1,) * 3, 'none')", ["needs 3 numbers each"]),
        ("return Dataset(x, y, x, y, 2, (0, 0, np.nan), (1,) * 3, 'none')", ["needs 3 numbers each"]),
        ("return Dataset(x, y, x, y, 2, (0,) * 3, (1, 1, 0), 'none')", ["std", "must be positive"]),
        ("return Dataset(x, y, x, y, 2, None, (1, 1, 1), 'none')", ["mean and std must be tuples"]),
        ("return Dataset(x, y, x, y, 2, (0,) * 3, (1,) * 3, 'flip')", ["augment = 'flip'", "crop-flip"]),
        ("return Dataset(f, y, f, y, 2, (), (), 'crop-flip')", ["'crop-flip' needs images"]),
        ("return Dataset(x, y, x, -y, 2, (0,) * 3, (1,) * 3, 'none')", ["y_test has a negative label"]),
    ],
)
def test_users_functions_that_cannot_work(user_module, body, words):
    module = user_module(f"""
        x, y = torch.zeros(4, 3, 5, 5, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
        f = torch.zeros(4, 2)

        def load():
            {body}
    """)
    refused(f"{module}:load", *words)


def test_names_that_lead_nowhere(user_module):
    refused("fedmom_no_such:load", "no module named 'fedmom_no_such'")
    refused(user_module("") + ":load", "has no attribute 'load'")
    refused("cifar11", "did you mean cifar10", *DATASETS, "module:function")


def test_an_input_error_of_the_users_function_passes_through(user_module):
    module = user_module("""
        from fedmom.errors import InputError

        def load():
            raise InputError("my own line")
    """)
    with pytest.raises(InputError, match=r"^my own line$"):
        load_dataset(f"{module}:load")


# idx files


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_files() -> dict[str, np.ndarray]:
    content = arrays(28, 28, num_classes=10, num_train=12)
    stems = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return {f"{stem}-ubyte": content[key].astype(np.uint8) for stem, key in zip(stems, ARRAYS, strict=True)}


def write_mnist(folder: Path, zipped: bool = False) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    files = mnist_files()
    for name, array in files.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return files


@pytest.mark.parametrize(
    ("name", "below", "zipped"),
    [
        ("mnist", ".", False),
        ("mnist", "mnist", True),
        ("mnist", "MNIST/raw", False),
        ("fashion-mnist", ".", True),
        ("fashion-mnist", "fashion-mnist", False),
        ("fashion-mnist", "FashionMNIST/raw", True),
    ],
)
def test_idx_files_in_every_place(tmp_path, name, below, zipped):
    files = write_mnist(tmp_path / below, zipped)
    data = load_dataset(name, str(tmp_path))
    for tensor, array in zip(data[:4], files.values(), strict=True):
        np.testing.assert_array_equal(tensor.numpy().reshape(array.shape), array)
    assert data.input_shape == (1, 28, 28)
    assert data[4:8] == (10, DATASETS[name].mean, DATASETS[name].std, "none")


@table(
    "damage, word",
    [
        (lambda content: content[:-1], "truncated"),
        (lambda content: content[:16], "truncated"),
        (lambda content: content + b"0", "too long"),
        (lambda content: b"", "not an idx file"),
        (lambda content: b"\0\0\x0d" + content[3:], "not an idx file"),
        (lambda content: b"\0\0\x08\0", "not an idx file"),
        (lambda content: b"<html>" + content, "not an idx file"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], "truncated"),
        (lambda content: idx(np.zeros((12, 9, 9), np.uint8)), "uint8 [1, 9, 9], those of x_test"),
        (lambda content: idx(np.arange(12, dtype=np.uint8)), "x_train has shape [12]"),
    ],
)
def test_damaged_idx_files(tmp_path, damage, word):
    content = damage(idx(mnist_files()["train-images-idx3-ubyte"]))
    for zipped in (False, True):
        folder = tmp_path / ("zipped" if zipped else "plain")
        write_mnist(folder, zipped)
        path = folder / ("train-images-idx3-ubyte" + (".gz" if zipped else ""))
        path.write_bytes(gzip.compress(content) if zipped else content)
        message = refused("mnist", word, data_dir=str(folder))
        assert "[" in word or str(path) in message  # a whole file of the wrong shape is named by its array


@pytest.mark.parametrize("cut", [0, -1])
def test_damaged_gzip_files(tmp_path, cut):
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:cut])
    refused("mnist", str(path), data_dir=str(tmp_path))


def test_gzip_files_that_are_none(tmp_path):
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(b"<html>not found</html>")
    refused("mnist", f"cannot read {path}", "BadGzipFile", data_dir=str(tmp_path))


# named sets as .npz, CIFAR through torchvision, and what is missing


@pytest.mark.parametrize(
    ("name", "whole_path"), [("mnist", False), ("fashion-mnist", True), ("cifar10", True), ("cifar100", False)]
)
def test_named_sets_from_npz_come_before_other_files(tmp_path, name, whole_path):
    if "mnist" in name:
        write_mnist(tmp_path)
    shape = DATASETS[name].shape
    content = arrays(*shape, num_train=4)
    path = save(tmp_path / f"{name}.npz", **content)
    data = load_dataset(name, path if whole_path else str(tmp_path))
    np.testing.assert_array_equal(data.x_train.numpy(), content["x_train"])
    entry = DATASETS[name]
    assert data[4:8] == (entry.num_classes, entry.mean, entry.std, entry.augment)
    assert (entry.augment == "crop-flip") == name.startswith("cifar")


def test_a_named_set_must_look_like_itself(tmp_path):
    save(tmp_path / "cifar10.npz", **arrays(1, 28, 28))
    refused("cifar10", "uint8 [1, 28, 28], expected uint8 [3, 32, 32]", data_dir=str(tmp_path))
    save(tmp_path / "cifar10.npz", **arrays(3, 32, 32, num_train=20, num_classes=11))
    refused("cifar10", "has a label 10, expected 0 to 9", data_dir=str(tmp_path))
    refused("cifar10", "there is no file", data_dir=str(tmp_path / "other.npz"))


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_a_missing_set_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch, name):
    entry = DATASETS[name]
    # What Debian's package may have put on this machine is not there.
    folders = tuple(folder.replace(DEBIAN_FASHION_MNIST, str(tmp_path / "debian")) for folder in entry.folders)
    monkeypatch.setitem(DATASETS, name, entry._replace(folders=folders))
    message = refused(
        name,
        "not found",
        str(tmp_path / f"{name}.npz"),
        *(str(tmp_path / folder) for folder in folders),
        f"fedmom datasets --download {name} --data-dir {tmp_path}",
        data_dir=str(tmp_path),
    )
    assert ("apt install dataset-fashion-mnist" in message) == (name == "fashion-mnist")
    assert (str(tmp_path / "debian") in message) == (name == "fashion-mnist")


def test_an_entry_of_its_numbers_alone_is_a_file_by_its_name(tmp_path, monkeypatch):
    """What a contributor adds first: no class of torchvision's, no folder, no reader."""
    monkeypatch.setitem(DATASETS, "mine", shipped.DatasetEntry("a few, 1x4x4", (1, 4, 4), 3, (0.5,), (0.5,)))
    refused("mine", "not found", f"write its arrays into {tmp_path / 'mine.npz'}", data_dir=str(tmp_path))
    refused(
        "mine",
        "nothing to download",
        f"write its arrays into {tmp_path / 'mine.npz'}",
        data_dir=str(tmp_path),
        load=download,
    )
    save(tmp_path / "mine.npz", **arrays(1, 4, 4))
    assert load_dataset("mine", str(tmp_path)).mean == (0.5,)


@pytest.fixture
def cifar_folder(tmp_path, monkeypatch):
    """Write a CIFAR folder of a few images in the original format; torchvision is told its checksums."""
    import torchvision

    def write(name: str) -> dict[str, np.ndarray]:
        entry = DATASETS[name]
        content = arrays(3, 32, 32, num_classes=entry.num_classes)
        folder = tmp_path / entry.folders[0]
        folder.mkdir()
        key, meta_key = ("labels", "label_names") if name == "cifar10" else ("fine_labels", "fine_label_names")

        def dump(file: str, value: dict) -> list[str]:
            (folder / file).write_bytes(pickle.dumps(value))
            return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

        def batch(file: str, split: str) -> list[str]:
            x, y = content[f"x_{split}"], content[f"y_{split}"]
            return dump(file, {"data": x.reshape(len(x), -1), key: y.tolist()})

        _, meta_md5 = dump("names", {meta_key: [str(label) for label in range(entry.num_classes)]})
        dataset_class = getattr(torchvision.datasets, entry.torchvision)
        monkeypatch.setattr(dataset_class, "train_list", [batch("train", "train")])
        monkeypatch.setattr(dataset_class, "test_list", [batch("test", "test")])
        monkeypatch.setattr(dataset_class, "meta", {"filename": "names", "key": meta_key, "md5": meta_md5})
        return content

    return write


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_its_original_format(tmp_path, cifar_folder, name):
    content = cifar_folder(name)
    data = load_dataset(name, str(tmp_path))
    for tensor, key in zip(data[:4], ARRAYS, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), content[key])
    assert data.x_train.is_contiguous()
    (tmp_path / DATASETS[name].folders[0] / "test").write_bytes(b"torn")
    refused(name, "cannot read", DATASETS[name].folders[0], data_dir=str(tmp_path))


# downloads and imports


@pytest.mark.slow  # it imports torchvision
@pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if entry.torchvision])
def test_download_asks_torchvision_for_both_splits(tmp_path, monkeypatch, name):
    import torchvision

    calls = []
    monkeypatch.setattr(torchvision.datasets, DATASETS[name].torchvision, lambda **options: calls.append(options))
    download(name, str(tmp_path))
    assert calls == [{"root": str(tmp_path), "train": train, "download": True} for train in (True, False)]


def test_downloads_that_cannot_work(tmp_path, monkeypatch):
    import torchvision

    def fail(**options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    refused("mnist", "the download to", "OSError: no network", data_dir=str(tmp_path), load=download)
    refused("digits", "nothing to download; it is there", load=download)
    refused("mine.npz", "choose one of", load=download)


def test_without_the_library_that_a_data_set_needs_it_says_so(tmp_path, monkeypatch):
    """And .npz files and the digits need none."""
    path = save(tmp_path / "mine.npz", **arrays(2, 2))
    (tmp_path / "cifar-10-batches-py").mkdir()
    for library in ("torchvision", "sklearn"):
        monkeypatch.setitem(sys.modules, library, None)
    needs = "data.dataset = 'cifar10' needs torchvision, which is not installed: pip install 'fedmom[vision]'"
    assert refused("cifar10", data_dir=str(tmp_path)) == needs
    assert refused("cifar10", data_dir=str(tmp_path), load=download) == needs
    assert load_dataset(str(path)).num_classes == 3
    assert load_dataset("digits").num_classes == 10
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")
    refused("cifar10", "installed, but cannot be imported", "torchvision::nms", data_dir=str(tmp_path))


def test_input_shape_is_that_of_one_example():
    x, y = torch.zeros(2, 3, 4, 5), torch.zeros(2, dtype=torch.int64)
    assert Dataset(x, y, x, y, 1, (), (), "none").input_shape == (3, 4, 5)
