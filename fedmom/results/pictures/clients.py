"""Every client's own results: how they are spread over the rounds, and a histogram of one evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmom.errors import InputError
from fedmom.records.history import LOOKED
from fedmom.results.pictures.style import COLOURS, add_legend, new_figure, plain_axes, save_picture, whole_ticks
from fedmom.results.tables import Measure, client_measure, finite
from fedmom.rounds.loop import Record
from fedmom.rounds.results import HISTOGRAM, OWN, PERSONAL
from fedmom.tasks.metrics import is_share

BAND = ("q25", "median", "q75", "worst10")  # what is drawn of each round
WHOSE = ("own: x̂ on each client's own test examples", "own: x̂; personal: each client's own model")


class Spread(NamedTuple):
    """How one measure is spread over the clients, in each round that looked; numbers as in rounds.jsonl."""

    whose: str  # OWN or PERSONAL
    measure: Measure  # of a client
    rounds: list[int]  # [P]
    lines: dict[str, list[float]]  # {each of BAND: [P]}
    histogram: Mapping[str, Any]  # of the last of the rounds; {} where there is none


def has_clients(rounds: Sequence[Record]) -> bool:
    """Whether there is something to draw: some round looked at clients that have test examples."""
    return bool(spreads_of(rounds))


def spreads_of(rounds: Sequence[Record], metric: str | None = None) -> list[Spread]:
    """What is drawn: own and, where clients have models of their own, personal; the histogram of the last round.

    metric: "accuracy", "loss", …; None: the first share, else the loss.
    """
    looked = [record for record in rounds if LOOKED in record]
    if metric is None:
        start = f"{OWN}_mean_"
        names = [key.removeprefix(start) for record in looked[-1:] for key in record if key.startswith(start)]
        metric = next((name for name in names if is_share(f"{OWN}_{name}")), "loss")
    found = []
    for whose in (OWN, PERSONAL):
        keys = {statistic: f"{whose}_{statistic}_{metric}" for statistic in BAND}
        kept = [record for record in looked if all(finite([record], key) for key in keys.values())]
        if kept:
            lines = {statistic: finite(kept, key) for statistic, key in keys.items()}
            name = f"{whose}_{metric}"
            histogram = looked[-1].get(f"{name}_{HISTOGRAM}", {})
            found.append(Spread(whose, client_measure(name), [int(r["round"]) for r in kept], lines, histogram))
    return found


def draw_clients(rounds: Sequence[Record], path: Path, metric: str | None = None, shown: int | None = None) -> None:
    """PNG or PDF of the clients' own results; `metric` and `shown` as in `clients_figure`."""
    save_picture(clients_figure(rounds, metric, shown), path)


def clients_figure(rounds: Sequence[Record], metric: str | None = None, shown: int | None = None) -> Any:
    """Left, over the rounds, the median with the quartiles and the worst tenth; right a histogram of the clients.

    metric: as in `spreads_of`. shown: the round of the histogram; None: the last that looked. InputError where no
    round has anything.
    """
    spreads = spreads_of(rounds, metric)
    if not spreads:
        raise InputError("there are no clients' own results to draw: no round looked, or no client has test examples")
    figure = new_figure(8.2, 3.5 + 0.19 * (len(spreads) - 1))
    over, bars = figure.subplots(1, 2)
    drawn = [_draw_spread(over, spread) for spread in spreads]
    # A legend goes down its columns: own and personal stand below one another.
    entries = [entry for column in zip(*drawn, strict=True) for entry in column]
    until = [record for record in rounds if LOOKED in record and (shown is None or record["round"] <= shown)]
    for spread in spreads_of(until, metric):
        _draw_histogram(bars, spread)
    label = spreads[0].measure.label.replace(f"{spreads[0].whose} ", "")
    over.set_ylabel(label)
    over.set_xlabel("Rounds")
    over.xaxis.set_major_locator(whole_ticks(6))
    bars.set_title(f"In round {until[-1]['round']:,}", fontsize=9.5, loc="left")
    bars.set_xlabel(label)
    bars.set_ylabel("Clients")
    bars.yaxis.set_major_locator(whole_ticks(5))
    plain_axes(over)
    plain_axes(bars, grid="y")
    handles, labels = zip(*entries, strict=True)
    add_legend(figure, handles, labels, 3, WHOSE[len(spreads) > 1], handlelength=2.6, columnspacing=1.6)
    return figure


def _look(whose: str) -> str:
    return COLOURS[0] if whose == OWN else COLOURS[1]


def _draw_spread(panel: Any, spread: Spread) -> list[tuple[Any, str]]:
    """Two lines and a band of one measure, each with what the legend says of it."""
    colour, marker = _look(spread.whose), "o" if spread.whose == OWN else "s"
    low, middle, high, worst = (spread.measure.factor * np.array(spread.lines[name]) for name in BAND)
    band = panel.fill_between(spread.rounds, low, high, color=colour, alpha=0.18, linewidth=0)
    if len(spread.rounds) == 1:  # a band of no width
        panel.vlines(spread.rounds, low, high, color=colour, alpha=0.3, linewidth=5)
    look = {"color": colour, "marker": marker, "markersize": 3.6, "markevery": 0.08}
    (median,) = panel.plot(spread.rounds, middle, linewidth=1.5, **look)
    (tenth,) = panel.plot(spread.rounds, worst, linewidth=1.2, linestyle=(0, (5, 1.6)), **look)
    named = {"median": median, "quartiles": band, "worst 10 %": tenth}
    return [(handle, f"{spread.whose}: {name}") for name, handle in named.items()]


def _draw_histogram(panel: Any, spread: Spread) -> None:
    """Own results as bars, personal ones as a line around theirs, so that both are seen where they overlap."""
    if not spread.histogram:
        return
    counts = spread.histogram["counts"]
    low, high = (spread.measure.factor * float(spread.histogram[name]) for name in ("low", "high"))
    edges = np.linspace(low, high, len(counts) + 1)
    look: dict[str, Any] = {"alpha": 0.55} if spread.whose == OWN else {"fill": False, "linewidth": 1.6}
    panel.stairs(counts, edges, fill=look.pop("fill", True), color=_look(spread.whose), **look)
