"""What is printed never ends what prints it: a terminal with few letters, a reader that went away, a full disk.

Letters that a stream's encoding lacks are written in others; text that cannot be written at all is dropped.
"""

import codecs
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PLAIN = {
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "·": "|",
    "×": "x",
    "→": "->",
    "←": "<-",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "∞": "inf",
    "‖": "||",
    "√": "sqrt",
    "Σ": "sum",
    "∝": "~",
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "δ": "delta",
    "ε": "epsilon",
    "η": "eta",
    "λ": "lambda",
    "μ": "mu",
    "σ": "sigma",
    "ρ": "rho",
    "„": '"',
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}
_HANDLER = "fedmom.plain"  # for `errors=` of encoders


def _letter(letter: str) -> str:
    """One letter in ASCII: as people write it, without its accents, as a dot of a picture, or a question mark."""
    if letter in _PLAIN:
        return _PLAIN[letter]
    number = ord(letter)
    if 0x2800 <= number <= 0x28FF:  # Braille, by which curves are drawn
        return "*" if number > 0x2800 else " "
    if 0x2500 <= number <= 0x259F:  # lines and blocks
        return "|" if letter in "│┃║" else "-" if letter in "─━═╸╺╴╶" else "#" if number >= 0x2580 else "+"
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file's name that is no letter
        return f"\\x{number - 0xDC00:02x}"
    plain = "".join(c for c in unicodedata.normalize("NFKD", letter) if c.isascii())
    return plain or ("" if unicodedata.combining(letter) else "?")


def _handle(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_letter, error.object[error.start : error.end])), error.end


codecs.register_error(_HANDLER, _handle)


def terminal_width() -> int | None:
    """How many characters a line on standard output may have; None where it is no terminal, and lines are not bound."""
    try:
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    except (OSError, ValueError):  # it is closed
        return None


class Output:
    """A text stream whose `write` and `flush` never raise for what the reader, the terminal or the disk is like."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost = False  # whether nobody reads any more

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self.lost:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self.write(text.encode(encoding, _HANDLER).decode(encoding))
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self.lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        if isinstance(error, BlockingIOError):  # a reader that is slow: this text alone is lost
            return
        self.lost = True
        try:  # Python itself would say so at its end, of what is left in the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except (OSError, ValueError):  # closed, or no file
            return


@contextmanager
def steady_output() -> Iterator[None]:
    """Within the block standard output and error are `Output`s."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, Output) or stream is None else Output(stream) for stream in before
    )
    try:
        yield
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        sys.stdout, sys.stderr = before


def nobody_reads() -> bool:
    """Whether standard output's reader went away: what only shows something may end."""
    return bool(getattr(sys.stdout, "lost", False))
