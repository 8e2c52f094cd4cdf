"""Text that fits: lines beside a label, tables that give way, numbers as a person says them."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedmom.machine.output import terminal_width

if TYPE_CHECKING:
    import numpy as np

_LABEL = 10  # characters of the column that says what a line is about
_NARROWEST = 40
_FEWEST = 4  # characters of a table's first column


def line_width() -> int | None:
    """How many characters a line has; None where nobody looks: then the columns are tabbed, and nothing is cut."""
    width = terminal_width()
    return None if width is None else max(_NARROWEST, width)


def filled(label: str, text: str, width: int | None, room: int = _LABEL) -> str:
    """A label, and a text beside it in as many lines as it takes."""
    start = label.ljust(room)
    if width is None:
        return start + text
    lines = textwrap.wrap(text, width - room, break_on_hyphens=False)
    return "\n".join(f"{start if not number else ' ' * room}{line}" for number, line in enumerate(lines))


def listed_out(rows: Sequence[Sequence[str]], width: int | None) -> str:
    """Columns to the left, the last one to the right; a first word without room beside the others stands above them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        rest = sum(widths[1:]) + 2 * (len(widths) - 1)
        widths[0] = max(min(widths[0], width - rest), min(widths[0], _FEWEST))
    lines = []
    for first, *others, last in rows:
        if len(first) > widths[0]:
            lines.append(_shortened(first, width or len(first)))
            first = ""
        padded = [cell.ljust(room) for cell, room in zip((first, *others), widths, strict=False)]
        lines.append("  ".join([*padded, last.rjust(widths[-1])]).rstrip())
    return "\n".join(lines)


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: (room - 1) // 2]}…{text[len(text) - room // 2 :]}"


def spread_of(values: "np.ndarray") -> str:
    """ "12 to 340, median 80"; one number where all are equal."""
    import numpy as np

    low, middle, high = np.min(values), np.median(values), np.max(values)
    return f"{low:,} to {high:,}, median {middle:,.0f}" if low < high else f"{low:,}"


def duration(seconds: float) -> str:
    """ "12 ms", "3.4 s", "2.4 min": two or three digits, for more are not known."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms" if seconds >= 0.001 else "under 1 ms"
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"


def size_of(number: float) -> str:
    """ "13.9 kB"."""
    from fedmom.results.tables import byte_unit

    by, unit = byte_unit(number)
    return f"{number / by:.3g} {unit}"


def age_of(seconds: float) -> str:
    """ "3 min ago"."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
