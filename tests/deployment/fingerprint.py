"""One sha256 over all that the fault and the intruder tests depend on.

`make test-all` writes it to passed.txt once everything has passed. While it stays the same, .ci/run takes one kill and
one intruder for all of them. It is of names and contents alone: no history, no times, no order, no line ends.

    python tests/deployment/fingerprint.py                 says whether it is the one that passed; exit status 1: no
    python tests/deployment/fingerprint.py --value         the fingerprint itself
    python tests/deployment/fingerprint.py --write VALUE   to passed.txt, if it is that still; exit status 1: no
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PASSED = Path(__file__).with_name("passed.txt")
# Where files move, this list is all that moves with them; test_fingerprint.py says what it leaves out. It has what is
# written for containers and for Flower's processes: the mathematics has tests of its own.
GLOBS = (
    # The image and its containers.
    *("deploy/**/*", "Dockerfile", ".dockerignore", "docker-compose*.yml", "constraints.txt", "pyproject.toml"),
    # What `fedmom deploy` does, and what it reads.
    *(
        "fedmom/deploy/**/*",
        "fedmom/cli/deploy.py",
        "fedmom/records/**/*",
        "fedmom/machine/files.py",
        "fedmom/user_code.py",
        "fedmom/data/sources/digits.json",
        "configs/deploy.toml",
    ),
    # What Flower delivers to the nodes, as far as it is about Flower.
    *("strategies/**/*", "clients/**/*", "fedmom/flower/**/*", "fedmom/__init__.py"),
    # The tests.
    *("tests/deployment/**/*", "tests/conftest.py", "tests/helpers/runs.py"),
)


def matched(pattern: str, root: Path = ROOT) -> set[Path]:
    """The files of one of GLOBS; none that is hidden (but one that is named), made by Python, or the record itself."""
    found = set()
    for path in root.glob(pattern):
        inside = path.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts) and inside.as_posix() != pattern
        if path.is_file() and not hidden and "__pycache__" not in inside.parts and path.name != PASSED.name:
            found.add(path)
    return found


def covered(root: Path = ROOT) -> list[Path]:
    """All files of GLOBS, by their names."""
    found = set[Path]().union(*(matched(pattern, root) for pattern in GLOBS))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def fingerprint(root: Path = ROOT) -> str:
    """The same on every checkout of the same files."""
    whole = hashlib.sha256()
    for path in covered(root):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        whole.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()


def has_passed(found: str) -> bool:
    """Whether this fingerprint is the one that passed; without a record none has."""
    return PASSED.is_file() and PASSED.read_text(encoding="ascii", errors="replace").split()[:1] == [found]


def one_of_each(items: Sequence[Any]) -> list[Any]:
    """Of pytest's items those that run where nothing has changed: of a module that names one as such that one alone."""
    names = (getattr(getattr(item, "module", None), "WHERE_NOTHING_CHANGED", None) for item in items)
    return [item for item, name in zip(items, names, strict=True) if name in (None, item.name)]


def main(words: Sequence[str]) -> int:
    found = fingerprint()
    if words[:1] == ["--value"]:
        print(found)
        return 0
    if words[:1] == ["--write"]:
        if words[1:] != [found]:
            print("something that the fault and the intruder tests depend on was changed while they ran: once more")
            return 1
        PASSED.write_text(found + "\n", encoding="ascii", newline="\n")
        print(f"fingerprint {found[:12]} passed and is written to {PASSED}: commit it")
        return 0
    if has_passed(found):
        print(f"fault and intruder tests: one of each, fingerprint {found[:12]} is the one that passed `make test-all`")
        return 0
    why = "is another than the one that passed" if PASSED.is_file() else "stands alone, there is no passed.txt"
    print(f"fault and intruder tests: all, fingerprint {found[:12]} {why}; before this is handed in: `make test-all`")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
