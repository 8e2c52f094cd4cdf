"""Where examples come from: inputs by name, files that stay on the disk, streams, pairs, Python's own text."""

import io
import shutil
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmom.config.build import make_problem
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data.datasets import ARRAYS, load_dataset
from fedmom.data.given.own_files import read_server, read_source
from fedmom.data.sources import mapped
from fedmom.data.sources.small import read_python_sources
from fedmom.errors import InputError
from fedmom.records.identity import identity_of
from fedmom.user_code import is_spec

RNG = np.random.default_rng(0)
Y = np.arange(6) % 3
Y_LIST = Y.tolist()


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    """A module of the user's, `my_sources`, whose function `load` returns `value`."""
    module: Any = types.ModuleType("my_sources")
    module.load = lambda: module.value
    monkeypatch.setitem(sys.modules, "my_sources", module)
    return module


def said(load: Any, *args: Any, **options: Any) -> str:
    """The one line of refusal."""
    with pytest.raises(InputError) as caught:
        load(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_inputs_by_name_of_a_file_are_those_of_a_function(mine, tmp_path):
    ids, mask = RNG.integers(0, 9, (6, 4)), RNG.integers(0, 2, (6, 4)).astype(bool)
    mine.value = {
        "x_train": {"ids": ids, "mask": mask},
        "y_train": Y,
        "x_test": {"mask": mask, "ids": ids},
        "y_test": Y,
    }
    flat = {f"{name}/{own}": value for name in ("x_train", "x_test") for own, value in mine.value[name].items()}
    path = tmp_path / "several.npz"
    np.savez(path, y_train=Y, y_test=Y, **flat)
    found = load_dataset(str(path))
    mine.value["x_test"] = mine.value["x_train"]
    for part, wanted in zip(found[:4], load_dataset("my_sources:load")[:4], strict=True):
        torch.testing.assert_close(part, wanted)
    assert [*found.x_test] == ["ids", "mask"]
    for more, line in (
        ({"x_train": ids}, "has x_train and x_train/ids; leave the one array"),
        ({"y_train/b": Y}, "has y_train and y_train/b"),
        ({"x_train/a b": ids}, "inputs are called by names"),
        ({"x_test/more": ids}, "those of x_test are"),
        ({"x_train/ids": ids[:5]}, "every input needs as many"),
    ):
        np.savez(path, **{"y_train": Y, "y_test": Y, **flat, **more})
        assert line in said(load_dataset, str(path))
    np.savez(path, **{"y_train/a": Y, "y_test": Y, **flat})
    assert "targets are one array" in said(load_dataset, str(path))


def test_a_file_that_stays_on_the_disk_gives_the_same_run(mine, monkeypatch, tmp_path):
    """Examples, minibatches, evaluation and identity, whatever the numbers' width and address in the file."""
    mine.model = lambda shape, outputs: torch.nn.Sequential(Reals(), torch.nn.Linear(int(np.prod(shape)), outputs))
    for dtype in ("f4", "f8", "f2", "u2", "i2", "i4", "u4", "i8", "u1"):
        x = np.arange(48).reshape(6, 2, 4).astype(dtype)
        for name in ("a.npz", "longer.npz"):  # of which the second has its arrays at other addresses
            path = tmp_path / name
            arrays = dict(zip(ARRAYS, (x, Y, x[::-1], Y), strict=True))
            np.savez(path, **({"z" * 3: np.zeros(1)} if name == "longer.npz" else {}), **arrays)
            keys = {"data.dataset": str(path), "data.num-clients": 2, "data.partition": "iid"}
            config = resolve(load({**keys, "model.name": "my_sources:model", "data.batch-size": 2})).config
            found = []
            for least in (1 << 40, 1):
                monkeypatch.setattr(mapped, "LEAST", least)
                problem = make_problem(config, "cpu")
                start, clients = problem.start(), torch.arange(2)
                problem.check_evaluation(start)
                batches = [[*batch] for batch in problem.round_batches(clients, torch.zeros(2, dtype=torch.int64), 3)]
                judged = problem.evaluate(start), problem.evaluate_clients(start, clients)
                ids = identity_of(config, problem)
                found.append((problem.dataset, batches, judged, ids.ids, dict(ids.contents)))
            whole, kept = found
            torch.testing.assert_close(whole[1:3], kept[1:3], rtol=0, atol=0)
            assert whole[3:] == kept[3:]
            torch.testing.assert_close(whole[0].x_train.to(torch.float64), kept[0].x_train.to(torch.float64))
            assert kept[0].x_train.element_size() == np.dtype(dtype).itemsize


class Reals(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).to(torch.float32)


def write_sparse(path: Path, arrays: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """An .npz file of zeros that are not on the disk, stored as np.savez does, {name: (dtype, shape)}."""
    directory = b""
    with path.open("wb") as file:
        for name, (dtype, shape) in arrays.items():
            head, start, called = io.BytesIO(), file.tell(), f"{name}.npy".encode()
            about = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(head, about)
            values = int(np.prod(shape)) * np.dtype(dtype).itemsize
            size = len(head.getvalue()) + values
            # Zeros have a checksum too, which is read where the member is small.
            crc = zlib.crc32(bytes(values), zlib.crc32(head.getvalue())) if values < 1 << 24 else 0
            about_it = struct.pack("<5H3I2H", 20, 0, 0, 0, 33, crc, size, size, len(called), 0)
            file.write(b"PK\3\4" + about_it + called + head.getvalue())
            file.seek(values, 1)
            directory += b"PK\1\2" + struct.pack("<H", 20) + about_it + struct.pack("<3H2I", 0, 0, 0, 0, start) + called
        start, count = file.tell(), len(arrays)
        file.write(directory + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, count, count, len(directory), start, 0))


SPARSE = """
import resource, sys, zipfile
import numpy as np, torch
sys.path.insert(0, {folder!r})
from fedmom.config.build import make_problem
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.records.identity import identity_of
from fedmom.user_code import is_spec

keys = {{"data.dataset": {path!r}, "data.num-clients": 50, "data.partition": "iid", "model.name": "big_model:model"}}
config = resolve(load({{**keys, "data.batch-size": 8}})).config
anonymous = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) << 10
torch.zeros(10).sum()
high, first = [0], anonymous()
import threading, time
stop = threading.Event()
def look():
    while not stop.is_set():
        high[0] = max(high[0], anonymous())
        time.sleep(0.005)
watcher = threading.Thread(target=look)
watcher.start()
problem = make_problem(config, "cpu")
start, clients = problem.start(), torch.arange(50)
problem.check_evaluation(start)
for batch in problem.round_batches(clients, torch.zeros(50, dtype=torch.int64), 2):
    pass
problem.evaluate(start)
problem.evaluate_clients(start, clients)
identity_of(config, problem)
stop.set()
watcher.join()
print(high[0] - first)
"""
BIG_MODEL = """
import torch
class Reals(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :8].to(torch.float32)
def model(shape, outputs):
    return torch.nn.Sequential(Reals(), torch.nn.Linear(8, outputs))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_copies_an_array_of_gigabytes(tmp_path):
    """All that a run does before and between rounds takes a tenth of the array in memory of its own, by any dtype."""
    (tmp_path / "big_model.py").write_text(BIG_MODEL)
    for dtype, n in (("f4", 120_000), ("u2", 240_000), ("u1", 480_000)):
        path = tmp_path / f"{dtype}.npz"
        write_sparse(
            path,
            {
                "x_train": (dtype, (n, 1, 64, 64)),
                "y_train": ("i8", (n,)),
                "x_test": (dtype, (600, 1, 64, 64)),
                "y_test": ("i8", (600,)),
            },
        )
        code = SPARSE.format(folder=str(tmp_path), path=str(path))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        size = path.stat().st_size
        print(f"{dtype}: {int(done.stdout):,} of {size:,}")
        assert int(done.stdout) < size / 10 + (150 << 20), f"{dtype}: {int(done.stdout):,} of {size:,}"
        path.unlink()


# Streams of tokens


def test_a_stream_is_cut_into_windows_whose_targets_are_the_next_tokens(mine, tmp_path):
    """As a loop cuts it, from every source and of every width; x and y share the stream's memory."""
    for length, T in ((2, 1), (9, 4), (10, 4), (11, 1), (50, 7)):
        stream = RNG.integers(0, 250, length)
        starts = [k for k in range(0, length, T) if k + T < length]
        x, y = (np.array([stream[k + d : k + d + T] for k in starts]) for d in (0, 1))
        sources = {}
        for dtype in (np.uint8, np.uint16, np.int32, np.int64):
            np.savez(tmp_path / f"{dtype.__name__}.npz", x_train=stream.astype(dtype), x_test=stream.astype(dtype))
            sources[str(tmp_path / f"{dtype.__name__}.npz")] = None
        for name in ("train.bin", "val.bin"):
            stream.astype("<u2").tofile(tmp_path / name)
        sources |= dict.fromkeys([f"{tmp_path}/", str(tmp_path / "train.bin")])
        given = (stream.astype(np.uint16), torch.from_numpy(stream))
        for value in (given, {"x_train": given[1], "x_test": given[0]}):
            sources["my_sources:load"] = value
            for name, mine.value in sources.items():
                found = load_dataset(name, targets="tokens", context=T)
                for part, wanted in zip(found[:4], (x, y, x, y), strict=True):
                    np.testing.assert_array_equal(part.to(torch.int64), wanted)
                assert found.num_classes == stream.max() + 1
                assert found.x_train.untyped_storage().data_ptr() == found.y_train.untyped_storage().data_ptr()


def test_a_stream_is_trained_on_as_its_windows_are(mine, tmp_path):
    """A model learns x -> next token from a file of uint16 as from whole arrays of int64."""

    class Next(torch.nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(size, size)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x)

    mine.model = lambda shape, outputs: Next(outputs)
    stream = (np.arange(65) * 7) % 50
    windows = dict(zip(ARRAYS, (stream[:64].reshape(8, 8), stream[1:].reshape(8, 8)) * 2, strict=True))
    for name in ("train.bin", "val.bin"):
        stream.astype("<u2").tofile(tmp_path / name)
    found = []
    for name, context, mine.value in ((f"{tmp_path}/", 8, None), ("my_sources:load", 0, windows)):
        keys = {"data.dataset": name, "data.task": "per-token", "data.context": context, "data.num-clients": 2}
        keys |= {"data.partition": "iid", "model.name": "my_sources:model", "data.batch-size": 2}
        problem = make_problem(resolve(load(keys)).config, "cpu")
        start, zeros = problem.start(), torch.zeros(2, dtype=torch.int64)
        problem.check_evaluation(start)
        batch = next(iter(problem.round_batches(torch.arange(2), zeros, 1)))
        found.append(([*batch], problem.evaluate(start), problem.evaluate_clients(start, torch.arange(2))))
        assert batch.x.dtype == batch.y.dtype == torch.int64
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_what_is_no_stream_or_no_task_for_one_is_refused(mine, tmp_path):
    stream = np.arange(30) % 7
    x = stream.reshape(6, 5)
    whole = dict(zip(ARRAYS, (x, x, x, x), strict=True))
    for value, context, targets, line in (
        ({"x_train": stream, "x_test": stream}, 0, "tokens", "data.context = 0"),
        ({"x_train": stream, "x_test": stream}, 4, "labels", "for data.task = 'per-token'; this task asks for labels"),
        (whole, 4, "tokens", "data.context = 4: cuts a stream of tokens"),
        ({"x_train": stream}, 4, "tokens", "has no x_test"),
        ({"x_train": stream, "x_test": stream[:4]}, 4, "tokens", "x_test of data.dataset = 'my_sources:load' has 4"),
        ({"x_train": stream - 1, "x_test": stream}, 4, "tokens", "x_train has a negative token, -1"),
        ({"x_train": stream, "x_test": stream / 2}, 4, "tokens", "a stream of tokens is whole numbers"),
        ({"x_train": stream, "x_test": x}, 4, "tokens", "a stream of tokens is whole numbers"),
        ({"x_train": stream * 10**6, "x_test": stream}, 4, "tokens", "renumber them"),
    ):
        mine.value = value
        assert line in said(load_dataset, "my_sources:load", targets=targets, context=context), line
    assert "data.context = 8: cuts" in said(load_dataset, "digits", context=8)
    for make, name, line in (
        (lambda: None, "nowhere/", "is not there: give FILE.npz"),
        (lambda: None, "", "there is no file"),
        (lambda: (tmp_path / "train.bin").write_bytes(b"abc"), "train.bin", "there is no file"),
        (lambda: (tmp_path / "val.bin").write_bytes(b"ab"), "train.bin", "has 3 bytes: it must be raw uint16"),
        (lambda: (tmp_path / "train.bin").write_bytes(b""), "", "has 0 bytes"),
        (lambda: None, "val.bin", "holds the test tokens"),
        (lambda: (tmp_path / "a.csv").write_text("1,2"), "a.csv", "is no folder of tokens"),
    ):
        make()
        assert line in said(load_dataset, f"{tmp_path}/{name}", targets="tokens", context=4), line
    config = resolve(load({"data.dataset": "local", "data.context": 4, "data.data-dir": str(tmp_path)})).config
    assert "data.context = 4" in said(make_problem, config, "cpu")


# Pairs of data sets of torch's kind


class Examples(torch.utils.data.Dataset):
    def __init__(self, *examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> Any:
        return self.examples[place]


def test_a_pair_of_data_sets_is_read_as_its_stacked_arrays(mine):
    x, y = torch.from_numpy(RNG.normal(size=(6, 3))), torch.from_numpy(Y)
    tensors = torch.utils.data.TensorDataset(x, y)
    words = Examples(*((one.numpy(), "abc"[int(label)]) for one, label in zip(x, y, strict=True)))
    numbers = Examples(*((one, int(label)) for one, label in zip(x, y, strict=True)))
    for one in (tensors, words, numbers, torch.utils.data.Subset(tensors, range(6))):
        mine.value = (one, one)
        found = load_dataset("my_sources:load")
        for part, wanted in zip(found[:4], (x, y, x, y), strict=True):
            torch.testing.assert_close(part, wanted)
    named = Examples(*(({"ids": torch.tensor([k]), "mask": torch.tensor([1])}, k % 2) for k in range(4)))
    mine.value = [named, named]
    assert load_dataset("my_sources:load").x_train["ids"].tolist() == [[0], [1], [2], [3]]
    good, long = (torch.zeros(2), 0), (torch.zeros(3), 0)
    for wrong, line in (
        (Examples(good, long), "x of example 1 is float32 [3], that of example 0 is float32 [2]"),
        (Examples(good, (torch.zeros(2).double(), 0)), "is float64 [2]"),
        (Examples(good, (torch.zeros(2), 0.5)), "y of example 1 is float64 [], that of example 0 is int64 []"),
        (Examples(good, (torch.zeros(2), "a")), "y of example 1"),
        (Examples(good, (torch.zeros(2), None)), "is a NoneType: give a tensor"),
        (Examples(good, torch.zeros(2)), "example 1 is a Tensor; it must be a pair (x, y)"),
        (Examples(), "the train set has no examples"),
        (Examples(*(({"a": good[0], **more}, 0) for more in ({}, {"b": 1}))), "example 1 has a, b, example 0 has a"),
        (types.SimpleNamespace(), "two data sets of (x, y) by number"),
        (iter([good]), "two data sets of (x, y) by number"),
    ):
        mine.value = (wrong, tensors)
        assert line in said(load_dataset, "my_sources:load"), line


# Words as labels


def test_words_are_numbered_by_data_classes_where_no_client_knows_them_all(tmp_path):
    x, path = np.ones((3, 2)), tmp_path / "client-0.npz"
    np.savez(path, x_train=x, y_train=np.array(["dog", "cat", "dog"]), x_test=x[:1], y_test=np.array(["bird"]))
    found = read_source(path, "cat, dog,bird")
    assert (found.y_train.tolist(), found.y_test.tolist()) == ([1, 0, 1], [2])
    assert "data.classes must name all" in said(read_source, path)
    assert "does not name 'dog'" in said(read_source, path, "cat,bird")
    assert "names 'cat' twice" in said(read_source, path, "cat,cat")
    np.savez(tmp_path / "test.npz", x_test=x, y_test=np.array(["cat", "dog", "cat"]))
    assert read_server(str(tmp_path), "cat,dog,bird").y_test.tolist() == [0, 1, 0]


# Python's own text


def test_pythons_library_is_cut_file_by_file(monkeypatch, tmp_path):
    texts = {"a.py": 23 * 4 + 1, "b/__init__.py": 4, "b/c.py": 41, "test/d.py": 90, "site-packages/e.py": 90}
    for name, size in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(RNG.integers(0, 256, size, dtype=np.uint8)))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    found = read_python_sources("data.dataset", 4)
    assert found["module"].tolist() == ["a"] * 21 + ["b"] * 9  # 23 windows, none, and 10: a tenth is test
    assert found["module_test"].tolist() == ["a"] * 2 + ["b"]
    held = load_dataset("python-sources", clients="module", targets="tokens", context=4).ids
    assert held is not None
    assert {name: len(ids) for name, ids in held.items()} == {"module": 30, "module_test": 3}
    text = np.frombuffer((tmp_path / "a.py").read_bytes(), dtype=np.uint8)
    np.testing.assert_array_equal(np.concatenate([found["x_train"][:21], found["x_test"][:2]]).ravel(), text[:-1])
    np.testing.assert_array_equal(np.concatenate([found["y_train"][:21], found["y_test"][:2]]).ravel(), text[1:])
    assert load_dataset("python-sources", targets="tokens", context=4).num_classes == 256
    assert "its targets are tokens" in said(load_dataset, "python-sources")
    assert "give a text of your own" in said(load_dataset, "python-sources", targets="tokens", context=50)


# Hugging Face's data sets


def test_a_table_is_asked_for_by_its_name_and_columns():
    assert not is_spec("hf:mnist")
    for name in ("hf:mnist", "hf:glue:sst2", "texts/", "some/texts", "tokens.bin"):
        assert load({"data.dataset": name}).config.data.dataset == name
    assert "data.columns = 'a,b': are those of hf:NAME" in said(load_dataset, "digits", columns="a,b")


@pytest.mark.slow
def test_a_saved_table_gives_its_columns(tmp_path):
    """Numbers to the last bit, images as they were, classes and words as labels; text and doubt are refused."""
    tables = pytest.importorskip("datasets")
    tables.disable_progress_bars()
    path, reals = tmp_path / "table", RNG.normal(size=(6, 3))
    images = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)

    def save(test: str = "test", **columns: Any) -> str:
        shutil.rmtree(path, ignore_errors=True)
        part = tables.Dataset.from_dict(columns)
        if "image" in columns:
            part = part.cast_column("image", tables.Image())
        if "label" in columns and columns["label"] is Y_LIST:
            part = part.cast_column("label", tables.ClassLabel(names=["a", "b", "c"]))
        tables.DatasetDict({"train": part, test: part}).save_to_disk(str(path))
        return f"hf:{path}"

    name = save(x=reals.tolist(), label=Y_LIST)
    found = load_dataset(name)
    np.testing.assert_array_equal(found.x_train, reals)
    assert (found.y_test.tolist(), found.num_classes) == (Y_LIST, 3)
    assert load_dataset(save("validation", x=reals.tolist(), target=["a", "b", "b", "a", "a", "b"])).num_classes == 2
    name = save(x=reals.tolist(), y=reals[:, :2].tolist())
    np.testing.assert_array_equal(load_dataset(name, targets="numbers").y_train, reals[:, :2])
    from PIL import Image

    name = save(image=[Image.fromarray(one) for one in images], label=Y_LIST)
    np.testing.assert_array_equal(load_dataset(name).x_train, images.transpose(0, 3, 1, 2))
    name = save(ids=[[1, 2]] * 6, mask=[[1, 0]] * 6, label=Y_LIST)
    assert {*load_dataset(name, columns="ids,mask,label").x_train} == {"ids", "mask"}
    for columns, line in (
        ("", "say which are inputs and, last, the target"),
        ("ids,kind", "has no column 'kind'; it has ids, mask, label"),
        ("label", "must be inputs and, last, the target"),
    ):
        assert line in said(load_dataset, name, columns=columns)
    assert "text is text: tokenise it" in said(load_dataset, save(text=["a"] * 6, label=Y_LIST))
    assert "text is text: tokenise it" in said(load_dataset, f"hf:{path}", columns="text,label")
    ragged = said(load_dataset, save(x=[[1]] * 5 + [[1, 2]], label=Y_LIST))
    assert "x of example 5 is int64 [2], that of example 0 is int64 [1]" in ragged
    assert "needs train and test" in said(load_dataset, save("other", x=reals.tolist(), label=Y_LIST))
    tables.Dataset.from_dict({"x": [1]}).save_to_disk(str(tmp_path / "one"))
    assert "is one split" in said(load_dataset, f"hf:{tmp_path / 'one'}")
