"""The user's own code by name: "package.module:function" in a config becomes the function."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedmom.errors import InputError


def is_spec(name: str) -> bool:
    """Does a name mean the user's own "module:function" rather than one of ours?"""
    return ":" in name


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
            looked = f"looked in {os.getcwd()} and on sys.path"
            raise InputError(f"{start}: no module named {error.name!r} ({looked})") from error
        raise InputError(f"{start}: importing {module_name!r} raised {one_line(error)}") from error
    if not hasattr(module, function_name):
        raise InputError(f"{start}: module {module_name!r} has no attribute {function_name!r}")
    function = getattr(module, function_name)
    if not callable(function):
        raise InputError(f"{start}: is not a function but of type {type(function).__name__}")
    return function


def one_line(error: BaseException) -> str:
    """Type and message of an exception, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


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
