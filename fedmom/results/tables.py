"""What the rounds of a run say, and tables of text: what all tables, pictures and the page share."""

import textwrap
from collections.abc import Iterable, Sequence
from math import floor, isfinite, log10
from typing import NamedTuple

import numpy as np

from fedmom.config.numbers import PERCENT
from fedmom.records.history import LOOKED
from fedmom.rounds.loop import Record
from fedmom.rounds.results import JAIN, OWN, PERSONAL, STATISTICS
from fedmom.tasks.metrics import METRICS, is_share, rises

MISSING = "–"
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class Measure(NamedTuple):
    """One thing that an evaluation measures: a row of the picture, a column of the tables."""

    key: str
    title: str  # in tables
    label: str  # on the picture
    digits: str  # format of factor * value
    factor: float = 1.0
    log: bool = False
    unit: str = ""  # behind the number

    @property
    def rises(self) -> bool:
        """Whether larger is better."""
        return rises(self.key)


def _share(key: str, title: str, label: str) -> Measure:
    """A number in [0, 1] that is shown in percent."""
    return Measure(key, title, label, PERCENT, factor=100.0, unit=" %")


def _of_metric(name: str) -> Measure:
    """A measure of a task, as `test_…`."""
    metric, key = METRICS[name], f"test_{name}"
    title = f"test {metric.short or name}"
    label = f"{title[0].upper()}{title[1:]} at x̂"
    return _share(key, title, f"{label} (%)") if metric.share else Measure(key, title, label, "#.4g")


MEASURES = (
    Measure("test_loss", "test loss", "Test loss at x̂", "#.4g"),
    *(_of_metric(name) for name in METRICS),
    _share("mean_client_accuracy", "mean client accuracy", "Clients' own models:\nmean accuracy (%)"),
    _share("worst_client_accuracy", "worst client accuracy", "Clients' own models:\nworst accuracy (%)"),
    Measure("loss", "loss", "Loss at x̄", ".4g", log=True),
    Measure("distance", "distance", "Distance to the optimum", ".4g", log=True),
)

_BY_KEY = {measure.key: measure for measure in MEASURES}
# How the names begin of what else a task measures, of the user's own or of clients' own models; and where that is.
_OF_A_TASK = {"test_": " at x̂", "mean_client_": "", "worst_client_": ""}


def client_measure(name: str) -> Measure:
    """What every client has a number of its own of, such as "own_accuracy" or "personal_loss"."""
    whose, _, metric = name.partition("_")
    short = METRICS[metric].short if metric in METRICS else ""
    title = f"{whose} {short or metric.replace('_', ' ')}"
    label = f"Clients' {title}"
    return _share(name, title, f"{label} (%)") if is_share(name) else Measure(name, title, label, "#.4g")


_TITLES = {**STATISTICS, "mean": "mean", "worst10": "worst 10 %"}
_COMPARED = ("mean", "worst10")


def _of_clients(key: str) -> tuple[str, str] | None:
    """("own_accuracy", "worst10") of "own_worst10_accuracy", which is a statistic over the clients; None of others."""
    whose, _, rest = key.partition("_")
    if whose not in (OWN, PERSONAL):
        return None
    if rest.endswith(f"_{JAIN}"):
        return key.removesuffix(f"_{JAIN}"), JAIN
    statistic, _, metric = rest.partition("_")
    return (f"{whose}_{metric}", statistic) if metric and statistic in STATISTICS else None


def measure_of(key: str) -> Measure | None:
    """What a number of rounds.jsonl measures; None for one by which nothing is judged."""
    if (clients := _of_clients(key)) is not None:
        name, statistic = clients
        one = client_measure(name)
        if statistic == JAIN:  # itself no share of anything, and never in percent
            title = f"{one.title}, Jain's index"
            return Measure(key, title, f"Clients' {one.title},\nJain's index", ".3f")
        said = _TITLES[statistic]
        return one._replace(key=key, title=f"{one.title}, {said}", label=f"{one.label},\n{said}")
    title = key.replace("_", " ")
    where = next((where for start, where in _OF_A_TASK.items() if key.startswith(start)), None)
    if key in _BY_KEY or where is None:
        return _BY_KEY.get(key)
    label = f"{title[0].upper()}{title[1:]}{where}"
    return _share(key, title, f"{label} (%)") if is_share(key) else Measure(key, title, label, "#.4g")


def measures_in(runs: Iterable[Sequence[Record]], *, every: bool = False) -> list[Measure]:
    """What some round of some run measured: ours in the order of MEASURES, then those of tasks of the user's own.

    Of the clients' own results runs are compared by the mean and the worst tenth of each share, or of the loss where
    no share was measured: all their statistics would drown what else a table or a picture says, and stand in the table
    of the run's clients. `every`: all of them too.
    """
    keys = dict.fromkeys(
        key for rounds in runs for record in rounds for key in record if number(record, key) is not None
    )
    own = [measure for key in keys if key not in _BY_KEY and (measure := measure_of(key)) is not None]
    if not every:
        clients = {measure.key: found for measure in own if (found := _of_clients(measure.key)) is not None}
        shares = any(is_share(name) for name, _ in clients.values())
        told = {
            key
            for key, (name, statistic) in clients.items()
            if statistic in _COMPARED and (is_share(name) if shares else name.endswith("_loss"))
        }
        own = [measure for measure in own if measure.key not in clients or measure.key in told]
    return [*(measure for measure in MEASURES if measure.key in keys), *own]


def without_clients(measures: Sequence[Measure]) -> Sequence[Measure]:
    """For curves of a single run, whose clients have a picture of their own; all where nothing else was measured."""
    return [measure for measure in measures if _of_clients(measure.key) is None] or measures


# Drawn where a run has them, but no results by which runs are compared.
TRAIN = Measure("train_loss", "train loss", "Train loss", "#.4g")
CONSENSUS = Measure(
    "consensus_distance_after",
    "consensus distance after the exchange",
    "Consensus distance,\nafter the exchange",
    ".4g",
    log=True,
)
SPREADS = (
    Measure("consensus_distance", "consensus distance", "Consensus distance\nΣ pᵢ‖xᵢ − x̂‖²", ".4g", log=True),
    Measure("momentum_spread", "momentum spread", "Momentum spread\nΣ pᵢ‖uᵢ − û‖²", ".4g", log=True),
    CONSENSUS,
)


def number(entry: Record, key: str) -> float | None:
    """The number under `key`, NaN and infinity included; None where there is none."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value)


def finite(rounds: Sequence[Record], key: str) -> list[float]:
    """The finite numbers under `key`, in order."""
    values = (number(entry, key) for entry in rounds)
    return [value for value in values if value is not None and isfinite(value)]


def byte_unit(largest: float) -> tuple[float, str]:
    """What to divide by, and the unit's name, for numbers up to `largest`."""
    power = 0 if largest < 1 else min(floor(log10(largest) / 3 + 1e-9), len(BYTE_UNITS) - 1)
    return 1000.0**power, BYTE_UNITS[power]


def is_evaluated(record: Record) -> bool:
    """Whether a round measured anything but the clients' own results."""
    return any(
        measure_of(key) is not None and number(record, key) is not None and _of_clients(key) is None for key in record
    )


def last_evaluated(rounds: Sequence[Record]) -> Record:
    """The last round that was evaluated, with the clients' own results of the last round that looked at them.

    The two have a rhythm each (run.eval-every, run.client-eval-every).
    """
    evaluated = next((record for record in reversed(rounds) if is_evaluated(record)), {})
    looked = next((record for record in reversed(rounds) if LOOKED in record), {})
    if looked is evaluated:
        return evaluated
    own = {key: value for key, value in looked.items() if not evaluated or _of_clients(key) is not None}
    return {**own, **evaluated}


def as_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first one to the left, the others, which are numbers, to the right."""
    return _columns([[title] for title in header], rows)


def _columns(heads: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> str:
    """`as_text` with titles of several lines."""
    height = max(map(len, heads))
    lines = list(zip(*([""] * (height - len(head)) + list(head) for head in heads), strict=True))
    widths = [max(map(len, column)) for column in zip(*lines, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join([*map(line, lines), "  ".join("-" * width for width in widths), *map(line, rows)])


def fitted(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> str:
    """`as_text` in lines of at most `width` characters; None: as wide as it is.

    What is wider gets titles of several lines; then its columns come in blocks below one another, each with the first
    column; and where that one leaves no room, or where there is a single row, every row stands upright. No cell is cut.
    """
    text = as_text(header, rows)
    if width is None or _widest(text) <= width:
        return text
    if len(header) == 2:
        return "\n".join([*wrapped(" ".join(filter(None, header)), width).split("\n"), *_pairs(rows, width)])
    if len(rows) == 1 and len(rows[0][0]) + max(map(len, header)) + 2 <= width:
        return "\n".join(_pairs(list(zip(header, rows[0], strict=True)), width))
    sizes, heads = list[int](), list[list[str]]()
    for title, *cells in zip(header, *rows, strict=True):
        sizes.append(max(map(len, [*title.split(), *cells])))
        heads.append(textwrap.wrap(title, sizes[-1], break_long_words=False, break_on_hyphens=False) or [""])
    if sizes[0] + 2 + max(sizes[1:]) > width:
        return "\n\n".join("\n".join(_upright(header, row, width)) for row in rows)
    blocks, room = list[list[int]](), 0
    for column, size in enumerate(sizes[1:], 1):
        if room < size + 2:
            blocks.append([0])
            room = width - sizes[0]
        blocks[-1].append(column)
        room -= size + 2
    return "\n\n".join(
        _columns([heads[at] for at in block], [[row[at] for at in block] for row in rows]) for block in blocks
    )


def wrapped(text: str, width: int | None) -> str:
    """A sentence in lines of at most `width` characters (None: in one), broken between words alone."""
    if width is None:
        return text
    for together in (" %", " ± ", " = ", " seed", " ≥ ", " ≤ "):
        text = text.replace(together, together.replace(" ", "\xa0"))
    return textwrap.fill(text, max(width, 20), break_long_words=False, break_on_hyphens=False).replace("\xa0", " ")


def _widest(text: str) -> int:
    return max(map(len, text.split("\n")))


def _upright(header: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    """One row: its name, and below it a line for each of its other cells."""
    name = textwrap.wrap(row[0], width, subsequent_indent="  ", break_on_hyphens=False)
    return [*name, *(f"  {line}" for line in _pairs(list(zip(header[1:], row[1:], strict=True)), width - 2))]


def _pairs(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Titles to the left, what stands behind each to the right of them, on several lines where it is long."""
    least = max(len(title) for title, _ in rows) + 2
    lines = list[str]()
    for title, value in rows:
        parts = textwrap.wrap(value, max(width - least, 12), break_on_hyphens=False) or [""]
        lines += [
            f"{start:{least}}{part}".rstrip()
            for start, part in zip([title, *[""] * (len(parts) - 1)], parts, strict=True)
        ]
    return lines


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join([line(header), line(rule), *map(line, rows)])
