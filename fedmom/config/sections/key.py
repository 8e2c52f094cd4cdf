"""One key of a section: its default, what it means, and which values it may have."""

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from fedmom.config.numbers import Range, summary_of

Scalar = str | bool | int | float


def key(
    default: Scalar,
    doc: str,
    right: Range | Mapping[str, Any] | Iterable[str] | None = None,
    also: str = "",
    *,
    holds: str = "",
) -> Any:
    """One key: its default, one line on it, and either a check or the names it may take (`also`: other forms).

    holds: "," where its string is a list, ";" where it is a list of lists.
    """
    check, names = (right, {}) if isinstance(right, Range) else (None, right or {})
    choices = {name: summary_of(names[name]) if isinstance(names, Mapping) else "" for name in names}
    about = {"doc": doc, "check": check, "choices": choices, "also": also, "holds": holds}
    return field(default=default, metadata=about)
