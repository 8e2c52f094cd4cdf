"""docs/tutorial.md -> examples/tutorial.ipynb: `python docs/notebook.py` writes it, and a test holds them equal.

Fences: ```sh and ```python are run, ```LANGUAGE file=NAME is written to NAME, ```console is only shown.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL, NOTEBOOK = ROOT / "docs/tutorial.md", ROOT / "examples/tutorial.ipynb"
FENCE = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    kind: str  # "text", "sh", "python", "console", "toml"
    file: str  # the file to write, or ""
    text: str


def blocks(text: str) -> list[Block]:
    """Prose and fences in their order."""
    found, at = list[Block](), 0
    for fence in FENCE.finditer(text):
        found += [Block("text", "", text[at : fence.start()]), Block(fence[1], fence[2] or "", fence[3])]
        at = fence.end()
    return [block for block in [*found, Block("text", "", text[at:])] if block.text.strip()]


def notebook(text: str) -> str:
    """The notebook's JSON; the same text gives the same bytes."""
    cells = []
    for number, block in enumerate(blocks(text)):
        if block.file:
            source = f"%%writefile {block.file}\n{block.text}"
        elif block.kind == "sh":
            source = f"%%sh\n{block.text}"  # unlike `!`, it fails where the command does
        elif block.kind == "python":
            source = block.text
        else:
            source = block.text if block.kind == "text" else f"```{block.kind}\n{block.text}```\n"
        code = bool(block.file) or block.kind in ("sh", "python")
        cell = {"cell_type": "code" if code else "markdown", "id": f"cell-{number}", "metadata": {}}
        cell |= {"execution_count": None, "outputs": []} if code else {}
        cells.append(cell | {"source": source.strip("\n").splitlines(keepends=True)})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    content = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(TUTORIAL.read_text(encoding="utf-8")), encoding="utf-8")
    print(NOTEBOOK)
