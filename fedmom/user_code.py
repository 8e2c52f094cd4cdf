"""The user's own code by name: "package.module:function" in a config becomes the function; whose an error is."""

import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

from fedmom.errors import InputError

OWN_KEYS = (
    "algorithm.correction",
    "data.dataset",
    "data.task",
    "model.name",
)  # those that may name the user's own code


HUB = "hf:"  # how data.dataset names a data set of Hugging Face's


def is_spec(name: str) -> bool:
    """Does a name mean the user's own "module:function" rather than one of ours?"""
    return ":" in name and not name.startswith(HUB)


def load_object(key: str, spec: str) -> Any:
    """The function that `spec` names; `key` is the config key that error messages start with."""
    start = f"{key} = {spec!r}"
    module_name, _, function_name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise InputError(f'{start}: write "package.module:function"')
    try:
        with _current_directory_on_path():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            looked = (
                f"looked in {os.getcwd()} and on sys.path; start fedmom where {module_name.partition('.')[0]}.py is"
            )
            raise InputError(f"{start}: no module named {error.name!r} ({looked})") from error
        raise InputError(f"{start}: importing {module_name!r} raised {one_line(error)}") from error
    if not hasattr(module, function_name):
        near = difflib.get_close_matches(
            function_name, [name for name in vars(module) if not name.startswith("_")], n=1
        )
        hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
        raise InputError(f"{start}: module {module_name!r} has no attribute {function_name!r}{hint}")
    function = getattr(module, function_name)
    if not callable(function):
        raise InputError(f"{start}: is not a function but of type {type(function).__name__}")
    return function


def one_line(error: BaseException) -> str:
    """Type and message of an exception, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def memory_is_full(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had; on the CPU torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or "OutOfMemoryError" in type(error).__name__ or _CPU_IS_FULL in str(error)


_CPU_IS_FULL = "DefaultCPUAllocator"
_TORCH = f"{os.sep}torch{os.sep}"
_OURS = (os.path.dirname(__file__), *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")))
_OUTSIDE = tuple(os.path.join(path, "") for path in _OURS)
_PACKAGES = tuple(f"{os.sep}{name}-packages{os.sep}" for name in ("site", "dist"))


def place_of(error: BaseException, *, anywhere: bool = False) -> str:
    """The last line of the user's own code that an exception came through, as " (file:line)"; "" if through none.

    `anywhere`: then a library's, such as a mod of Flower's.
    """
    every = traceback.extract_tb(error.__traceback__)
    frames = [f for f in every if is_own_file(f.filename)]
    if anywhere and not frames:
        ours = (os.path.dirname(__file__) + os.sep, "<frozen")
        frames = [f for f in every if not f.filename.startswith(ours)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def is_own_file(filename: str) -> bool:
    """Whether a file of code is the user's, and neither ours nor a library's."""
    return not filename.startswith((*_OUTSIDE, "<")) and not any(part in filename for part in _PACKAGES)


@contextmanager
def blamed(config: Mapping[str, Any], *, but: CodeType | None = None) -> Iterator[None]:
    """Errors of the user's own code within the block become an InputError of one line: the key, the error, the place.

    config: {"section.key": value}, of which the user's code is named by OWN_KEYS. What came through the function
    `but`, which calls somebody else's code, stays as it is; so does what is ours.
    """
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        key = None if memory_is_full(error) else _culprit(config, error, but)
        if key is None:
            raise
        raise InputError(f"{key} = {config[key]!r}: {one_line(error)}{place_of(error)}") from error


def _culprit(config: Mapping[str, Any], error: BaseException, but: CodeType | None) -> str | None:
    """The key whose code raised: a function that the error came through, else the model, which is what torch calls."""
    specs = {key: str(config[key]) for key in OWN_KEYS if is_spec(str(config.get(key, "")))}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    codes = {frame.f_code for frame in frames}
    if but in codes:
        return None
    for key, spec in specs.items():
        if key != "model.name" and _codes_of(key, spec) & codes:
            return key
    names = [frame.f_code.co_filename for frame in frames]
    if "model.name" in specs and any(is_own_file(name) or _TORCH in name for name in names):
        return "model.name"
    modules = {key: sys.modules.get(spec.partition(":")[0]) for key, spec in specs.items()}
    return next((key for key, module in modules.items() if getattr(module, "__file__", None) in names), None)


def _codes_of(key: str, spec: str) -> set[CodeType]:
    """Of a function, of an object that is called, or of a class: its methods."""
    found = inspect.unwrap(load_object(key, spec))
    functions = [*vars(found).values()] if isinstance(found, type) else [found, type(found).__call__]
    return {code for one in functions if (code := getattr(one, "__code__", None)) is not None}


@contextmanager
def _current_directory_on_path() -> Iterator[None]:
    """An installed `fedmom` command, unlike `python -m`, does not look for modules where it is started."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


# Any project may have a package `clients` or `strategies` of its own; nobody has one of these names.
_OWN = {"clients": "client_app.py", "strategies": "server_app.py"}


def app_root() -> Path:
    """The folder of fedmom's own Flower app, Dockerfile and configs: the checkout, or fedmom/_app of the wheel.

    Raises InputError where fedmom came without them.
    """
    package = Path(__file__).absolute().parent
    root = next((root for root in (package / "_app", package.parent) if _has_app(root)), None)
    if root is None:
        raise InputError(f"{package}: came without its Flower app; take fedmom's wheel, or a whole checkout")
    return root


def own_folder(package: str) -> str:
    """The folder clients/ or strategies/ of the first checkout on sys.path, else fedmom's own.

    Raises InputError where fedmom came without the two folders.
    """
    checkouts = (root for root in map(Path, sys.path) if (root / "fedmom" / "__init__.py").is_file())
    root = next((root for root in checkouts if _has_app(root)), None) or app_root()
    return str(root.absolute() / package)


def _has_app(root: Path) -> bool:
    return all((root / folder / file).is_file() for folder, file in _OWN.items())


def own_app(package: str) -> Any:
    """The Flower app in clients/client_app.py or strategies/server_app.py.

    It is imported below fedmom, as fedmom.flower.own_clients or own_strategies, so that `import clients` stays the
    user's, and Ray's actors find it. Raises InputError where fedmom came without the two folders.
    """
    return importlib.import_module(f"fedmom.flower.own_{package}.{_OWN[package].removesuffix('.py')}").app
