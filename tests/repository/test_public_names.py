"""What is public is an attribute of fedmom, and docs/api.md describes it; nothing else is."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fedmom

ROOT = Path(__file__).parents[2]


def test_a_public_name_is_the_one_that_its_module_defines():
    for name, module in fedmom._HOME.items():
        value = getattr(fedmom, name)
        assert value is getattr(import_module(module), name)
        assert value.__module__ == module, name
        assert value.__doc__, name
    with pytest.raises(AttributeError, match="'fedmom' has no attribute 'nothing'"):
        fedmom.nothing  # noqa: B018


def test_the_page_of_python_describes_each_of_them():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: fedmom\.(\w+)$", page, re.MULTILINE)) == set(fedmom.__all__)
    assert dir(fedmom) == sorted([*fedmom.__all__, "__version__"])


def test_types_are_read_where_the_names_come_from():
    tree = ast.parse(Path(fedmom.__file__).read_text(encoding="utf-8"))
    read = {node.names[0].name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name: module for name, module in read.items() if module.startswith("fedmom.")} == fedmom._HOME


def test_the_package_itself_imports_nothing_that_takes_long():
    code = "import sys, fedmom; print([name for name in ('torch', 'numpy', 'flwr', 'ray') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
