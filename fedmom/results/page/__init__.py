"""One self-contained HTML page of runs: curves, tables, data, settings, environment."""

from fedmom.results.page.write import write_page

__all__ = ["write_page"]
