"""The page's file: content in a template, with the script that draws it and plotly.js, which needs no network.

Plotly's Python package brings its own plotly.min.js, 4.8 MB; the page carries it compressed (2 MB) and the browser
unpacks it, so that a page can be mailed.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmom.errors import require
from fedmom.machine.files import write_text
from fedmom.records.environment import version_of
from fedmom.results.comparison import Target
from fedmom.results.groups import Group, counted_of
from fedmom.results.page import content
from fedmom.results.page.clients import clients, drawn_of
from fedmom.results.ranking import results

HERE = Path(__file__).parent


def write_page(groups: Sequence[Group], targets: Sequence[Target], path: Path, *, notes: Sequence[str] = ()) -> Path:
    """Write the page of these groups; `notes` are shown at its top. InputError where it cannot be written, or
    where plotly or jinja2 is missing.
    """
    require("the page", "report", "plotly", "jinja2")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    loader = FileSystemLoader(HERE)
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = {"curves": content.curves(groups), "partitions": content.partitions(groups)}
    own = clients(groups)
    drawn["clients"] = [drawn_of(one) for one in own]
    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    text = env.get_template("report.html").render(
        title=_title(groups),
        results=results(groups),
        summary=content.summary(groups),
        notes=notes,
        groups=groups,
        data=Markup(_json(drawn)),
        partitions=drawn["partitions"],
        clients=own,
        tables=content.tables(groups, targets),
        settings=content.settings(groups),
        provenance=content.provenance(groups),
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(
            "\n".join((HERE / name).read_text(encoding="utf-8") for name in ("pure.js", "clients.js", "report.js"))
        ),
        plotly=Markup(packed),
        version=version_of("fedmom") or "",
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def _json(value: Any) -> str:
    """JSON that may stand inside a script element: no name can end it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _title(groups: Sequence[Group]) -> str:
    runs = counted_of(groups)
    if len(runs) == 1:
        return runs[0].name
    folders = {run.folder.parent.name for run in runs}
    return f"{folders.pop()}: {len(runs)} runs" if len(folders) == 1 else f"{len(runs)} runs"
