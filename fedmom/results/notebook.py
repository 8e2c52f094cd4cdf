"""Runs as Python and notebooks show them: tables that are text and HTML, figures, and a comparison as a value."""

import base64
import io
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Protocol

from fedmom.config.keys import Config
from fedmom.config.load import flat
from fedmom.errors import InputError
from fedmom.machine.files import at_home
from fedmom.records.history import thinned
from fedmom.records.status import Status
from fedmom.results.comparison import AXES, Target, all_sheets, end_sheet, measures_of, parse_target, usual_targets
from fedmom.results.groups import Group, alone, check_counted, check_fit, counted_of, group_runs, of_groups
from fedmom.results.pictures.clients import clients_figure, has_clients
from fedmom.results.pictures.curves import draw_grid
from fedmom.results.reading import Run, collect
from fedmom.results.sheets import Sheet, sheet_latex, sheet_text, written_out
from fedmom.results.tables import last_evaluated, number, without_clients
from fedmom.rounds.loop import Record

_DPI = 110  # of a figure in a notebook


class Told(Protocol):
    """What a run came to: a fedmom.Result."""

    @property
    def status(self) -> str: ...
    @property
    def rounds(self) -> Sequence[Record]: ...
    @property
    def config(self) -> Config: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def message(self) -> str: ...


class Table(str):
    """The text of tables; a notebook shows them as HTML."""

    __slots__ = ("html",)
    html: str

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.html


def table_of(sheets: Sequence[Sheet]) -> Table:
    """Tables below one another."""
    table = Table("\n\n".join(map(sheet_text, sheets)))
    table.html = "\n".join(map(_sheet_html, sheets))
    return table


def _sheet_html(sheet: Sheet) -> str:
    header, rows = written_out(sheet)
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="white-space: nowrap">{escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    notes = "".join(f"<p><small>{escape(text)}</small></p>" for text in (sheet.note, sheet.foot) if text)
    title = f"<caption>{escape(sheet.title)}</caption>" if sheet.title else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def shown(figure: Any) -> Any:
    """The same matplotlib Figure, which a notebook then shows also where it was not told to by pyplot."""
    figure._repr_png_ = partial(_png, figure)
    return figure


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, facecolor="white")
    return file.getvalue()


def _figure_html(figure: Any, what: str) -> str:
    return f'<img alt="{what}" src="data:image/png;base64,{base64.b64encode(_png(figure)).decode()}">'


# --- one run ----------------------------------------------------------------------------------------------------


def run_of(result: Told) -> Run:
    """A result as a run of a comparison. InputError where it has no round."""
    name = result.folder.name if result.folder else result.config.algorithm.name
    if not result.rounds:
        raise InputError(
            f"the run {name} has no round to show: it is {result.status} ({result.message or 'no reason'})"
        )
    status = Status(result.status, result.message, result.rounds[-1]["round"])
    return Run(name, result.folder or Path(name), thinned(result.rounds), flat(result.config), status)


def said_of(result: Told) -> str:
    """In a line: how it ended, rounds, what was reached, where it is."""
    rounds = len(result.rounds)
    parts = [result.status, f"{rounds:,} of {result.config.run.num_rounds:,} rounds"]
    last = last_evaluated(result.rounds)
    for measure in measures_of([run_of(result)]) if rounds else ():
        value = number(last, measure.key)
        if value is not None and (measure.rises or "test_accuracy" not in last):
            title = measure.title.replace(" (%)", "")
            parts.append(f"{title} {measure.factor * value:{measure.digits}}{' %' if measure.factor == 100 else ''}")
            break
    parts.append(str(result.folder) if result.folder else "no folder")
    return ", ".join(parts)


def run_table(result: Told) -> Table:
    """Where it ended."""
    return table_of([end_sheet(alone([run_of(result)]), of_runs=True)])


def run_figure(result: Told, *, clients: bool = False) -> Any:
    """Loss and accuracy over the rounds, or the clients' own results. Raises InputError where there is none of it."""
    run = run_of(result)
    if clients:
        return shown(clients_figure(run.rounds))
    measures = without_clients(measures_of([run]))
    return shown(draw_grid(alone([run]), measures, ["round"], [run.name], "", train=True))


def run_html(result: Told) -> str:
    """Its line, its table, its curves and its clients' own results, as far as they can be had."""
    parts = [f"<p>{escape(said_of(result))}</p>"]
    if result.message:
        parts.append(f"<p>{escape(result.message)}</p>")
    if result.rounds:
        parts += [run_table(result)._repr_html_(), _drawn(partial(run_figure, result))]
        if has_clients(run_of(result).rounds):
            parts.append(_drawn(partial(run_figure, result, clients=True), "clients"))
    return "\n".join(parts)


def _drawn(figure: Any, what: str = "curves") -> str:
    try:
        return _figure_html(figure(), what)
    except ModuleNotFoundError as error:
        return f"<p>no picture: {error.name} is not installed</p>"


# --- several ----------------------------------------------------------------------------------------------------


class Comparison:
    """Runs beside one another: those that differ in nothing but the seed are one group, mean ± deviation."""

    def __init__(self, groups: Sequence[Group], targets: Sequence[Target], notes: Sequence[str]) -> None:
        """notes: what is left out, or not finished."""
        self.groups, self.targets, self.notes = list(groups), list(targets), list(notes)
        self.sheets = all_sheets(self.groups, self.targets)

    def table(self, name: str = "") -> Table:
        """All tables, or the one of that name: "at-the-end", "equal-rounds", …; InputError for another."""
        if not name:
            return table_of(self.sheets)
        found = [sheet for sheet in self.sheets if sheet.name == name]
        if not found:
            raise InputError(f"table {name!r} is not known: choose one of {', '.join(s.name for s in self.sheets)}")
        return table_of(found)

    def latex(self) -> str:
        r"""All tables for a paper (\usepackage{booktabs})."""
        return "\n\n".join(map(sheet_latex, self.sheets))

    def plot(self) -> Any:
        """A matplotlib Figure: every measure over rounds, joint epochs, bytes and seconds, mean and deviation."""
        seeds = any(len(group.runs) > 1 for group in self.groups)
        labels = [group.title for group in self.groups if group.runs]
        note = "mean ± standard deviation over seeds" if seeds else ""
        return shown(draw_grid(self.groups, measures_of(counted_of(self.groups)), list(AXES), labels, note))

    def __repr__(self) -> str:
        runs = len(counted_of(self.groups))
        return f"<Comparison: {len(self.groups)} groups of {runs} runs; .table(), .plot(), .latex()>"

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"{_drawn(self.plot)}\n{table_of(self.sheets[:1])._repr_html_()}\n{notes}"


def compare(
    *runs: str | Path | Told | Sequence[Any], target: str | Sequence[str] = (), unfinished: bool = False
) -> Comparison:
    """Compare runs over seeds: run folders, folders of sweeps, fedmom.Results, or lists of them.

    target: "accuracy=0.8", "loss=0.5" or several of them; left out, what all runs reached. unfinished: count runs that
    are not finished too, as far as they got. Raises InputError where they cannot stand in one table.
    """
    folders, told = list[Path](), list[Run]()
    for one in _all_of(runs):
        if isinstance(one, str | Path):
            folders.append(at_home(one))
        elif not hasattr(one, "rounds"):
            raise InputError(f"{one!r}: is nothing to compare; name run folders, a sweep's folder, or results")
        elif one.folder is not None:
            folders.append(one.folder)
        else:
            told.append(run_of(one)._replace(name=f"run {len(told) + 1}"))
    if not folders and not told:
        raise InputError("nothing to compare: name run folders, a sweep's folder, or results")
    found, notes = collect(folders) if folders else (list[Run](), list[str]())
    groups = group_runs([*found, *told], unfinished=unfinished)
    check_counted(groups)
    check_fit(groups)
    counted = counted_of(groups)
    wanted = [target] if isinstance(target, str) else target
    targets = [parse_target(text, counted) for text in wanted] or usual_targets(counted)
    return Comparison(groups, targets, [*notes, *of_groups(groups)])


def _all_of(runs: Sequence[Any]) -> list[Any]:
    """Lists within lists laid flat; a Result is a tuple, and no list of runs."""
    flat_list = []
    for one in runs:
        within = isinstance(one, list | tuple) and not hasattr(one, "rounds")
        flat_list += _all_of(one) if within else [one]
    return flat_list
