"""What a worker's process prints or logs: Ray sends it to two files, of which somebody must be told."""

import os
from pathlib import Path

_MOST_BYTES = 64 << 10  # of one message's that are shown


class WorkerOutput:
    """The files behind standard output and error of this process; none where they are no files."""

    def __init__(self) -> None:
        self._files = {number: path for number in (1, 2) if (path := _file_of(number))}

    @property
    def paths(self) -> list[str]:
        return list(self._files.values())

    def sizes(self) -> dict[int, int]:
        """How much is written so far, by file."""
        return {number: os.fstat(number).st_size for number in self._files}

    def since(self, sizes: dict[int, int]) -> str:
        """What was written since then; of very much, the end."""
        parts = []
        for number, path in self._files.items():
            begin, end = sizes[number], os.fstat(number).st_size
            if end > begin:
                with open(path, "rb") as file:
                    file.seek(max(begin, end - _MOST_BYTES))
                    parts.append(file.read(end - begin).decode("utf-8", "replace"))
        return "".join(part if part.endswith("\n") else f"{part}\n" for part in parts)

    def grown(self, sizes: dict[int, int]) -> str:
        """The file into which something was written since then, standard error first; "" for none."""
        now = self.sizes()
        return next((self._files[n] for n in sorted(now, reverse=True) if now[n] > sizes[n]), "")


def _file_of(number: int) -> str:
    try:
        path = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""
    return path if os.path.isfile(path) else ""


def printed(paths: list[str]) -> str:
    """The first of these files, standard error first, that holds more than Ray's own lines; "" for none."""
    for path in reversed(paths):
        try:
            lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # on another machine
            continue
        if any(line and not line.startswith((":job_id:", ":actor_name:", ":task_name:")) for line in lines):
            return path
    return ""
