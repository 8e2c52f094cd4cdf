"""For mkdocstrings: the fields of a tuple or dataclass become a table, described by the comments behind them."""

from typing import Any

import griffe


class Fields(griffe.Extension):
    """`x: Tensor  # [n, *shape]` in a class is a row of its description: name, type, "[n, *shape]"."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add the section "Attributes" to the class's docstring, in Google's style."""
        tuples = any(str(base).endswith("NamedTuple") for base in cls.bases)
        if cls.docstring is None or not (tuples or "dataclass" in cls.labels):
            return
        rows = [
            f"    {name}: {member.source.partition('  # ')[2].strip() or ' '}"
            for name, member in cls.members.items()
            if member.is_attribute and not name.startswith("_") and "property" not in member.labels
        ]
        cls.docstring.value += "\n\nAttributes:\n" + "\n".join(rows)
