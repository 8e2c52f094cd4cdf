"""The commands that look at runs: `fedmom compare`, `fedmom report`, `fedmom clients`, `fedmom watch`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedmom.cli.options import BAD_INPUT, DONE
from fedmom.errors import InputError, unknown
from fedmom.machine.output import terminal_width

if TYPE_CHECKING:
    from fedmom.results.groups import Group
    from fedmom.results.reading import Run

_MOST_CLIENTS = 20  # rows, unless all are asked for
Unfinished = Annotated[bool, typer.Option("--unfinished", help="Also count unfinished runs, as far as they got.")]
Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders, or folders of sweeps.")]


def compare(
    folders: Folders,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="METRIC=VALUE",
            help="Show what it took to reach accuracy=0.8, loss=0.5, … Default: what all runs reached.",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="text|markdown|csv|latex", help="Format of the printed tables.")
    ] = "text",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of figures and tables. Default: SWEEP/comparison, else ./comparison."
        ),
    ] = None,
    unfinished: Unfinished = False,
) -> int:
    """Compare runs over seeds: tables and figures for a paper.

    fedmom compare runs/fashion-mnist-sweep --target accuracy=0.8

    Runs that differ in nothing but the seed are one group, shown as mean ± standard deviation. Printed are where the
    groups ended and what a target took. The folder holds these tables and those at equal rounds, joint epochs, bytes
    and seconds, and of the speedup over N where N varies: as Markdown, CSV and LaTeX, beside figures in PNG and PDF.

    A run with data.num-clients = 1 beside runs of many clients is a pooled model: one client has all data. It has a
    row of its own and a dotted line.

    Runs that are not finished (interrupted, diverged, at work) are left out: "2 of 3" seeds, and a line says which.
    """
    from fedmom.results.compare import default_out
    from fedmom.results.sheets import FORMATS

    if form not in FORMATS:
        raise unknown("--format", form, FORMATS)
    target = out or default_out(folders)
    if target.exists() and not target.is_dir():
        raise InputError(f"--out {target}: is a file; name a folder")
    _compare(folders, targets or (), form, target, unfinished)
    return DONE


def _compare(folders: Sequence[Path], targets: Sequence[str], form: str, out: Path, unfinished: bool) -> None:
    """Print the tables, and write them and the figures into `out`."""
    from fedmom.results.compare import draw_figures, where_the_rest_is, write_tables
    from fedmom.results.comparison import all_sheets, parse_target, usual_targets
    from fedmom.results.groups import check_counted, check_fit, counted_of, group_runs, of_groups, rivals
    from fedmom.results.ranking import results as results_of
    from fedmom.results.reading import collect
    from fedmom.results.report import draw_or_say_why
    from fedmom.results.sheets import FORMATS, sheet_text
    from fedmom.results.tables import wrapped

    runs, notes = collect(folders)
    groups = group_runs(runs, unfinished=unfinished)
    check_counted(groups)
    check_fit(groups)
    counted = counted_of(groups)
    wanted = [parse_target(text, counted) for text in targets] or usual_targets(counted_of(rivals(groups)))
    sheets = all_sheets(groups, wanted)
    _tell([*notes, *of_groups(groups)])
    width = terminal_width()
    if form == "text":
        shown = [wrapped(line, width) for line in results_of(groups)]
        first = sheets[: 1 + len(wanted)]
        print("\n\n".join(["\n".join(shown), *(sheet_text(sheet, width) for sheet in first)]), flush=True)
    else:
        print("\n\n".join(map(FORMATS[form], sheets)), flush=True)
    pictures: list[Path] = []
    draw_or_say_why(lambda: pictures.extend(draw_figures(groups, wanted, out)))
    write_tables(sheets, pictures, out)
    if form == "text":
        print("\n" + "\n".join(where_the_rest_is(sheets[len(first) :], pictures, out, width)))


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"fedmom: {note}", file=sys.stderr)


def report(
    folders: Folders,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR|FILE.html",
            help="A folder, or the page alone. Default: the one folder, else ./report.",
        ),
    ] = None,
    unfinished: Unfinished = False,
) -> int:
    """Show runs: one self-contained HTML page with interactive curves, a picture of them, and tables.

    fedmom report runs/average runs/reset --out comparison

    fedmom report runs/fashion-mnist-sweep --out report.html

    The page needs no network: what was run, curves, sortable tables, who holds which classes, settings and what
    differs, environment, and the configurations to run it again. A folder also gets curves.png and report.md.

    Runs that are not finished (interrupted, diverged, at work) are left out, and a line says which.
    """
    from fedmom.results.groups import check_counted, group_runs
    from fedmom.results.reading import collect

    one = folders[0] if len(folders) == 1 else None
    page_alone = out is not None and out.suffix.lower() in (".html", ".htm")
    target = out or one or Path("report")
    if out is not None and out.exists() and out.is_dir() == page_alone:
        kind = "a folder; name a page's file" if page_alone else "a file; name a folder, or FILE.html"
        raise InputError(f"--out {out}: is {kind}")
    runs, notes = collect(folders)
    groups = group_runs(runs, unfinished=unfinished)
    check_counted(groups)
    _tell(notes)
    return DONE if _report(runs, groups, notes, target, page_alone) else BAD_INPUT  # the page is what was asked for


def _report(
    runs: Sequence["Run"], groups: Sequence["Group"], notes: Sequence[str], target: Path, page_alone: bool
) -> bool:
    """Print what came out and write the files, saying where they are; whether there is a page."""
    from fedmom.results.comparison import end_sheet, usual_targets
    from fedmom.results.groups import counted_of, of_groups, rivals
    from fedmom.results.page import write_page
    from fedmom.results.ranking import results as results_of
    from fedmom.results.report import draw_or_say_why, draw_report, in_short
    from fedmom.results.tables import wrapped

    counted, told, width = counted_of(groups), of_groups(groups), terminal_width()
    print("\n".join(wrapped(line, width) for line in results_of(groups)))
    print(in_short(end_sheet(groups), width))
    for line in told:
        print(wrapped(line, width))
    print(flush=True)
    if not page_alone:
        paths = dict[str, Path]()
        of_seeds = groups if any(len(group.runs) > 1 for group in groups) else ()
        shown = [run for run in runs if run in counted]  # in the order in which they were named
        draw_or_say_why(lambda: paths.update(draw_report(shown, target, told, of_seeds)))
        for what, name in (("picture", "curves"), ("clients", "clients"), ("tables", "report")):
            if name in paths:
                print(f"{what}: {paths[name]}")
    page, targets = target if page_alone else target / "report.html", usual_targets(counted_of(rivals(groups)))
    return draw_or_say_why(
        lambda: print("page:", write_page(groups, targets, page, notes=[*notes, *told])), what="page"
    )


def clients(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    round_number: Annotated[
        int | None, typer.Option("--round", metavar="R", help="Another evaluation than the last one.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="MEASURE", help="Sort by own_loss, own_accuracy, … Default: the first share."),
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Print every client, not the 20 worst alone.")] = False,
    table: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write every client, by number, as CSV.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.png", help="Also draw a picture.")] = None,
) -> int:
    """Show what every single client got: how it is spread over the clients, and who got the worst.

    fedmom clients runs/quickstart-20260101-120000 --out clients.png

    The run looked at its clients in the rounds that run.client-eval-every says. "own" is the averaged model on a
    client's own test examples, "personal" the client's own model on them.
    """
    from fedmom.machine.files import write_text
    from fedmom.results.clients.table import clients_csv, clients_of, clients_table, looked_at, spread_table
    from fedmom.results.pictures.clients import draw_clients
    from fedmom.results.pictures.style import check_picture
    from fedmom.results.report import draw_or_say_why
    from fedmom.results.tables import fitted, wrapped

    if out is not None:
        check_picture(out)
    if table is not None and table.is_dir():
        raise InputError(f"--csv {table}: is a folder; name a file")
    found = clients_of(folder)
    looked = looked_at(found, round_number)
    measure, width = looked.judged_by(by), terminal_width()
    header, rows = clients_table(looked, measure, None if everyone else _MOST_CLIENTS)
    some = f"The {len(rows)} worst of {len(found.examples):,} clients by {measure.title} (--all shows every one):"
    said = some if len(rows) < len(found.examples) else f"The worst first, by {measure.title}:"
    parts = [wrapped(f"{folder}, {looked.about}", width), fitted(*spread_table(looked), width), wrapped(said, width)]
    print("\n\n".join([*parts, fitted(header, rows, width)]), flush=True)
    if table is not None:
        table.parent.mkdir(parents=True, exist_ok=True)
        write_text(table, clients_csv(looked))
        print(f"table: {table}")
    if out is not None:
        metric = measure.key.partition("_")[2]
        if draw_or_say_why(lambda: draw_clients(found.records(), out, metric, looked.results.round)):
            print(f"picture: {out}")
    return DONE


def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or the folder of a sweep.")],
    once: Annotated[bool, typer.Option("--once", help="Show the present state, and end.")] = False,
    track: Annotated[
        list[str] | None, typer.Option("--track", metavar="NAME", help="Also report to tensorboard, mlflow or wandb.")
    ] = None,
) -> int:
    """Watch a run that is under way, or look at a finished one, in the terminal.

    fedmom watch runs/quickstart-20260101-120000

    It reads the folder's files alone: the run may be another process's, a container's, or another machine's on a shared
    disk. --track reports the run to a tracker too, from its first round on, also if it was started without one.
    """
    from fedmom.cli.watch import watch as watch_folder

    watch_folder(folder, Console(highlight=False), once=once, trackers=track or ())
    return 0
