"""Groups of runs -> what the page shows of every client's own results, run by run, as plain values."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedmom.errors import InputError
from fedmom.records.history import read_clients
from fedmom.results.clients.table import check_clients, clients_header, clients_rows, looked_at
from fedmom.results.groups import Group, rivals
from fedmom.results.pictures.clients import BAND, Spread, spreads_of
from fedmom.results.reading import Run
from fedmom.rounds.results import OWN

MOST_RUNS = 12  # each with two pictures and a table
MOST_ROWS = 200  # clients in a table
MOST_POINTS = 300  # rounds of a picture


def clients(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What each run that looked at its clients shows; of more than MOST_RUNS the first ones, and a line says so."""
    runs = [(group, run) for group in rivals(groups) for run in group.runs if spreads_of(run.rounds)]
    found = [_of_run(run, _title(group, run)) for group, run in runs[:MOST_RUNS]]
    if len(runs) > MOST_RUNS:
        left = f"{len(runs) - MOST_RUNS} more runs"
        found.append({"title": left, "trouble": f"a page has room for {MOST_RUNS}; `fedmom clients` shows each"})
    return found


def drawn_of(one: dict[str, Any]) -> dict[str, Any]:
    """What the script draws of a run; the table stands in the page itself."""
    return {key: one[key] for key in ("label", "factor", "unit", "spreads") if key in one}


def _title(group: Group, run: Run) -> str:
    return f"{group.label}, seed {run.settings['run.seed']}" if len(group.runs) > 1 else group.label


def _of_run(run: Run, title: str) -> dict[str, Any]:
    spreads = spreads_of(run.rounds)
    measure = spreads[0].measure
    label = measure.title.removeprefix(f"{OWN} ")
    about = {
        "title": title,
        "label": label[0].upper() + label[1:],
        "factor": measure.factor,
        "unit": measure.unit,
        "round": spreads[0].rounds[-1],
        "spreads": [_drawn(spread) for spread in spreads],
    }
    try:
        return {**about, **_table(run, measure.key)}
    except InputError as error:
        return {"title": title, "trouble": str(error)}


def _drawn(spread: Spread) -> dict[str, Any]:
    places = np.unique(np.linspace(0, len(spread.rounds) - 1, min(MOST_POINTS, len(spread.rounds))).round().astype(int))
    lines = {name: [float(f"{spread.lines[name][place]:.6g}") for place in places] for name in BAND}
    rounds = [spread.rounds[place] for place in places]
    return {"whose": spread.whose, "rounds": rounds, "lines": lines, "histogram": dict(spread.histogram)}


def _table(run: Run, name: str) -> dict[str, Any]:
    """The clients of the last evaluation; no rows where the run left no clients.jsonl."""
    found = read_clients(run.folder)
    if found is None or not found.results:
        return {"facts": "", "header": [], "rows": [], "note": ""}
    check_clients(found, run.folder)
    looked = looked_at(found)
    number = len(found.examples)
    note = (
        f"The {MOST_ROWS} worst of {number:,} clients; `fedmom clients --csv` writes all." if number > MOST_ROWS else ""
    )
    about = looked.about[0].upper() + looked.about[1:]
    rows = clients_rows(looked, looked.judged_by(name), MOST_ROWS)
    return {"facts": about, "header": clients_header(looked), "rows": rows, "note": note}
