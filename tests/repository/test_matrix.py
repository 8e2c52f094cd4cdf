"""`make test-matrix`: what it says of a Python that is not here, and the table at its end."""

import os
import sys
import tomllib
from pathlib import Path

import pytest

import matrix
from laws import table

HERE = "{}.{}".format(*sys.version_info)


def a_python(folder: Path, says: str) -> Path:
    """A command that says `says`, as pyenv's fail and others report their version."""
    path = folder / "python3.99"
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)
    return path


def test_a_python_is_found_only_if_it_runs_and_is_of_that_version(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert matrix.find("3.99") is None
    a_python(tmp_path, "exit 127")  # pyenv's, of a version that is not switched on
    assert matrix.find("3.99") is None
    a_python(tmp_path, "echo 3.9.9")
    assert matrix.find("3.99") is None
    (tmp_path / "pyenv" / "versions" / "3.99.1" / "bin").mkdir(parents=True)
    hidden = a_python(tmp_path / "pyenv" / "versions" / "3.99.1" / "bin", "echo 3.99.1")
    assert matrix.find("3.99") == (hidden, "3.99.1")
    assert matrix.find(HERE, lambda _: iter([Path(sys.executable)]))


def test_what_another_python_cannot_read_is_named(tmp_path):
    new, odd, fine = (tmp_path / f"{name}.py" for name in ("new", "odd", "fine"))
    new.write_text("match 1:\n    case 1:\n        pass\n")  # of 3.10
    odd.write_text("x = '\\d'\n")  # will be an error one day, and is a warning now
    fine.write_text("x = 1\n")
    assert [line.partition(": ")[0] for line in matrix.wrong_syntax("3.9", [new, odd, fine])] == [str(new)]
    assert [line.partition(": ")[0] for line in matrix.wrong_syntax("3.99", [new, odd, fine])] == [str(odd)]
    assert len(matrix.source_files()) > 300


def test_a_pin_without_a_wheel_is_a_failure(monkeypatch):
    """A pip that has the wheel of one version, and of one package none."""
    said = {"flwr": "flwr (9)\nAvailable versions: 9, 1.0", "ray": "", "rich": "Available versions: 2"}
    monkeypatch.setattr(matrix, "source_files", list)
    monkeypatch.setattr(matrix, "answer", lambda words: next((said[word] for word in words if word in said), ""))
    monkeypatch.setattr(matrix, "pins", lambda: {"flwr": "1.0", "ray": "1.0", "rich": "1.0"})
    row = matrix.not_here("Python 3.99", "3.99")
    assert row.failed
    assert row.result == "1 of 3 pins have a wheel (not ray==1.0, rich==1.0); syntax fits"
    assert matrix.table([row]).splitlines()[1].split("  ")[-1] == f"FAILED: {row.result}"


def test_the_bounds_are_those_of_the_project():
    project = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text())["project"]
    assert f">={matrix.lower_bound('torch')}" in str(project)
    assert matrix.flower_range().startswith(f"flwr[simulation]>={matrix.lower_bound('flwr')}")
    assert len(matrix.pins()) > 100
    ran = {line.rpartition(" ")[2] for line in project["classifiers"] if line[-1].isdigit() and ":: 3." in line}
    assert ran <= set(matrix.PYTHONS)
    with pytest.raises(LookupError, match=r"pyproject\.toml has no lower bound of nothing"):
        matrix.lower_bound("nothing")


@table("words, said", [(["2.7"], "'2.7': choose of 3.11"), (["3.11", "--", "-k", "x"], "make setup")])
def test_a_mistake_is_one_line(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "BASE", tmp_path / os.devnull)
    with pytest.raises(SystemExit) as ended:
        matrix.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
