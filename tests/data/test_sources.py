"""Where examples come from: inputs by name, files that stay on the disk, streams, pairs, Python's own text."""

import io
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
from fedmom.data.sources import mapped
from fedmom.errors import InputError
from fedmom.records.identity import identity_of

RNG = np.random.default_rng(0)
Y = np.arange(6) % 3


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
