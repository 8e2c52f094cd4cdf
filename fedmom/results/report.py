"""What a person reads of runs: the end of one, and a folder that compares several."""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from fedmom.errors import InputError
from fedmom.machine.files import write_text
from fedmom.records.history import thinned
from fedmom.results.comparison import end_sheet, run_sheets
from fedmom.results.groups import alone
from fedmom.results.pictures import curves as pictures
from fedmom.results.reading import Run
from fedmom.results.sheets import sheet_markdown, written_out
from fedmom.results.tables import MISSING, as_text
from fedmom.rounds.loop import Record
from fedmom.user_code import one_line


def draw_report(runs: Sequence[Run], out_dir: Path, notes: Sequence[str] = ()) -> dict[str, Path]:
    """Write curves.png and report.md (the tables, and the picture linked) into `out_dir`.

    notes: what was left out, or is not finished; both files say so.
    """
    paths = {"curves": out_dir / "curves.png", "report": out_dir / "report.md"}
    pictures.draw_curves(runs, paths["curves"], *[list(notes)] * bool(notes))
    parts = ["# Runs", "![Curves of the runs](curves.png)", *notes]
    parts += [sheet_markdown(sheet) for sheet in run_sheets(runs) if sheet.rows]
    parts += [
        "Equal tables: each run's last evaluation at or before the largest value that all runs reached, "
        f"and at or before half of it; {MISSING} where a run was not evaluated by then."
    ]
    write_text(paths["report"], "\n\n".join(parts) + "\n")
    return paths


def finished(folder: Path, rounds: Sequence[Record], width: int | None = None) -> list[str]:
    """Draw the curves of a run, and give what is to be printed: its table, the picture's path, the folder (last).

    width: of the terminal, in characters; a table that is wider stands upright.
    """
    lines, curves = [], folder / "curves.png"
    if rounds:
        run = Run(folder.name, folder, thinned(rounds))
        draw_or_say_why(lambda: pictures.draw_curves([run], curves))
        header, (row,) = written_out(end_sheet(alone([run]), of_runs=True))
        text = as_text(header, [row])
        if width is not None and len(text.partition("\n")[0]) > width:
            text = as_text(header[:1] + row[:1], [list(pair) for pair in zip(header[1:], row[1:], strict=True)])
        lines.append(text)
        if curves.exists():
            lines.append(f"curves: {curves}")
    return [*lines, str(folder)]


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
