"""`make test-matrix`: the fast tests on every Python, torch and Flower that pyproject.toml allows and that is here.

    python tests/matrix.py                     every row
    python tests/matrix.py 3.12 flwr           some of them: a Python, "torch" (the oldest), "flwr" (oldest and newest)
    python tests/matrix.py 3.12 -- -k layers   with arguments for pytest

A Python is run in an environment of its own, .venv-3.12; the one that .venv has, in .venv. Of a Python that is not
here the wheels of everything in constraints.txt are looked for, and the syntax of every file is compared with its own.
It ends with a table of what ran; exit status 1: something failed.

It needs .venv (`make setup`), pip and Python's own library, nothing else.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / os.environ.get("VENV", ".venv")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
CODE = ("fedmom", "strategies", "clients", "tests", "benchmarks", "examples", "deploy", "docs")
# Which of the tests have to do with Flower: all that another version of it could change.
OF_FLOWER = ("tests/flower", "tests/agreement", "tests/deployment", "tests/experiments", "tests/config", "tests/data")
# What comes with torch, and is as old as it.
WITH_TORCH = r"(torch|torchvision|triton|numpy|cuda-.*|nvidia-.*)=="


class Row(NamedTuple):
    """A line of the table at the end."""

    name: str
    version: str
    done: str
    result: str
    failed: bool = False
    seconds: float = 0.0


def run(words: Sequence[str | Path]) -> tuple[int, str]:
    """(exit status, the last lines) of a command, whose output is shown as it comes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    print("+", *words, flush=True)
    tail: list[str] = []
    with subprocess.Popen(
        [*map(str, words)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            tail = [*tail[-20:], line.rstrip()]
    return process.returncode, "\n".join(tail)


def answer(words: Sequence[str | Path]) -> str:
    """What a command prints; nothing where it cannot be run or fails."""
    try:
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# Where they are


def candidates(wanted: str) -> Iterator[Path]:
    """Files that may be Python `wanted`: on PATH, and where pyenv keeps what its own commands there hide."""
    for folder in os.get_exec_path():
        if (path := Path(folder) / f"python{wanted}").is_file():
            yield path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted((pyenv / "versions").glob(f"{wanted}.*/bin/python{wanted}"))


def find(wanted: str, where: Callable[[str], Iterator[Path]] = candidates) -> tuple[Path, str] | None:
    """(a Python of that version which runs and can make environments, its full version), or None."""
    say = "import ensurepip, platform, sqlite3, ssl, venv; print(platform.python_version())"
    for path in where(wanted):
        full = answer([path, "-c", say])
        if full.startswith(f"{wanted}."):
            return path, full
    return None


def lower_bound(package: str) -> str:
    """The oldest version of a package that pyproject.toml allows, as 2.11 or 1.41."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in chain(project["dependencies"], *project["optional-dependencies"].values()):
        if found := re.match(rf"{package}(?:\[[^]]*\])?\s*>=\s*([\d.]+)", line):
            return found[1]
    raise LookupError(f"pyproject.toml has no lower bound of {package}")


def pins() -> dict[str, str]:
    """{package: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


# What is done with them


def tested(name: str, version: str, python: Path, tests: Sequence[str], arguments: Sequence[str]) -> Row:
    """The fast tests under an environment's Python."""
    begin = time.monotonic()
    status, tail = run([python, "-m", "pytest", "-n", "2", "--dist", "loadgroup", *tests, *arguments])
    counts = re.findall(r"^(?:=+ )?(\d+ \w+.*? in [\d.]+s.*?)(?: =+)?$", tail, re.MULTILINE)
    result = counts[-1] if counts else f"pytest ended with status {status}"
    done = " ".join(["fast tests", *(["of Flower"] if tests else []), *arguments])
    return Row(name, version, done, result, status != 0, time.monotonic() - begin)


def environment(name: str, python: Path, *words: str) -> Path | None:
    """The Python of an environment with `pip install WORDS`, made where it is not there; None where pip failed."""
    folder = ROOT / name
    if not (folder / "bin" / "python").exists() and run([python, "-m", "venv", folder])[0]:
        return None
    inside = folder / "bin" / "python"
    return None if run([inside, "-m", "pip", "install", "--quiet", *words])[0] else inside


def on_python(wanted: str, arguments: Sequence[str]) -> Row:
    """The fast tests on one Python, or what can be said of it where it is not here."""
    name = f"Python {wanted}"
    mine = answer([BASE / "bin" / "python", "-c", "import platform; print(platform.python_version())"])
    if mine.startswith(f"{wanted}."):
        return tested(name, f"{mine}, {BASE.name}", BASE / "bin" / "python", (), arguments)
    found = find(wanted)
    if found is None:
        return not_here(name, wanted)
    path, full = found
    inside = environment(f".venv-{wanted}", path, "--constraint", "constraints.txt", "--editable", ".[dev]")
    if inside is None:
        return Row(name, full, f"pip install into .venv-{wanted}", "does not install", True)
    return tested(name, f"{full}, .venv-{wanted}", inside, (), arguments)


def not_here(name: str, wanted: str) -> Row:
    """Wheels and syntax for a Python that is not on this machine."""
    begin = time.monotonic()
    packages = pins()
    missing = without_wheel(wanted, packages)
    wrong = wrong_syntax(wanted, source_files())
    for line in (*missing, *wrong):
        print(line)
    result = f"{len(packages) - len(missing)} of {len(packages)} pins have a wheel"
    result += f" (not {', '.join(missing)})" if missing else ""
    result += f"; syntax {'fits' if not wrong else f'wrong in {len(wrong)} files'}"
    return Row(name, "not found", "wheels, syntax", result, bool(missing or wrong), time.monotonic() - begin)


def without_wheel(wanted: str, packages: dict[str, str]) -> list[str]:
    """Those `package==version` that have no wheel for this Python here, by pip's own choice; nothing is downloaded."""
    pip = [BASE / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "index", "versions"]

    def has_none(package: str) -> bool:
        said = answer([*pip, package, "--pre", "--python-version", wanted, "--only-binary", ":all:"])
        listed = re.search(r"^Available versions: (.*)$", said, re.MULTILINE)
        return listed is None or packages[package] not in listed[1].split(", ")

    with ThreadPoolExecutor(max_workers=2 * (os.cpu_count() or 1)) as pool:
        gone = list(pool.map(has_none, packages))
    return [f"{package}=={packages[package]}" for package, none in zip(packages, gone, strict=True) if none]


def source_files() -> list[Path]:
    return sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))


def wrong_syntax(wanted: str, files: Sequence[Path]) -> list[str]:
    """Files that this Python cannot read: by its grammar where it is older, by today's warnings where it is newer."""
    lines = []
    version = (3, int(wanted.partition(".")[2]))
    for path in files:
        try:
            text, is_older = path.read_text(encoding="utf-8"), version < sys.version_info[:2]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if is_older else "error")
                if is_older:
                    ast.parse(text, path.name, feature_version=version)
                else:
                    compile(text, path.name, "exec", dont_inherit=True)
        except (SyntaxError, Warning) as error:
            lines.append(f"{path}: {error}")
    return lines


def oldest_torch(arguments: Sequence[str]) -> Row:
    """The fast tests with the oldest torch, whose Triton takes no newer NumPy than 2.3."""
    name, wanted = "oldest torch", lower_bound("torch")
    folder = ROOT / ".venv-oldest"
    folder.mkdir(exist_ok=True)
    limits = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    limits.write_text("".join(line for line in lines if not re.match(WITH_TORCH, line)), encoding="utf-8")
    vision = lower_bound("torchvision")
    words = [f"torch=={wanted}.*", f"torchvision=={vision}.*", "numpy<2.4", "--editable", ".[dev]"]
    inside = environment(folder.name, Path(sys.executable), "--constraint", str(limits), *words)
    if inside is None:
        return Row(name, wanted, f"pip install into {folder.name}", "does not install", True)
    full = answer([inside, "-c", "import torch; print(torch.__version__)"])
    return tested(name, full or wanted, inside, (), arguments)


def on_flower(name: str, wanted: str, arguments: Sequence[str]) -> Row:
    """The fast tests of Flower with another flwr, in an environment that has the rest from .venv."""
    folder, pinned = ROOT / f".venv-flwr-{name}", pins()["flwr"]
    same = Row(f"{name} flwr", pinned, "nothing", "it is the one of constraints.txt: see the Pythons")
    if f"=={pinned.rpartition('.')[0]}.*" in wanted:
        return same
    base = answer([BASE / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    inside = folder / "bin" / "python"
    if not inside.exists() and run([BASE / "bin" / "python", "-m", "venv", folder])[0]:
        return Row(f"{name} flwr", wanted, "venv", "was not made", True)
    own = answer([inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    # After its own packages those of .venv, and what their .pth files add: pip then takes them for installed.
    (Path(own) / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n", encoding="utf-8")
    status, _ = run([inside, "-m", "pip", "install", "--quiet", "--upgrade", wanted, "--editable", "."])
    full = answer([inside, "-c", "import importlib.metadata as m; print(m.version('flwr'))"])
    if status:
        return Row(f"{name} flwr", wanted, f"pip install into {folder.name}", "does not install", True)
    if full == pinned:
        return same
    return tested(f"{name} flwr", full, inside, OF_FLOWER, arguments)


def flower_range() -> str:
    """`flwr[simulation]>=1.41,<1.43` of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'"flwr\[simulation\]([^"]*)"', text)
    assert found is not None
    return f"flwr[simulation]{found[1]}"


def table(rows: Sequence[Row]) -> str:
    """The rows in columns, as wide as what is in them."""
    cells = [("", "version", "what was done", "seconds", "result")]
    for row in rows:
        took = f"{row.seconds:.0f}" if row.seconds else ""
        cells.append((row.name, row.version, row.done, took, ("FAILED: " if row.failed else "") + row.result))
    widths = [max(len(line[place]) for line in cells) for place in range(4)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in cells
    )


ROWS: dict[str, list[Callable[[Sequence[str]], Row]]] = {
    **{wanted: [lambda arguments, wanted=wanted: on_python(wanted, arguments)] for wanted in PYTHONS},  # type: ignore[misc]
    "torch": [oldest_torch],
    "flwr": [
        lambda arguments: on_flower("oldest", f"flwr[simulation]=={lower_bound('flwr')}.*", arguments),
        lambda arguments: on_flower("newest", flower_range(), arguments),
    ],
}


def main(words: Sequence[str]) -> int:
    """The rows asked for, and their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; none: all of them")
    place = list(words).index("--") if "--" in words else len(words)
    mine, rest = words[:place], words[place + 1 :]
    asked = parser.parse_args(mine).rows
    if unknown := [name for name in asked if name not in ROWS]:
        parser.error(f"{unknown[0]!r}: choose of {', '.join(ROWS)}")
    if shutil.which(str(BASE / "bin" / "python")) is None:
        parser.error(f"{BASE} is not there: make setup")
    rows = [make(rest) for name in asked or ROWS for make in ROWS[name]]
    print(f"\n{table(rows)}")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
