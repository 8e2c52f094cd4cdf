"""The commands that look at runs: `fedmom compare`, `fedmom report`, `fedmom watch`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedmom.cli.options import BAD_INPUT, DONE
from fedmom.errors import InputError, unknown

Unfinished = Annotated[
    bool, typer.Option("--unfinished", help="Count runs that are not finished too, as far as they got.")
]
Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders, or folders of sweeps.")]


def compare(
    folders: Folders,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="METRIC=VALUE",
            help="accuracy=0.8, loss=0.5, …: what it took to get there (default: what all runs reached).",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="text|markdown|csv|latex", help="How the tables are printed.")
    ] = "text",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="For figures and tables (default: SWEEP/comparison, ./comparison)."),
    ] = None,
    unfinished: Unfinished = False,
) -> int:
    """Compare runs over seeds: tables and figures for a paper.

    fedmom compare runs/fashion-mnist-sweep --target accuracy=0.8

    Runs that differ in nothing but the seed are one group, shown as mean ± standard deviation. Tables: at the end; at
    equal rounds, joint epochs, bytes and seconds; what a target took; the speedup over N where N varies. They are
    printed, and written as Markdown, CSV and LaTeX beside figures in PNG and PDF.

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
    from fedmom.results.compare import draw_figures, write_tables
    from fedmom.results.comparison import all_sheets, parse_target, usual_targets
    from fedmom.results.groups import check_counted, check_fit, counted_of, group_runs, of_groups
    from fedmom.results.reading import collect
    from fedmom.results.report import draw_or_say_why
    from fedmom.results.sheets import FORMATS

    runs, notes = collect(folders)
    groups = group_runs(runs, unfinished=unfinished)
    check_counted(groups)
    check_fit(groups)
    counted = counted_of(groups)
    wanted = [parse_target(text, counted) for text in targets] or usual_targets(counted)
    sheets = all_sheets(groups, wanted)
    _tell([*notes, *of_groups(groups)])
    print("\n\n".join(map(FORMATS[form], sheets)))
    pictures: list[Path] = []
    draw_or_say_why(lambda: pictures.extend(draw_figures(groups, wanted, out)))
    written = write_tables(sheets, pictures, out)
    if form == "text":
        print()
        print("\n".join(str(path) for path in [*pictures, *written]))


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"fedmom: {note}", file=sys.stderr)


def report(
    folders: Folders,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR|FILE.html", help="A folder, or the page alone (default: the one folder, or ./report)."
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
    from fedmom.results.comparison import run_sheets, usual_targets
    from fedmom.results.groups import check_counted, counted_of, group_runs, of_groups
    from fedmom.results.page import write_page
    from fedmom.results.reading import collect
    from fedmom.results.report import draw_or_say_why, draw_report
    from fedmom.results.sheets import written_out
    from fedmom.results.tables import as_text

    one = folders[0] if len(folders) == 1 else None
    page_alone = out is not None and out.suffix.lower() in (".html", ".htm")
    target = out or one or Path("report")
    if out is not None and out.exists() and out.is_dir() == page_alone:
        kind = "a folder; name a page's file" if page_alone else "a file; name a folder, or FILE.html"
        raise InputError(f"--out {out}: is {kind}")
    runs, notes = collect(folders)
    groups = group_runs(runs, unfinished=unfinished)
    check_counted(groups)
    counted = counted_of(groups)
    told = of_groups(groups)
    shown = [run for run in runs if run in counted]  # in the order in which they were named
    _tell(notes)
    end, *equal = run_sheets(shown)
    print(as_text(*written_out(end)))
    for sheet in equal:
        print(f"\n{sheet.title.lower()}\n{as_text(*written_out(sheet))}")
    for line in told:
        print(line)
    if not page_alone:
        draw_or_say_why(lambda: [print(path) for path in draw_report(shown, target, told).values()])
    page = target if page_alone else target / "report.html"
    notes = [*notes, *told]
    drawn = draw_or_say_why(lambda: print(write_page(groups, usual_targets(counted), page, notes=notes)), what="page")
    return DONE if drawn else BAD_INPUT  # the page is what was asked for


def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or a sweep's.")],
    once: Annotated[bool, typer.Option("--once", help="Show what there is, and end.")] = False,
    track: Annotated[
        list[str] | None, typer.Option("--track", metavar="NAME", help="Tell tensorboard, mlflow or wandb too.")
    ] = None,
) -> int:
    """Watch a run that is under way, or look at a finished one, in the terminal.

    fedmom watch runs/quickstart-20260101-120000

    Reads the folder's files alone: the run may be another process's, a container's, or another machine's on a shared
    disk. With --track a run that knows nothing of a tracker is told to it, from its first round on.
    """
    from fedmom.cli.watch import watch as watch_folder

    watch_folder(folder, Console(highlight=False), once=once, trackers=track or ())
    return 0
