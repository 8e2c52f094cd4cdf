"""The site builds strictly: no broken link, no page that nobody reaches, no name that does not exist."""

import ast
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from laws import table
from sources import tree_of

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings", "ziamath"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    for words in ("Run Algorithm 1 or 2 as", "wants to hear of a run", "on_round", "make_topology"):
        assert words in api
    for field in ("state_dict", "first_round", "num_classes"):  # of Result, Start and Dataset
        assert re.search(f'<td><code><span title="[^"]*">{field}</span>', api), field
    method = (tmp_path / "site/method/index.html").read_text(encoding="utf-8")
    assert "<mfrac>" in method
    left = re.findall(r"arithmatex|<m[ion]>(?:&amp;|[^<]*\\)[^<]*</m[ion]>", method)  # what latex2mathml does not know
    assert not left, left
    assert '<span class="filename">mine.py</span>' in (tmp_path / "site/tutorial/index.html").read_text(
        encoding="utf-8"
    )
    pages = list((tmp_path / "site").rglob("index.html"))
    assert len(pages) == len(list((ROOT / "docs").rglob("*.md")))
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', api)
    assert not fetched, fetched


def test_every_page_of_docs_is_in_the_navigation():
    listed = set(re.findall(r"^ +- .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


def test_the_generated_pages_are_what_the_code_says():
    pages = runpy.run_path(str(ROOT / "docs/reference.py"))["PAGES"]
    for name, page in pages.items():
        written = (ROOT / "docs/reference" / name).read_text(encoding="utf-8")
        assert written == page(), f"{name}: run python docs/reference.py"


@table("page", ["README.md", "CONTRIBUTING.md", "docs", "examples/README.md", "benchmarks"])
def test_links_to_files_of_the_checkout_lead_somewhere(page):
    start = ROOT / page
    for path in sorted(start.rglob("*.md")) if start.is_dir() else [start]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.slow
@pytest.mark.xdist_group("sources")  # one process parses them
@table("guide", ["CONTRIBUTING.md", "docs/design.md"])
def test_names_and_files_in_the_guides_for_developers_exist(guide):
    spans = re.findall(
        r"`([^`\n]+)`", re.sub(r"```.*?```", "", (ROOT / guide).read_text(encoding="utf-8"), flags=re.DOTALL)
    )
    for file in {span for span in spans if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|md|toml|txt|yml)", span)}:
        assert (ROOT / file).exists() or (ROOT / "fedmom" / file).exists(), f"{guide}: {file}"
    names = {span for span in spans if re.fullmatch(r"[A-Z]\w{2,}", span) and not (ROOT / span).exists()}
    assert names, f"{guide} names nothing"
    assert not names - names_in_code(), f"{guide}: {sorted(names - names_in_code())}"


@cache
def names_in_code() -> set[str]:
    """Every name that code of ours defines, imports or uses; words in comments and texts are none."""
    found = set[str]()
    for folder in ("fedmom", "strategies", "clients", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(tree_of(path)):
                match node:
                    case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.Name(id=name):
                        found.add(name)
                    case ast.alias(name=name):
                        found.update(name.split("."))
    return found
