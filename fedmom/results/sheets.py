"""Means and deviations over seeds, and sheets of them, as text, Markdown, CSV and LaTeX."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from statistics import mean, stdev
from types import MappingProxyType
from typing import NamedTuple

from fedmom.results.tables import MISSING, as_markdown, fitted, wrapped

MOST_FOOT = 8  # groups that are named below a table


class Stat(NamedTuple):
    """Mean and sample standard deviation of a number over the seeds of a group."""

    mean: float
    sd: float | None  # None for one seed
    num: int  # seeds that have the number
    of: int  # seeds of the group


Value = str | Stat | None


class Column(NamedTuple):
    title: str
    digits: str = ""  # format of a measured mean; "" for counts, in four digits, which say no deviation of 0
    unit: str = ""  # " %", behind every mean; beside the title where numbers stand alone

    @property
    def full_title(self) -> str:
        return f"{self.title} ({self.unit.strip()})" if self.unit else self.title


class Sheet(NamedTuple):
    """A table whose numbers are not yet written out. The first column names a group."""

    name: str  # of its file
    title: str
    columns: list[Column]
    rows: list[list[Value]]
    note: str = ""
    left: Mapping[str, str] = MappingProxyType({})  # {group: what of it is not counted, or not finished}, if anything

    @property
    def foot(self) -> str:
        """What its numbers leave out, in a line; "" where they are of all runs."""
        parts = [f"{group}: {text}" for group, text in self.left.items() if text]
        more = f"; and of {len(parts) - MOST_FOOT} more groups" if len(parts) > MOST_FOOT else ""
        return "; ".join(parts[:MOST_FOOT]) + more


def stat(values: Sequence[float | None]) -> Stat | None:
    """Over the seeds that have a finite number, None where none has; a run that is alone shows what it has, NaN too."""
    if len(values) == 1 and values[0] is not None:
        return Stat(values[0], None, 1, 1)
    found = [value for value in values if value is not None and isfinite(value)]
    if not found:
        return None
    return Stat(mean(found), stdev(found) if len(found) > 1 else None, len(found), len(values))


def _pair(cell: Stat, digits: str) -> tuple[str, str]:
    """(mean, deviation) with equally many digits after the point; the deviation is "" for one seed."""
    large = abs(cell.mean) >= 1000 and not digits
    text = f"{cell.mean:,.0f}" if large else format(cell.mean, digits or ".4g")
    if cell.sd is None or (not digits and cell.sd <= 1e-9 * abs(cell.mean)):
        return text, ""
    after = len(text.partition(".")[2])
    return text, f"{cell.sd:.2g}" if "e" in text else f"{cell.sd:,.{after}f}"


def written(cell: Value, digits: str, unit: str = "", plus_minus: str = " ± ") -> str:
    """ "84.9 % ± 0.5", and "(2 of 3)" where not every seed has the number."""
    if cell is None:
        return MISSING
    if isinstance(cell, str):
        return cell
    mean_text, deviation = _pair(cell, digits)
    text = mean_text + unit + (plus_minus + deviation if deviation else "")
    return text if cell.num == cell.of else f"{text} ({cell.num} of {cell.of})"


def written_out(sheet: Sheet) -> tuple[list[str], list[list[str]]]:
    """(header, rows)."""
    header = [column.title for column in sheet.columns]
    shown = [
        [written(cell, column.digits, column.unit) for cell, column in zip(row, sheet.columns, strict=True)]
        for row in sheet.rows
    ]
    return header, shown


def sheet_text(sheet: Sheet, width: int | None = None) -> str:
    """The table with what stands around it, in lines of at most `width` characters (None: as long as they are)."""
    around = [wrapped(text, width) if text else "" for text in (sheet.title, sheet.note, sheet.foot)]
    return "\n".join(filter(None, [around[0], fitted(*written_out(sheet), width), *around[1:]]))


def sheet_markdown(sheet: Sheet) -> str:
    parts = [f"## {sheet.title}", as_markdown(*written_out(sheet)), sheet.note, sheet.foot]
    return "\n\n".join(part for part in parts if part)


def sheet_csv(sheet: Sheet) -> str:
    """Numbers in full, a column each for mean, deviation and how many seeds, for programs to read.

    What is left out stands in a last column, for a line below the table would break a program.
    """
    numeric = [any(isinstance(row[i], Stat) for row in sheet.rows) for i in range(len(sheet.columns))]
    header: list[str] = []
    for column, is_number in zip(sheet.columns, numeric, strict=True):
        header += [f"{column.full_title}{end}" for end in (("", " sd", " n") if is_number else ("",))]
    lines = [[*header, "left out"] if sheet.left else header]
    for row in sheet.rows:
        line: list[str] = []
        for cell, is_number in zip(row, numeric, strict=True):
            if isinstance(cell, Stat):
                line += [f"{cell.mean:.10g}", "" if cell.sd is None else f"{cell.sd:.10g}", str(cell.num)]
            else:
                line += [cell or ""] + ["", ""] * is_number
        # A row that is no group's (of a speedup) is said all of them.
        lines.append([*line, sheet.left.get(str(row[0]), sheet.foot)] if sheet.left else line)
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "γ": r"$\gamma$",
    "β": r"$\beta$",
    "λ": r"$\lambda$",
    "α": r"$\alpha$",
    "η": r"$\eta$",
    "σ": r"$\sigma$",
    "–": "--",
    "…": r"\ldots{}",
    "×": r"$\times$",
    "≥": r"$\ge$",
    "≤": r"$\le$",
    "x̂": r"$\hat{x}$",
    "x̄": r"$\bar{x}$",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
_SPECIAL = re.compile("|".join(map(re.escape, sorted(_LATEX, key=len, reverse=True))))
_LETTERS = re.compile(r"\b([NIEBTR])(?= = )")  # symbols of the method, as in "I = 4"


def latex(text: str) -> str:
    """Plain text as LaTeX shows it, with the method's symbols in mathematics."""
    return _LETTERS.sub(r"$\1$", _SPECIAL.sub(lambda found: _LATEX[found[0]], text))


def sheet_latex(sheet: Sheet) -> str:
    r"""A table for a paper (\usepackage{booktabs})."""

    def cell(value: Value, digits: str) -> str:
        if not isinstance(value, Stat):
            return latex(value or MISSING)
        text = written(value._replace(num=value.of), digits, plus_minus=r" \pm ").replace(",", "{,}")
        left = "" if value.num == value.of else f" ({value.num} of {value.of})"
        return f"${text}${left}"

    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(sheet.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}",
        r"\toprule",
        " & ".join(latex(column.full_title) for column in sheet.columns) + r" \\",
        r"\midrule",
    ]
    for row in sheet.rows:
        cells = [cell(value, column.digits) for value, column in zip(row, sheet.columns, strict=True)]
        lines.append(" & ".join(cells) + r" \\")
    foot = [rf"\par\smallskip\footnotesize {latex(sheet.foot)}"] if sheet.left else []
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *foot, r"\end{table}"])


FORMATS: dict[str, Callable[[Sheet], str]] = {
    "text": sheet_text,
    "markdown": sheet_markdown,
    "csv": sheet_csv,
    "latex": sheet_latex,
}
