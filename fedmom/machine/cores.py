"""Which processor this is, and how many cores this process may use: by its affinity and its cgroups' limits."""

import math
import os
import platform
from pathlib import Path


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, as far as the system tells one."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def usable_cores(proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """At least 1. `taskset`, Slurm and cpusets set an affinity; `docker run --cpus` and systemd limit a cgroup's time.

    A limit of 1.5 cores counts as 2, so that none of it is left unused.
    """
    # Some systems know no affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _limit(proc, cgroups))))


def _limit(proc: Path, cgroups: Path) -> float:
    """The smallest number of cores that the process's cgroup or one above it allows; infinite without any."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    limits = [math.inf]
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            root, names = cgroups, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, names = cgroups / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # In a container its own cgroup may be mounted as the root, and the path be the host's: then the root alone is.
        place = Path(path.lstrip("/"))
        for folder in (place, *place.parents):
            limits.append(_cores(root / folder, names))
    return min(limits)


def _cores(folder: Path, names: list[str]) -> float:
    """What one cgroup allows."""
    try:
        words = [word for name in names for word in (folder / name).read_text().split()]
        quota, period = float(words[0]), float(words[1])
    except (OSError, ValueError, IndexError):  # not there, or "max"
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf
