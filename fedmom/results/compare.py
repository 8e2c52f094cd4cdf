"""`fedmom compare`: groups of runs -> files of tables and figures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmom.machine.files import write_text
from fedmom.results.comparison import Target, speedups
from fedmom.results.groups import Group
from fedmom.results.pictures import comparison
from fedmom.results.reading import is_run
from fedmom.results.sheets import Sheet, sheet_csv, sheet_latex, sheet_markdown
from fedmom.results.tables import wrapped

# Files that a comparison may have and another may lack.
_OURS = ("equal-*.csv", "to-*.csv", "speedup*.csv", "speedup*.png", "speedup*.pdf")


def default_out(folders: Sequence[Path]) -> Path:
    """A sweep's comparison lies in its folder; others where the command was given."""
    one = folders[0] if len(folders) == 1 else None
    return one / "comparison" if one and not is_run(one) else Path("comparison")


def write_tables(sheets: Sequence[Sheet], pictures: Sequence[Path], out: Path) -> list[Path]:
    """comparison.md (with the pictures), tables.tex, and a CSV file per table."""
    out.mkdir(parents=True, exist_ok=True)
    shown = [f"![{path.stem}]({path.name})" for path in pictures if path.suffix == ".png"]
    write_text(out / "comparison.md", "\n\n".join(["# Comparison", *shown, *map(sheet_markdown, sheets)]) + "\n")
    write_text(out / "tables.tex", "% \\usepackage{booktabs}\n" + "\n\n".join(map(sheet_latex, sheets)) + "\n")
    paths = [out / "comparison.md", out / "tables.tex"]
    for sheet in sheets:
        paths.append(out / f"{sheet.name}.csv")
        write_text(paths[-1], sheet_csv(sheet))
    # Those of an earlier comparison in this folder, of other runs or targets, would be taken for this one's.
    for old in {path for pattern in _OURS for path in out.glob(pattern)} - {*paths, *pictures}:
        old.unlink()
    return paths


def where_the_rest_is(sheets: Sequence[Sheet], pictures: Sequence[Path], out: Path, width: int | None) -> list[str]:
    """What a comparison wrote and did not print, a line for each kind, the folder last."""
    figures = sorted({path.stem for path in pictures})
    lines = [f"more tables: {'; '.join(sheet.title.lower() for sheet in sheets)}"] * bool(sheets)
    lines += [f"figures (PNG and PDF): {', '.join(figures)}"] * bool(figures)
    lines.append("all tables: comparison.md, tables.tex, and a CSV file each, in")
    return [*(wrapped(line, width) for line in lines), str(out)]


def draw_figures(groups: Sequence[Group], targets: Sequence[Target], out: Path) -> Iterator[Path]:
    """curves, spreads and, where N varies, speedup; each as PNG and PDF."""
    yield from comparison.draw_comparison(groups, out / "curves")
    yield from comparison.draw_spreads(groups, out / "spreads")
    for number, target in enumerate(targets):
        stem = "speedup" if number == 0 else f"speedup-{number + 1}"
        footing = comparison.foot(groups)
        yield from comparison.draw_speedup(speedups(groups, target), target, out / stem, footing)
