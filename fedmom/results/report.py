"""What a person reads of runs: the end of one, and a folder that compares several."""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from fedmom.errors import InputError
from fedmom.machine.files import write_text
from fedmom.records.history import thinned
from fedmom.results.comparison import all_sheets, end_sheet, run_sheets, usual_targets
from fedmom.results.groups import Group, alone, counted_of, rivals
from fedmom.results.pictures import curves as pictures
from fedmom.results.pictures.clients import draw_clients, has_clients
from fedmom.results.reading import Run
from fedmom.results.sheets import Sheet, sheet_markdown, sheet_text, written_out
from fedmom.results.tables import MISSING, fitted
from fedmom.rounds.loop import Record
from fedmom.user_code import one_line


def draw_report(
    runs: Sequence[Run], out_dir: Path, notes: Sequence[str] = (), groups: Sequence[Group] = ()
) -> dict[str, Path]:
    """Write curves.png and report.md (the tables, and the picture linked) into `out_dir`, and clients.png of a single
    run that looked at its clients' own results.

    notes: what was left out, or is not finished; both files say so. groups: of these runs, where some have several
    seeds; the files then show means over seeds, else every run by itself.
    """
    paths = {"curves": out_dir / "curves.png", "report": out_dir / "report.md"}
    parts = ["# Runs", "![Curves of the runs](curves.png)", *notes]
    if groups:
        pictures.draw_groups(groups, paths["curves"], notes)
        parts += [sheet_markdown(sheet) for sheet in all_sheets(groups, usual_targets(counted_of(rivals(groups))))]
    else:
        pictures.draw_curves(runs, paths["curves"], *[list(notes)] * bool(notes))
        if len(runs) == 1 and has_clients(runs[0].rounds):
            paths["clients"] = out_dir / "clients.png"
            draw_clients(runs[0].rounds, paths["clients"])
            parts.insert(2, "![The clients' own results](clients.png)")
        parts += [sheet_markdown(sheet) for sheet in run_sheets(runs) if sheet.rows]
        parts += [
            "Equal tables: each run's last evaluation at or before the largest value that all runs reached, "
            f"and at or before half of it; {MISSING} where a run was not evaluated by then."
        ]
    write_text(paths["report"], "\n\n".join(parts) + "\n")
    return paths


def finished(folder: Path, rounds: Sequence[Record], width: int | None = None) -> list[str]:
    """Draw a run's curves and its clients, and give what is to be printed: its table, the pictures, the folder (last).

    width: of the terminal, in characters; a table that is wider stands upright.
    """
    lines, curves, clients = list[str](), folder / "curves.png", folder / "clients.png"
    if rounds:
        run = Run(folder.name, folder, thinned(rounds))
        draw_or_say_why(lambda: pictures.draw_curves([run], curves))
        header, (row,) = written_out(end_sheet(alone([run]), of_runs=True))
        lines.append(fitted(header, [row], width))
        if curves.exists():
            lines.append(f"curves: {curves}")
        if has_clients(run.rounds) and draw_or_say_why(lambda: draw_clients(run.rounds, clients)):
            lines.append(f"clients: {clients}")
    return [*lines, str(folder)]


def in_short(sheet: Sheet, width: int | None) -> str:
    """What a command prints of a table that a file holds whole: who, how many seeds, what was reached, and in how long.

    Lines have at most `width` characters; None: as many as they need.
    """
    reached = next((one.title for one in sheet.columns if one.digits), "")  # an accuracy, where there is one
    kept = [at for at, one in enumerate(sheet.columns) if one.title in ("run", "seeds", reached, "rounds", "seconds")]
    rows = [[row[at] for at in kept] for row in sheet.rows]
    return sheet_text(sheet._replace(columns=[sheet.columns[at] for at in kept], rows=rows, note="", title=""), width)


def next_command(text: str, width: int | None) -> list[str]:
    """["next: fedmom compare runs/x"], for a terminal, where it fits into a line."""
    line = f"next: {text}"
    return [line] if width is not None and len(line) <= width else []


def draw_or_say_why(draw: Callable[[], object], what: str = "picture") -> bool:
    """Whether it was drawn. Where a picture cannot be had, a line says why, and all else goes on."""
    try:
        with warnings.catch_warnings():  # matplotlib's, where a diverged run's losses span 300 decades
            warnings.simplefilter("ignore")
            draw()
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        print(f"fedmom: no {what} was drawn: {package} is not installed: pip install {package}", file=sys.stderr)
    except InputError as error:
        print(f"fedmom: no {what} was drawn: {error}", file=sys.stderr)
    except OSError:  # a folder that may not be written, a full disk: the command says so
        raise
    except Exception as error:  # a name that no font has, a figure that a library cannot draw
        print(f"fedmom: no {what} was drawn: {one_line(error)}", file=sys.stderr)
    else:
        return True
    return False
