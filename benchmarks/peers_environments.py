"""The peers' own Python environments: dependencies of benchmarks/peers.py, not of fedmom. Made once, then kept."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Environment(NamedTuple):
    pythons: tuple[str, ...]  # versions that its packages run on
    packages: tuple[str, ...]


ENVIRONMENTS = {
    "pfl": Environment(("3.11", "3.12", "3.10"), ("pfl[pytorch]==0.6.0", "torch==2.14.0", "numpy==2.4.6")),
    # BlazeFL 3 needs Python 3.14. tqdm it imports without naming it.
    "blazefl": Environment(("3.12", "3.13"), ("blazefl==2.0.2", "torch==2.14.0", "numpy==2.4.6", "tqdm==4.67.1")),
    # FedJAX's last release is of 2023: JAX, Haiku and Optax of its time.
    "fedjax": Environment(
        ("3.11", "3.10", "3.12"),
        (
            "fedjax==0.0.17",
            "jax==0.4.30",
            "jaxlib==0.4.30",
            "dm-haiku==0.0.12",
            "optax==0.2.2",
            "numpy==1.26.4",
        ),
    ),
}


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of folder/NAME, with the peer's packages. RuntimeError, with the reason, where there is none."""
    pythons, packages = ENVIRONMENTS[name]
    python, ready = folder / name / "bin" / "python", folder / name / ".ready"
    wanted = " ".join(packages)
    if ready.exists() and ready.read_text() == wanted:
        return python
    shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _run([str(_interpreter(pythons)), "-m", "venv", str(folder / name)])
    _run([str(python), "-m", "pip", "install", "--quiet", *packages])
    ready.write_text(wanted)
    return python


def _interpreter(versions: tuple[str, ...]) -> Path:
    for version in versions:
        found = [Path(place) / f"python{version}" for place in os.get_exec_path()]
        found += sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
        for path in found:
            ask = [str(path), "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
            if path.exists() and subprocess.run(ask, capture_output=True, text=True).stdout.strip() == version:
                return path
    raise RuntimeError(f"needs Python {' or '.join(versions)}, and none is here")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} … failed: {done.stderr[-500:]}")
