"""For mkdocstrings: the comment behind a field of a class is its description, so that docs/api.md shows it."""

from typing import Any

import griffe


class Fields(griffe.Extension):
    """`x: Tensor  # [n, *shape]` in a class is documented as if "[n, *shape]" were the field's docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.parent is not None and attr.parent.is_class:
            comment = attr.source.partition("  # ")[2].strip()
            if comment:
                attr.docstring = griffe.Docstring(comment[0].upper() + comment[1:], parent=attr)
