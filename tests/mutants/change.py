"""How a wrong version is put in place of the right one, in this process and for as long as a MonkeyPatch holds.

`code` swaps the code object of a function, so that the wrong version is called wherever the function is bound: a module
that took it by `from x import y` gets it too. A row therefore names the place of definition alone, and says so loudly
when the text that it changes is not there any more.
"""

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import pytest

Change = Callable[[pytest.MonkeyPatch], None]
_FUTURE = 0x1FF0000  # the bits of co_flags that `from __future__ import …` sets


class StaleError(Exception):
    """A row does not fit the code any more: it has to be adapted, and says nothing about the tests."""


def code(where: str, old: str, new: str) -> Change:
    """The function, method or property with this dotted name, `old` of its source (once in it) replaced by `new`."""

    def change(patch: pytest.MonkeyPatch) -> None:
        function = _function(where)
        patch.setattr(function, "__code__", _changed(function, where, old, new))

    return change


def entry(where: str, key: Any, new: Callable[[Any], Any]) -> Change:
    """An entry of a table of the product: new(the right one)."""

    def change(patch: pytest.MonkeyPatch) -> None:
        table = _found(where)
        if key not in table:
            raise StaleError(f"{where} has no {key!r}")
        patch.setitem(table, key, new(table[key]))

    return change


def constant(where: str, new: Callable[[Any], Any]) -> Change:
    """A module's or a class's attribute, at the place where it is used: new(the right one)."""

    def change(patch: pytest.MonkeyPatch) -> None:
        owner, _, name = where.rpartition(".")
        patch.setattr(_found(owner), name, new(_found(where)))

    return change


def both(*changes: Change) -> Change:
    """Several places that one mistake would be made in."""

    def change(patch: pytest.MonkeyPatch) -> None:
        for one in changes:
            one(patch)

    return change


def _found(where: str) -> Any:
    words = where.split(".")
    for count in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        for word in words[count:]:
            try:
                found = inspect.getattr_static(found, word)
            except AttributeError:
                raise StaleError(f"{where}: there is no {word}") from None
        return found
    raise StaleError(f"{where}: there is no such module")


def _function(where: str) -> FunctionType:
    found = _found(where)
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    elif isinstance(found, property):
        found = found.fget
    elif isinstance(found, functools.cached_property):
        found = found.func
    found = inspect.unwrap(found)
    if not isinstance(found, FunctionType):
        raise StaleError(f"{where}: is no function")
    return found


def _changed(function: FunctionType, where: str, old: str, new: str) -> CodeType:
    source = inspect.getsource(function)
    if source.count(old) != 1:
        raise StaleError(f"{where}: {old!r} is {source.count(old)} times in it, must be once")
    right = function.__code__
    tree = ast.parse(textwrap.dedent(source.replace(old, new)))
    tree.body[0].decorator_list = []  # type: ignore[attr-defined]
    ast.increment_lineno(tree, right.co_firstlineno - 1)
    module = compile(tree, right.co_filename, "exec", flags=right.co_flags & _FUTURE, dont_inherit=True)
    (wrong,) = [c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == right.co_name]
    if wrong.co_freevars != right.co_freevars:
        raise StaleError(f"{where}: the change sees other variables around it than the function does")
    return wrong
