"""Text that every machine with Python has: the .py files of its standard library, as bytes, one token each.

Which files there are, and what is in them, depends on the version of Python.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedmom.errors import InputError

NUM_TOKENS = 256
WINDOW = 64  # tokens, where data.context says nothing
_OTHERS = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")  # not Python's, or tests
_BUILT = "_sysconfigdata"  # names the machine that Python was built on


def python_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(top-level module or package, content) of every file, by path."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).parts
        if not set(inside) & {*_OTHERS} and not path.name.startswith(_BUILT) and path.is_file():
            yield inside[0].removesuffix(".py"), path.read_bytes()


def read_python_sources(key: str, context: int) -> dict[str, np.ndarray]:
    """Windows x_train, y_train, x_test, y_test, int16 [n, T], in the order of the files.

    y is x shifted by one, and the last tenth of each file's windows are test. `module` [n] numbers the top-level
    module or package of each training window, `modules` are their names. InputError where there are no files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    size = context or WINDOW
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("x_train", "y_train", "x_test", "y_test", "module")}
    names: list[str] = []
    for module, content in python_files(root):
        tokens = np.frombuffer(content, dtype=np.uint8).astype(np.int16)
        count = max(0, len(tokens) - 1) // size
        first = count - count // 10  # of the test windows
        for name, shift in (("x", 0), ("y", 1)):
            windows = tokens[shift : shift + count * size].reshape(-1, size) if count else tokens[:0].reshape(0, size)
            parts[f"{name}_train"].append(windows[:first])
            parts[f"{name}_test"].append(windows[first:])
        if first and module not in names[-1:]:
            names.append(module)
        parts["module"].append(np.full(first, len(names) - 1))
    if not sum(map(len, parts["x_test"])):
        raise InputError(f"{key}: {root} has no .py files with ten windows of {size} bytes; give a text of your own")
    return {name: np.concatenate(found) for name, found in parts.items()} | {"modules": np.array(names)}
