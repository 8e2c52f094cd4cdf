"""How many cores a process may use."""

import os

from fedmom.machine import cores
from laws import table

V2 = {"proc/cgroup": "0::/a/b\n"}
V1 = {"proc/cgroup": "3:cpu,cpuacct:/a\n2:memory:/x\n"}


@table(
    "files, right",
    [
        ({}, 8),
        ({**V2, "fs/a/b/cpu.max": "max 100000\n"}, 8),
        ({**V2, "fs/a/b/cpu.max": "150000 100000\n"}, 2),
        ({**V2, "fs/a/b/cpu.max": "600000 100000\n", "fs/a/cpu.max": "300000 100000\n"}, 3),
        ({**V2, "fs/cpu.max": "10000 100000\n"}, 1),  # a container's own, mounted as the root
        ({**V2, "fs/a/b/cpu.max": "6400000 100000\n"}, 8),
        ({**V1, "fs/cpu/a/cpu.cfs_quota_us": "400000\n", "fs/cpu/a/cpu.cfs_period_us": "100000\n"}, 4),
        ({**V1, "fs/cpu/a/cpu.cfs_quota_us": "-1\n", "fs/cpu/a/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_the_least_of_affinity_and_limits_counts(tmp_path, monkeypatch, files, right):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    place = tmp_path / str(len(list(tmp_path.iterdir())))  # every row's own
    place.mkdir()
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    assert cores.usable_cores(place / "proc", place / "fs") == right
