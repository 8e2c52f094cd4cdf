"""What every machine of a cluster must see, looked at on each before anything is begun there.

Needs neither Ray nor torch: a process that is asked starts in a tenth of a second.
"""

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedmom.machine.files import at_home

END = "end"  # the last word of the file that tells actors to end


class Premises(NamedTuple):
    """What every machine that runs cells must see, as it is seen where the sweep was started."""

    out: str  # the sweep's folder
    note: str  # the path of a file in it
    token: str  # a random word that the file begins with
    here: str  # the current folder: modules and relative paths are looked for in it
    files: dict[str, str]  # {path: digest} of the configuration and of the modules in the current folder
    data: dict[str, str]  # {key = 'value': path} of the data that cells name

    def asked_to_end(self) -> bool:
        # Read, not looked for: a network's file system may remember for a minute that there was no such file.
        try:
            return Path(self.note).read_text(encoding="ascii").split()[-1:] == [END]
        except OSError:
            return False

    def ask_to_end(self) -> None:
        Path(self.note).write_text(f"{self.token} {END}", encoding="ascii")

    def take_over(self, name: str) -> Callable[[], bool]:
        """Be the one who runs the cell of that name; gives whether this process is asked to end, or another is it now.

        A machine that was cut off from the cluster and not from the disk still runs what goes on elsewhere.
        """
        path, word = Path(f"{self.note}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"), uuid.uuid4().hex
        path.write_text(word, encoding="ascii")

        def was_asked() -> bool:
            if self.asked_to_end():
                return True
            try:
                return path.read_text(encoding="ascii") not in (word, "")  # "": before the other's word
            except OSError:
                return False

        return was_asked

    def remove(self) -> None:
        """The note, and who ran what."""
        for path in Path(self.out).glob(f"{Path(self.note).name}*"):
            path.unlink(missing_ok=True)


def trouble_with(premises: Premises) -> str:
    """What this process does not see of the premises, "" for nothing: the subject is left to whoever says it."""
    try:
        words = Path(premises.note).read_text(encoding="ascii").split()
    except OSError:
        words = []
    shared = "on a disk that all machines of the cluster see under the same path"
    if words[:1] != [premises.token]:
        return f"does not see the sweep's folder {premises.out}; name an --out {shared}"
    if not os.path.isdir(premises.here):
        return f"has no folder {premises.here}; start the sweep in a folder {shared}"
    for path, digest in premises.files.items():
        if (seen := digest_of(path)) != digest:
            return f"{'has another' if seen else 'does not see'} {path}; keep it {shared}"
    for key, path in premises.data.items():
        if not os.path.exists(os.path.join(premises.here, at_home(path))):
            return f"does not see {key}; put the data there, or {shared}"
    return ""


def digest_of(path: str) -> str:
    """ "" of a file that cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""
