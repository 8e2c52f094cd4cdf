"""What a run ran on: versions, hardware, commit and command, for environment.json."""

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment(device: str) -> dict[str, Any]:
    """Versions, hardware, commit and command: what a reader needs to run it again."""
    names = ["fedmom", "torch", "torchvision", "numpy", "scikit-learn", "safetensors", "flwr", "ray"]
    found = {name: version_of(name) for name in names}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(sys.argv),
        "python": platform.python_version(),
        "versions": {name: number for name, number in found.items() if number},
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "commit": _commit(),
    }


def _command(words: list[str]) -> list[str]:
    """The command, without the token that Flower gives to the processes of a run: people share run folders."""
    shown = [Path(words[0]).name, *(re.sub(r"^(--[\w-]*token[\w-]*)=.*", r"\1=…", word) for word in words[1:])]
    hidden = [bool(re.fullmatch(r"--[\w-]*token[\w-]*", before)) for before in ["", *shown[:-1]]]
    return ["…" if secret else word for word, secret in zip(shown, hidden, strict=True)]


def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout fedmom runs from, with + if files have changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
