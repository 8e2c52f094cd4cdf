"""The site builds strictly: no broken link, no page that nobody reaches, no name that does not exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    for words in ("Run Algorithm 1 or 2 as", "wants to hear of a run", "on_round", "make_topology"):
        assert words in api
    pages = list((tmp_path / "site").rglob("index.html"))
    assert len(pages) == len(list((ROOT / "docs").glob("*.md")))
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', api)
    assert not fetched, fetched


def test_every_page_of_docs_is_in_the_navigation():
    listed = set(re.findall(r"^  - .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs", "examples/README.md"])
def test_links_to_files_of_the_checkout_lead_somewhere(page):
    start = ROOT / page
    for path in sorted(start.glob("*.md")) if start.is_dir() else [start]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
