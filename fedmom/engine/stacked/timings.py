"""What was measured on this device, kept on disk so that the next start need not measure again."""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def folder() -> Path:
    """$XDG_CACHE_HOME/fedmom, or ~/.cache/fedmom."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmom"


class Timings:
    """{what: {way: seconds}} of one device and one torch; a file that cannot be read or written is done without."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, dict[str, float]] = self._read()

    @classmethod
    def of_device(cls, device: torch.device) -> "Timings":
        """Those of a card by its name, under the torch that runs."""
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        name = "".join(c if c.isalnum() or c in ".+-" else "-" for c in f"{card}-torch-{torch.__version__}")
        return cls(folder() / f"convolutions-{name}.json")

    def get(self, what: str) -> dict[str, float] | None:
        return self.known.get(what)

    def put(self, what: str, seconds: dict[str, float]) -> None:
        """Keep, and write the file anew beside what other processes have written meanwhile."""
        self.known = {**self._read(), **self.known, what: seconds}
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            beside.write_text(json.dumps(self.known, indent=1))
            beside.replace(self.path)
        except OSError:
            return

    def measure(self, once: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
        """Seconds of one call, the median after two that are not timed."""
        found = []
        for number in range(repeats + 2):
            begin = now(device)
            once()
            if number >= 2:
                found.append(now(device) - begin)
        return statistics.median(found)

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            text = self.path.read_text() if self.path else "{}"
            found = {what: {k: float(v) for k, v in ways.items()} for what, ways in json.loads(text).items() if ways}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}
        return found


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
