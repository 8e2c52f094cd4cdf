"""What spares .ci/run the faults and the intruders: it changes with all that they depend on, and with nothing else."""

import ast
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import fingerprint
from fingerprint import GLOBS, ROOT, covered, matched, one_of_each
from laws import table

FIRST_PARTY = ("fedmom", "strategies", "clients")
TESTS = [Path(__file__).with_name(f"test_{which}.py") for which in ("faults", "intruders")]


@table("pattern", GLOBS)
def test_every_glob_matches(pattern):
    assert matched(pattern)


def test_what_the_image_is_made_of_is_covered():
    files = {path for path in (ROOT / "deploy").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert len(files) > 10
    assert files <= set(covered())


def imported(file: Path) -> Iterator[Path]:
    """The checkout's own files that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # what is imported may be a module or in one
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            yield from where(name, file.parent)


def where(name: str, beside: Path) -> Iterator[Path]:
    """The file of a module of the checkout; none of a module that is another's, or of a name in a module."""
    folders = [ROOT] if name.split(".")[0] in FIRST_PARTY else [beside, ROOT / "tests", ROOT / "tests" / "helpers"]
    for folder in folders:
        place = folder.joinpath(*name.split("."))
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                yield file
                return


def test_what_the_tests_import_is_covered():
    """Their own imports, and those of the helpers beside them."""
    files = set(TESTS) | {Path(__file__).with_name("conftest.py"), ROOT / "tests" / "conftest.py"}
    while more := {f for file in files if "deployment" in file.parts for f in imported(file)} - files:
        files |= more
    found = {path.relative_to(ROOT).as_posix() for path in files}
    assert {
        "tests/deployment/containers.py",
        "tests/helpers/runs.py",
        "fedmom/records/history.py",
        "fedmom/__init__.py",
    } <= found
    assert files <= set(covered())


@pytest.fixture
def copy(tmp_path):
    """What is covered, elsewhere."""
    for path in covered():
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def test_it_changes_with_what_is_covered_and_with_nothing_else(copy):
    assert fingerprint.fingerprint(copy) == fingerprint.fingerprint()
    gate = copy / "deploy" / "image" / "gate.conf"
    (copy / "tests" / "deployment" / "passed.txt").write_text("0\n")
    for name in ("deploy/image/__pycache__/ask.pyc", "deploy/.links.py.swp", "deployment/ca.pem", "runs/x/config.toml"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("else")
    os.utime(gate, (0, 0))
    before = gate.read_bytes()
    assert b"\n" in before
    gate.write_bytes(before.replace(b"\n", b"\r\n"))
    assert fingerprint.fingerprint(copy) == fingerprint.fingerprint()

    seen = {fingerprint.fingerprint()}
    for change in (
        lambda: gate.write_bytes(before + b"# more\n"),
        lambda: gate.rename(gate.with_name("other.conf")),
        lambda: gate.with_name("other.conf").unlink(),
        lambda: (copy / "strategies" / "more.py").touch(),
        lambda: (copy / ".dockerignore").write_text("all"),
    ):
        change()
        assert fingerprint.fingerprint(copy) not in seen
        seen.add(fingerprint.fingerprint(copy))


def test_without_the_very_record_nothing_has_passed(tmp_path, monkeypatch, capsys):
    record, ours = tmp_path / "passed.txt", fingerprint.fingerprint()
    monkeypatch.setattr(fingerprint, "PASSED", record)
    for text, passed in ((None, False), ("", False), ("ff\n", False), (ours[:-1] + "\n", False), (ours + "\r\n", True)):
        if text is not None:
            record.write_bytes(text.encode())
        assert (fingerprint.main([]) == 0) is passed
        (line,) = capsys.readouterr().out.splitlines()
        assert ("one of each" if passed else ": all, ") in line
    record.unlink()


def test_what_was_changed_meanwhile_has_not_passed(tmp_path, monkeypatch, capsys):
    record = tmp_path / "passed.txt"
    monkeypatch.setattr(fingerprint, "PASSED", record)
    assert fingerprint.main(["--value"]) == 0
    ours = capsys.readouterr().out.strip()
    for words in ([], ["0" * 64], [""], [ours[:12]]):
        assert fingerprint.main(["--write", *words]) == 1
        assert not record.exists()
    assert fingerprint.main(["--write", ours]) == 0
    assert record.read_bytes() == ours.encode() + b"\n"
    assert fingerprint.main([]) == 0


def test_where_nothing_changed_one_of_each_is_left():
    faults, intruders, others = (SimpleNamespace(WHERE_NOTHING_CHANGED=name) for name in ("kill", "steal", None))
    items = [SimpleNamespace(name=name, module=faults) for name in ("cut", "kill", "hold")]
    items += [SimpleNamespace(name=name, module=intruders) for name in ("intrude", "steal")]
    items += [SimpleNamespace(name="cut", module=others), SimpleNamespace(name="a text file")]
    assert [item.name for item in one_of_each(items)] == ["kill", "steal", "cut", "a text file"]


@table("file", TESTS)
def test_the_one_that_is_left_is_there(file):
    tree = ast.parse(file.read_text(encoding="utf-8")).body
    (named,) = (node.value.value for node in tree if isinstance(node, ast.Assign) and "CHANGED" in node.targets[0].id)
    assert named in [node.name for node in tree if isinstance(node, ast.FunctionDef)]
