"""Data as they come from the field: each read as numpy and Pillow read it, or refused in one line with what would do.

The tables below are docs/data.md's; `python tests/data/test_data_zoo.py` writes them there.
"""

import io
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fedmom.config.build import make_problem
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data.datasets import ARRAYS, Dataset, load_dataset
from fedmom.data.given.own_files import client_source, read_server, read_source
from fedmom.data.local import agreed, facts_of
from fedmom.data.partition import PARTITIONS, make_partition
from fedmom.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
RNG = np.random.default_rng(0)


def u8(*shape: int) -> np.ndarray:
    return RNG.integers(1, 256, shape, dtype=np.uint8)


def reals(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def locked(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


def mapped(x: np.ndarray) -> np.ndarray:
    file = Path(sys.modules["zoo_of_data"].folder) / "mapped.npy"
    np.save(file, x)
    return np.load(file, mmap_mode="r")


def ragged() -> np.ndarray:
    return np.array([np.zeros(2), np.zeros(3), None, 1], dtype=object)


class Row(NamedTuple):
    """One kind of input: either `right` or `says` is given."""

    what: str
    make: Callable[[], Any]
    right: Callable[[Any], Any] | None = None  # the array as made -> what the loader must give
    becomes: str = ""  # the same in words
    says: str = ""  # part of the refusal: what would do
    why: str = ""


def same(x: Any) -> Any:
    return np.asarray(x)


def first(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 3, 1)


IMAGE_ARRAYS = [
    Row("uint8 `[n, H, W]`", lambda: u8(4, 5, 7), lambda x: x[:, None], "grey images `[n, 1, H, W]`"),
    Row("uint8 `[n, 1 or 3, H, W]`", lambda: u8(4, 3, 5, 7), same, "images as they are"),
    Row("uint8 `[n, H, W, 1 or 3]`", lambda: u8(4, 5, 7, 3), first, "`[n, C, H, W]`"),
    Row("uint8 `[n, H, W, 4]`", lambda: u8(4, 6, 7, 4), first, "`[n, 4, H, W]`", why="fewer channels than pixels"),
    Row("uint8 `[n, 4, H, W]`", lambda: u8(4, 4, 6, 7), same, "images as they are", why="likewise"),
    Row("uint8 `[n, 12, 12, 13]`", lambda: u8(4, 12, 12, 13), first, "`[n, 13, 12, 12]`", why="square images"),
    Row("uint8 `[n, 13, 12, 12]`", lambda: u8(4, 13, 12, 12), same, "images as they are", why="square images"),
    Row("uint8 `[n, 9, 9, 103]`", lambda: u8(4, 9, 9, 103), first, "`[n, 103, 9, 9]`", why="square images"),
    Row(
        "uint8 `[n, 3, 7, 3]`",
        lambda: u8(4, 3, 7, 3),
        says="channels could be axis 1 or axis 3",
        why="both look like colours",
    ),
    Row("uint8 `[n, 8, 8, 8]`", lambda: u8(4, 8, 8, 8), says="return a fedmom.Dataset", why="any axis fits"),
    Row(
        "uint8 `[n, 20, 30, 25]`",
        lambda: u8(4, 20, 30, 25),
        says="could be axis 1 or axis 3",
        why="neither square nor few",
    ),
    Row("uint8 of five axes", lambda: u8(4, 3, 2, 5, 5), says="uint8 images are [n, H, W] or [n, C, H, W]"),
    Row(
        "uint8 `[n, d]`",
        lambda: u8(4, 64),
        says="features and ids are another dtype",
        why="flat images have lost their shape",
    ),
]
FEATURES = [
    Row("float32, float64, float16 `[n, …]`", lambda: reals(4, 2, 3).astype(np.float16), same, "features as they are"),
    Row(
        "integers but uint8 `[n, …]`",
        lambda: np.array([[1049, 2], [3, 2**40]]),
        same,
        "int64, never cast",
        why="ids feed an Embedding: one digit lost is another word",
    ),
    Row(
        "the same as uint32, int16, …",
        lambda: np.array([[7, 2**32 - 1]], np.uint32),
        lambda x: x.astype(np.int64),
        "int64",
    ),
    Row("uint64 of 2^63 and more", lambda: np.array([[2**63]], np.uint64), says="2^63 and more"),
    Row("bool", lambda: np.ones((4, 2), bool), says="astype(np.float32)"),
    Row("one number per example, `[n]`", lambda: np.ones(4), says="x.reshape(-1, 1)"),
    Row("NaN", lambda: np.array([[1.0, np.nan]]), says="NaN or infinite"),
    Row("±inf", lambda: np.array([[1.0, -np.inf]]), says="NaN or infinite"),
    Row("complex", lambda: np.ones((4, 2), np.complex64), says="np.stack([x.real, x.imag], axis=1)"),
    Row("long double", lambda: np.ones((4, 2), np.longdouble), says="give float64 or float32"),
    Row("object (ragged, None)", ragged, says="one shape and one dtype"),
    Row("strings", lambda: np.array([["a", "b"]]), says="np.unique(words, return_inverse=True)[1]"),
    Row("dates", lambda: np.array([["2026-01-01"]], "M8[D]"), says="give numbers, such as days"),
    Row("structured", lambda: np.zeros(4, "f4,i4"), says="its fields side by side"),
    Row("examples of size 0", lambda: np.zeros((4, 0, 2)), says="its examples are empty"),
    Row("no examples", lambda: np.zeros((0, 2)), says="is empty"),
    Row("one example", lambda: reals(1, 2), same, "features as they are"),
    Row("Fortran order", lambda: np.asfortranarray(reals(4, 3)), same, "the same numbers"),
    Row("reversed or strided views", lambda: reals(8, 3)[::-2], same, "the same numbers"),
    Row("another byte order", lambda: reals(4, 3).astype(">f4"), same, "the same numbers"),
    Row("read-only", lambda: locked(reals(4, 3)), same, "a copy", why="a model may write into its input"),
    Row("memory-mapped", lambda: mapped(reals(4, 3)), same, "stays in its file"),
    Row("masked, nothing hidden", lambda: np.ma.masked_array(reals(4, 3)), same, "the numbers"),
    Row(
        "masked, something hidden",
        lambda: np.ma.masked_invalid(np.array([[1.0, np.nan]])),
        says="fill them (x.filled(value))",
        why="`np.savez` drops the mask without a word: fill before saving",
    ),
    Row("a list, a table", lambda: [[1.0, 2.0]], says="not a numpy array or tensor"),
    Row("a sparse tensor", lambda: torch.eye(3).to_sparse(), says="give it dense"),
    Row(
        "a tensor that wants its gradient",
        lambda: torch.ones(2, 3, requires_grad=True),
        lambda x: x.detach().numpy(),
        "the numbers",
    ),
    Row(
        "bfloat16 tensors",
        lambda: torch.tensor([[1.5, 2.25]], dtype=torch.bfloat16),
        lambda x: x.float().numpy(),
        "features as they are",
    ),
    Row("float8, quantised", lambda: torch.ones(2, 3).to(torch.float8_e4m3fn), says="give float64 or float32"),
]
LABELS = [
    Row("any integers `[n]`, any byte order", lambda: np.array([0, 2, 1], ">u2"), same, "int64"),
    Row(
        "a class without examples",
        lambda: np.array([0, 8, 0]),
        same,
        "9 classes",
        why="a client, or a test set, may lack one",
    ),
    Row("`[n, 1]`", lambda: np.array([[0], [1]]), says="y.reshape(-1)"),
    Row("one-hot `[n, C]`", lambda: np.eye(3, dtype=int), says="y.argmax(1)"),
    Row("floats, also whole ones", lambda: np.array([0.0, 1.0]), says="astype(np.int64)"),
    Row("bool", lambda: np.array([True, False]), says="astype(np.int64)"),
    Row("strings", lambda: np.array(["cat", "dog"]), says="np.unique(words, return_inverse=True)[1]"),
    Row("object", lambda: np.array([0, None], object), says="one dtype"),
    Row("negative", lambda: np.array([0, -1]), says="a negative label, -1"),
    Row(
        "ids such as 1,000,000,000",
        lambda: np.array([0, 10**9]),
        says="renumber them (np.unique(y, return_inverse=True)[1]",
        why="a model has an output for each number up to the highest",
    ),
    Row("2^63 and more", lambda: np.array([0, 2**63], np.uint64), says="2^63 and more"),
    Row("a single number", lambda: np.array(3), says="labels are [n]"),
    Row("more or fewer than examples", lambda: np.arange(7), says="examples, y_train has 7"),
]


@pytest.fixture(autouse=True)
def zoo(tmp_path, monkeypatch):
    """A module of the user's, `zoo_of_data`, whose function `load` returns `value`."""
    module: Any = types.ModuleType("zoo_of_data")
    module.folder, module.value = tmp_path, None
    module.load = lambda: module.value
    monkeypatch.setitem(sys.modules, "zoo_of_data", module)
    return module


def outcome(load: Callable[[], Any]) -> Any:
    """What came, or the line of refusal; a warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return load()
        except InputError as error:
            return str(error)


def judge(row: Row, found: Any, made: Any, where: str, key: str = "data.dataset") -> list[str]:
    """Why `found`, an array or a refusal, is not what the row says; nothing where it is."""
    if isinstance(found, str):
        right = bool(row.says) and row.says in found and found.startswith(key) and "\n" not in found
        return [] if right else [f"{row.what} ({where}): refused: {found}"]
    if row.right is None:
        return [f"{row.what} ({where}): was taken as {found.dtype} {list(found.shape)}"]
    values = found.to(torch.float32) if found.dtype == torch.bfloat16 else found
    wanted = row.right(made)
    alike = values.shape == wanted.shape and np.array_equal(values.numpy(), wanted)
    return [] if alike and found.is_contiguous() else [f"{row.what} ({where}): {found.dtype} {list(found.shape)}"]


def plain_numbers(v: np.ndarray) -> bool:
    """Whether torch takes the array as it is."""
    fits = v.dtype.kind in "biuf" and v.dtype.itemsize <= 8 and v.dtype.isnative and min(v.strides, default=0) >= 0
    return fits and v.flags.writeable and not isinstance(v, np.ma.MaskedArray)


def forms(zoo: Any, content: dict[str, Any]) -> dict[str, str]:
    """{how it is given: data.dataset}: by a function, as tensors where torch can, by a file where numpy can."""
    zoo.value = content
    ways = {"function": "zoo_of_data:load"}
    plain = all(isinstance(v, np.ndarray) and not v.dtype.hasobject for v in content.values())
    if all(isinstance(v, np.ndarray) and plain_numbers(v) for v in content.values()):
        zoo.tensors = lambda: {name: torch.from_numpy(value) for name, value in content.items()}
        ways["tensors"] = "zoo_of_data:tensors"
    if plain and not any(np.ma.is_masked(v) for v in content.values()):
        np.savez(zoo.folder / "Mine.NPZ.npz", **content)
        ways["file"] = str((zoo.folder / "Mine.NPZ.npz").rename(zoo.folder / "mine.NPZ"))
    return ways


def test_arrays_are_read_as_numpy_reads_them_or_refused(zoo):
    wrong = []
    for row in [*IMAGE_ARRAYS, *FEATURES]:
        x = row.make()
        y = np.arange(len(x)) % 2
        for way, name in forms(zoo, dict(zip(ARRAYS, (x, y, x, y), strict=True))).items():
            found = outcome(lambda name=name: load_dataset(name).x_train)
            wrong += judge(row, found, x, way)
    for row in LABELS:
        y = row.make()
        x = reals(max(2, np.size(y) if y.ndim == 1 and len(y) < 7 else 2), 3)
        good = np.arange(len(x)) % 2
        for way, name in forms(zoo, dict(zip(ARRAYS, (x, y, x, good), strict=True))).items():
            found = outcome(lambda name=name: load_dataset(name).y_train)
            wrong += judge(row, found, y, way)
    assert not wrong, "\n".join(wrong)


def test_a_dataset_says_what_arrays_cannot(zoo):
    """Its mean says which axis has the channels, its num_classes how many there are."""
    x, y = u8(4, 3, 7, 3), np.array([0, 5000, 2, 1])
    zoo.value = Dataset(x, y, x, y, 6000, (0.5,) * 3, (0.5,) * 3, "none")
    assert load_dataset("zoo_of_data:load").num_classes == 6000
    np.testing.assert_array_equal(load_dataset("zoo_of_data:load").x_train, x)
    x = u8(4, 8, 7, 5)
    zoo.value = Dataset(x, y, x, y, 6000, (0.5,) * 5, (0.5,) * 5, "none")
    np.testing.assert_array_equal(load_dataset("zoo_of_data:load").x_train, first(x))


# Files


def pack(**changes: Any) -> bytes:
    x, y = np.ones((4, 2)), np.arange(4) % 2
    content = dict(zip(ARRAYS, (x, y, x, y), strict=True)) | changes
    file = io.BytesIO()
    np.savez_compressed(file, **{name: value for name, value in content.items() if value is not None})
    return file.getvalue()


FILES = [
    Row("compressed, with more arrays than four", lambda: pack(more=np.ones(3)), lambda _: np.ones((4, 2)), "the four"),
    Row("cut off", lambda: pack()[:-30], says="is not an .npz file, or truncated"),
    Row("some other file", lambda: b"x,y\n1,2\n", says="is not an .npz file, or truncated"),
    Row("damaged inside", lambda: pack()[:90] + b"????" + pack()[94:], says="cannot read"),
    Row("pickled arrays", lambda: pack(x_test=ragged()), says="Object arrays cannot be loaded"),
    Row("arrays are missing", lambda: pack(y_test=None, x_train=None), says="has no x_train, y_test"),
    Row("test labels are fewer", lambda: pack(y_test=np.arange(3)), says="x_test has 4 examples, y_test has 3"),
    Row("no test examples", lambda: pack(x_test=np.ones((0, 2)), y_test=np.arange(0)), says="x_test is empty"),
    Row("NaN among test examples", lambda: pack(x_test=np.full((4, 2), np.nan)), says="x_test has values that are NaN"),
    Row(
        "images for training, features for the test",
        lambda: pack(x_train=u8(4, 2, 2)),
        says="those of x_test are float64 [2]",
    ),
    Row(
        "training and test examples differ",
        lambda: pack(x_test=np.ones((4, 3))),
        says="those of x_test are float64 [3]",
    ),
]


def test_files_are_read_whole_or_refused(zoo):
    wrong = []
    for row in FILES:
        (zoo.folder / "mine.npz").write_bytes(row.make())
        wrong += judge(row, outcome(lambda: load_dataset(str(zoo.folder / "mine.npz")).x_train), None, "file")
    assert not wrong, "\n".join(wrong)


# Images in folders


def picture(mode: str = "RGB", *, opaque: bool = True) -> Any:
    from PIL import Image

    if mode in ("I;16", "F"):
        return Image.fromarray((65535 * RNG.random((6, 5))).astype(np.uint16 if mode == "I;16" else np.float32))
    image = Image.fromarray(u8(6, 5, 3)).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(255 if opaque else 128)
    return image


def write(path: Path, image: Any, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def draw(name: str, mode: str = "RGB", *, opaque: bool = True, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / "0" / name, picture(mode, opaque=opaque), **options)
        return folder / "0" / name

    return make


def pillow(path: Path) -> np.ndarray:
    """What Pillow shows: grey where it is grey, colours else, turned as a viewer turns it."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image.convert("L" if image.mode == "L" else "RGB")))
    return pixels[None, None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)[None]


def turned(folder: Path) -> Path:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return draw("0.jpg", exif=exif)(folder)


def frames(name: str, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / "0" / name, picture(), save_all=True, append_images=[picture()], **options)
        return folder / "0" / name

    return make


def palette(folder: Path) -> Path:
    image = picture("P")
    image.putpixel((0, 0), 0)
    write(folder / "0" / "0.png", image, transparency=0)
    return folder / "0" / "0.png"


def beside(name: str, content: bytes = b"?") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = draw("0.png")(folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return path

    return make


def cut(folder: Path) -> Path:
    path = draw("0.png")(folder)
    path.write_bytes(path.read_bytes()[:-40])
    return path


def linked(target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder.parent / "elsewhere.png", picture())
        (folder / "0").mkdir(parents=True)
        (folder / "0" / "0.png").symlink_to(folder.parent / target)
        return folder / "0" / "0.png"

    return make


def two(mode: str, other: str, turn: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / "0" / "0.png", picture(mode))
        image = picture(other)
        write(folder / "0" / "1.png", image.rotate(90, expand=True) if turn else image)
        return folder / "0" / "0.png"

    return make


def labelled(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            write(folder / name / "0.png", picture())
        return folder / names[0] / "0.png"

    return make


IMAGES = [
    Row(
        "PNG, JPEG, BMP, GIF, WebP, TIFF, PPM, in colour", lambda: draw("0.webp", lossless=True), pillow, "`[3, H, W]`"
    ),
    Row("TIFF", lambda: draw("0.tif"), pillow, "`[3, H, W]`"),
    Row("grey", lambda: draw("0.png", "L"), pillow, "`[1, H, W]`"),
    Row("black and white (1 bit)", lambda: draw("0.png", "1"), pillow, "`[3, H, W]`"),
    Row("a palette", lambda: draw("0.png", "P"), pillow, "`[3, H, W]`, its colours"),
    Row("CMYK", lambda: draw("0.jpg", "CMYK"), pillow, "`[3, H, W]`, Pillow's colours"),
    Row("opaque alpha", lambda: draw("0.png", "RGBA"), pillow, "`[3, H, W]`"),
    Row(
        "transparent pixels",
        lambda: draw("0.png", "RGBA", opaque=False),
        says="put it on a background",
        why="the colour behind is nobody's",
    ),
    Row("a transparent colour in a palette", lambda: palette, says="put it on a background"),
    Row(
        "16 bits of grey", lambda: draw("0.png", "I;16"), says="has more than 8 bits", why="8 bits of it would be white"
    ),
    Row("float TIFF", lambda: draw("0.tif", "F"), says="has more than 8 bits"),
    Row("turned by EXIF", lambda: turned, pillow, "as a viewer shows it"),
    Row("animated GIF, TIFF of pages", lambda: frames("0.gif"), says="holds 2 pictures"),
    Row("JPEG with a preview (MPO)", lambda: frames("0.jpg", format="MPO"), pillow, "the picture"),
    Row("`.PNG`, `.JPG`", lambda: draw("0.PNG"), pillow, "read"),
    Row("hidden files, `Thumbs.db`", lambda: beside("0/.DS_Store"), pillow, "left out", why="nobody put them there"),
    Row("macOS's `._0.png`", lambda: beside("0/._0.png"), pillow, "left out"),
    Row(
        "another file among images",
        lambda: beside("0/notes.txt"),
        says="is no image",
        why="nothing is left out without a word",
    ),
    Row("a folder in a label's folder", lambda: beside("0/more/1.png"), says="is a folder"),
    Row("an image beside the labels' folders", lambda: beside("1.png"), says="belongs into one of them"),
    Row("symbolic links", lambda: linked("elsewhere.png"), pillow, "followed"),
    Row("a link to nothing", lambda: linked("nowhere.png"), says="cannot read"),
    Row("cut off", lambda: cut, says="cannot read"),
    Row("empty, or no image inside", lambda: beside("0/1.png", b""), says="cannot read"),
    Row(
        "two sizes",
        lambda: two("L", "L", turn=True),
        says="is [1, 5, 6], 0.png is [1, 6, 5]; all images of all clients need the same",
    ),
    Row("grey beside colour", lambda: two("L", "RGB"), says="the same channels, height and width"),
    Row("folders `01` and `1`", lambda: labelled("01", "1"), says="put both into one folder"),
    Row("a folder without a number", lambda: labelled("cat"), says="data.classes must name it"),
    Row("a number of twenty digits", lambda: labelled("9" * 20), says="the folder's name must be"),
]


def test_folders_of_images_are_read_as_pillow_reads_them_or_refused(tmp_path):
    pytest.importorskip("PIL")
    wrong = []
    for k, row in enumerate(IMAGES):
        folder = tmp_path / str(k)
        path = row.make()(folder / "train")
        wrong += judge(row, outcome(lambda folder=folder: read_source(folder).x_train), path, "folder")
    write(tmp_path / "twice" / "train" / "a" / "0.png", picture())
    assert "names 'a' twice" in outcome(lambda: read_source(tmp_path / "twice", "a,b,a"))
    assert not wrong, "\n".join(wrong)


def test_a_client_and_the_server_have_one_source_each(tmp_path):
    x, y = np.ones((2, 3)), np.array([0, 1])
    np.savez(tmp_path / "client-0.npz", x_train=x, y_train=y, x_test=x)
    assert "has x_test and no y_test" in outcome(lambda: read_source(tmp_path / "client-0.npz"))
    (tmp_path / "client-0").mkdir()
    assert "leave one of them" in outcome(lambda: client_source(str(tmp_path), 0))
    (tmp_path / "server" / "data").mkdir(parents=True)
    for name in "ab":
        np.savez(tmp_path / "server" / "data" / f"{name}.npz", x_test=x, y_test=y)
    assert "leave the server one test set" in outcome(lambda: read_server(str(tmp_path)))
    np.savez(tmp_path / "ids.npz", x_train=x, y_train=y * 10**9, x_test=x, y_test=y)
    assert "renumber them" in outcome(lambda: agreed([facts_of(read_source(tmp_path / "ids.npz"))]))


# What keys make of them


class Use(NamedTuple):
    """Examples under some keys: what happens to them before anything is trained."""

    what: str
    x: Callable[[], np.ndarray]
    keys: dict[str, str]
    says: str = ""
    becomes: str = ""


USES = [
    Use(
        "whole numbers from 257 on, as floats",
        lambda: np.array([[1001.0], [1003.0]]),
        {"run.dtype": "bfloat16"},
        "would change (1001 to 1000): give ids as integers",
    ),
    Use(
        "whole numbers above 2^24, as float64", lambda: np.array([[2.0**24 + 1], [1.0]]), {}, "or run.dtype = 'float64'"
    ),
    Use("float64 beyond 3.4e38", lambda: np.array([[1e300], [1.0]]), {}, "run.dtype = 'float32' makes infinite"),
    Use("the same", lambda: np.array([[1e300], [1.0]]), {"run.dtype": "float64"}, becomes="float64, exact"),
    Use("real numbers", lambda: np.array([[0.1], [300.7]]), {"run.dtype": "bfloat16"}, becomes="rounded"),
    Use(
        "integers",
        lambda: np.array([[2**40 + 1], [3]]),
        {"run.dtype": "bfloat16", "model.name": "zoo_of_data:model"},
        becomes="int64, exact",
    ),
    Use("integers", lambda: np.array([[5], [3]]), {"model.name": "mlp"}, "takes real numbers"),
    Use(
        "float images `[n, H, W, 3]`", lambda: reals(4, 9, 9, 3), {"model.name": "resnet20"}, "x.transpose(0, 3, 1, 2)"
    ),
    Use(
        "float images `[n, H, W, 3]`",
        lambda: reals(4, 9, 9, 3),
        {"data.augment": "crop-flip"},
        "x.transpose(0, 3, 1, 2)",
    ),
]


class Parity(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear((x % 2).to(self.linear.weight.dtype))


def test_what_the_keys_would_spoil_is_refused_before_training(zoo):
    zoo.model = lambda shape, num_classes: Parity()
    wrong = []
    for use in USES:
        x = use.x()
        y = np.arange(len(x)) % 2
        zoo.value = dict(zip(ARRAYS, (x, y, x, y), strict=True))
        keys = {"data.dataset": "zoo_of_data:load", "data.num-clients": 1, "data.batch-size": len(x)}
        config = resolve(load({**keys, "model.name": "logistic", **use.keys})).config
        found = outcome(lambda config=config: make_problem(config, "cpu"))
        if isinstance(found, str):
            wrong += [] if use.says and use.says in found else [f"{use}: {found}"]
            continue
        start = torch.zeros(1, dtype=torch.int64)
        batch = next(iter(found.round_batches(start, start, 1))).x[0]
        seen = batch.to(torch.float64).sort(0).values.numpy()
        exact = np.array_equal(seen, np.sort(x.astype(np.float64), axis=0))
        wrong += [] if use.becomes and exact == ("exact" in use.becomes) else [f"{use}: became {seen.tolist()}"]
    assert not wrong, "\n".join(wrong)


def test_what_a_model_writes_into_its_input_changes_no_example(zoo):
    class Writes(Parity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.mul_(0).to(self.linear.weight.dtype))

    zoo.model = lambda shape, num_classes: Writes()
    for x in (reals(4, 1), np.array([[1], [2], [3], [4]])):
        test = torch.from_numpy(x.copy())
        zoo.value = dict(zip(ARRAYS, (x, np.arange(4) % 2, test, np.arange(4) % 2), strict=True))
        keys = {"data.dataset": "zoo_of_data:load", "data.num-clients": 1, "model.name": "zoo_of_data:model"}
        problem = make_problem(resolve(load(keys)).config, "cpu")
        problem.evaluate(problem.start())
        np.testing.assert_array_equal(test.numpy(), x)


def test_every_partition_gives_each_example_once_or_says_what_fits():
    for name in PARTITIONS:
        for labels, num_clients in (([0], 1), ([3] * 6, 2), ([0, 10**6, 5, 5], 2), (list(range(6)), 3)):
            options = {"shards_per_client": 1, "alpha": 5.0}
            found = make_partition(name, np.array(labels), num_clients, **options)
            assert sorted(found.indices) == list(range(len(labels)))
            assert found.sizes.min() >= 1
        assert "only 2 examples" in outcome(lambda name=name: make_partition(name, np.arange(2), 3))


# The page


def rows(header: str, table: list[Any]) -> str:
    lines = [f"| {header} | what happens | why |", "|---|---|---|"]
    for row in table:
        lines.append(f"| {row.what} | {f'refused: `{row.says}`' if row.says else row.becomes} | {row.why} |")
    return "\n".join(lines)


def uses() -> str:
    lines = ["| examples | keys | what happens |", "|---|---|---|"]
    for use in USES:
        keys = ", ".join(f'`{name} = "{value}"`' for name, value in use.keys.items() if "zoo" not in value)
        own = ", a model of your own" if "zoo_of_data:model" in use.keys.values() else ""
        happens = f"refused: `{use.says}`" if use.says else use.becomes
        lines.append(f"| {use.what} | {(keys or '(defaults)') + own} | {happens} |")
    return "\n".join(lines)


TABLES = {
    "images": rows("`x_train`, `x_test`", IMAGE_ARRAYS),
    "features": rows("`x_train`, `x_test`", FEATURES),
    "labels": rows("`y_train`, `y_test`", LABELS),
    "files": rows("an `.npz` file", FILES),
    "folders": rows("files in `train/LABEL/`", IMAGES),
    "keys": uses(),
}


def filled(page: str) -> str:
    """The page with its tables as they are here."""
    for name, table in TABLES.items():
        head, _, rest = page.partition(f"<!-- {name} -->\n")
        _, _, tail = rest.partition("<!-- end -->")
        page = f"{head}<!-- {name} -->\n\n{table}\n\n<!-- end -->{tail}"
    return page


def test_the_page_says_what_happens():
    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page), "run: python tests/data/test_data_zoo.py"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
