"""Reading a run folder while somebody else, on this machine or another, writes it: files alone, no locks."""

import json
from pathlib import Path
from typing import NamedTuple

from fedmom.config.keys import Config
from fedmom.config.load import load
from fedmom.errors import InputError
from fedmom.records.files import CONFIG, ROUNDS
from fedmom.rounds.loop import Record


class News(NamedTuple):
    """What has happened since the last look."""

    records: list[Record]  # new ones
    rewound: bool  # earlier ones were taken back: a run that was cut off has gone on from its checkpoint


class Follower:
    """One run folder, read on from where the last look ended. InputError where it is no run folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            raise InputError(f"{folder}: no such folder")
        if not (folder / CONFIG).is_file():
            raise InputError(f"{folder}: is not a run folder (no {CONFIG} in it)")
        self.folder = folder
        self.rounds: list[Record] = []
        self._seen = (0, 0)  # (the file, as its inode; bytes read of it)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def config(self) -> Config:
        """As it is now: a resumed run may have become longer."""
        return load(self.folder / CONFIG).config

    def look(self) -> News:
        """Read what is new. A last line without its end is left for the next look."""
        path = self.folder / ROUNDS
        try:
            with open(path, "rb") as file:
                about = path.stat()
                inode, at = self._seen
                rewound = bool(self.rounds) and (about.st_ino != inode or about.st_size < at)
                if about.st_ino != inode or about.st_size < at:
                    at = 0
                file.seek(at)
                content = file.read()
        except FileNotFoundError:
            return News([], False)
        whole = content[: content.rfind(b"\n") + 1]
        self._seen = (about.st_ino, at + len(whole))
        new = [record for line in whole.splitlines() if (record := _record(line)) is not None]
        if not rewound:
            self.rounds += new
            return News(new, False)
        kept = {record["round"]: record for record in self.rounds}
        same = new[: len(self.rounds)] == self.rounds[: len(new)]
        self.rounds = new
        # A file that was written anew with the same lines (a resume does that) is no news.
        return News([r for r in new if r != kept.get(r["round"])], not (same and len(new) >= len(kept)))


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("round"), int) else None
