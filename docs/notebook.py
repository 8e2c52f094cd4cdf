"""docs/tutorial.md -> examples/tutorial.ipynb: `python docs/notebook.py` writes it, and a test holds them equal.

Fences: ```sh and ```python are run, ```LANGUAGE file=NAME is written to NAME, ```console is only shown. In the notebook
a picture takes the place of <!-- show: NAME --> below a fence. Cells that did not change keep the outputs that are
stored; `python docs/notebook.py --run` runs them anew in an empty folder, and stores what they print and show.
"""

import json
import os
import posixpath
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL, NOTEBOOK = ROOT / "docs/tutorial.md", ROOT / "examples/tutorial.ipynb"
FENCE = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```\n(?:<!-- show: (\S+) -->\n)?", re.DOTALL | re.MULTILINE)
# The commands of the text are those of the interpreter that runs the notebook, wherever that is.
BEGIN = """\
import os
import sys

from IPython.display import Image

os.environ["PYTHON"] = sys.executable  # the commands below run in this notebook's own Python
"""
_COMMAND = re.compile(r"^fedmom ", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Block(NamedTuple):
    kind: str  # "text", "sh", "python", "console", "toml"
    file: str  # the file to write, or ""
    text: str
    show: str = ""  # the picture that follows, or ""


def blocks(text: str) -> list[Block]:
    """Prose and fences in their order."""
    found, at = list[Block](), 0
    for fence in FENCE.finditer(text):
        kind, file, inside, show = fence.groups()
        found += [Block("text", "", text[at : fence.start()]), Block(kind, file or "", inside, show or "")]
        at = fence.end()
    return [block for block in [*found, Block("text", "", text[at:])] if block.text.strip()]


def _cells(text: str) -> list[tuple[str, str]]:
    """(type, source) of every cell."""
    found = [("code", BEGIN)]
    for block in blocks(text):
        if block.file:
            found.append(("code", f"%%writefile {block.file}\n{block.text}"))
        elif block.kind == "sh":  # which fails where the command does, unlike `!`
            found.append(("code", "%%sh\n" + _COMMAND.sub('"$PYTHON" -m fedmom ', block.text)))
        elif block.kind == "python":
            found.append(("code", block.text))
        else:
            prose, fence = LINK.sub(_from_examples, block.text), f"```{block.kind}\n{block.text}```\n"
            shown = prose if block.kind == "text" else fence
            found.append(("markdown", shown))
        if block.show:
            found.append(("code", f'Image("{block.show}", width=700)\n'))
    # A notebook begins with its title.
    first = next(place for place, (kind, _) in enumerate(found) if kind == "markdown")
    return [found[first], *found[:first], *found[first + 1 :]]


def _from_examples(link: re.Match[str]) -> str:
    """The notebook lies in examples/, the text in docs/."""
    return f"]({posixpath.normpath('../docs/' + link[1])})"


def notebook(text: str, before: str = "") -> str:
    """The notebook's JSON; cells that it had `before` keep their outputs. The same text gives the same bytes."""
    kept: dict[str, list[Any]] = {}
    for cell in json.loads(before)["cells"] if before else ():
        if cell["cell_type"] == "code":
            kept["".join(cell["source"])] = cell["outputs"]
    cells = []
    for number, (kind, source) in enumerate(_cells(text)):
        lines = source.strip("\n").splitlines(keepends=True)
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell |= {"execution_count": None, "outputs": kept.get("".join(lines), [])} if kind == "code" else {}
        cells.append(cell | {"source": lines})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    content = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def executed(text: str) -> str:
    """The notebook with what its cells print and show here; nothing of it names a folder of this machine."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.reads(text, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(book, timeout=3000, iopub_timeout=3000, resources=where).execute()
        places = {os.path.realpath(folder): ".", folder: ".", str(ROOT): "fedmom", sys.prefix: "venv"}
    content = json.loads(nbformat.writes(book))
    for cell in content["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            cell["outputs"] = _cleaned(cell["outputs"], places)
    return json.dumps({**json.loads(text), "cells": content["cells"]}, indent=1, ensure_ascii=False) + "\n"


def _cleaned(outputs: list[dict[str, Any]], places: dict[str, str]) -> list[dict[str, Any]]:
    """Text in one piece for each stream, without colours and places; what is shown by its best form alone."""
    found = list[dict[str, Any]]()
    for output in outputs:
        if "execution_count" in output:
            output["execution_count"] = None
        if output["output_type"] == "stream":
            text = _ESCAPES.sub("", "".join(output["text"]))
            for place, name in places.items():
                text = text.replace(place, name)
            if found and found[-1].get("name") == output["name"]:
                text = "".join(found.pop()["text"]) + text
            output = {**output, "text": text.splitlines(keepends=True)}
        output.pop("transient", None)
        found.append(output)
    return found


if __name__ == "__main__":
    old = NOTEBOOK.read_text(encoding="utf-8") if NOTEBOOK.exists() else ""
    made = notebook(TUTORIAL.read_text(encoding="utf-8"), old)
    NOTEBOOK.write_text(executed(made) if "--run" in sys.argv[1:] else made, encoding="utf-8")
    print(NOTEBOOK)
