"""For mkdocs: links that leave docs/; formulas as MathML, which browsers set by themselves, and a font for them."""

import html
import re
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+)([^)]*)\)")
FILE = re.compile(r"^```(\w+) file=(\S+)$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# ASCII and Latin-1, accents, Greek, punctuation and superscripts, letterlike, arrows, operators, brackets, and the
# mathematical alphabets that browsers take for an <mi>.
IN_FORMULAS = (
    *((0x20, 0xFF), (0x2C6, 0x2DC), (0x300, 0x33F), (0x370, 0x3FF), (0x2010, 0x2061), (0x20D0, 0x20FF)),
    *((0x2100, 0x214F), (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2308, 0x230B), (0x27E8, 0x27E9), (0x1D400, 0x1D7FF)),
)


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Links out of docs/ become names, since a site holds docs/ alone; the file of a block is its title."""
    depth = page.file.src_uri.count("/")

    def named(link: re.Match[str]) -> str:
        text, up, target = link.groups()
        if up.count("../") <= depth:  # it stays within docs/
            return link[0]
        return text if "`" in text else f"{text} (`{target.split('#')[0]}`)"

    return OUTSIDE.sub(named, FILE.sub(r'```\1 title="\2"', markdown))


def on_page_content(content: str, **_: object) -> str:
    """$…$ and $$…$$, which pymdownx.arithmatex found outside of code, become MathML."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    kind, latex = found[1], html.unescape(found[2]).strip()
    formula = convert(latex, display="block" if kind == "div" else "inline")
    return f'<div class="formula" tabindex="0">{formula}</div>' if kind == "div" else formula


def on_post_build(config: Any, **_: object) -> None:
    """STIX Two Math beside style.css, cut to what formulas need: not every machine has a font with a MATH table."""
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont

    font = TTFont(BytesIO((files("ziamath") / "fonts/STIXTwoMath-Regular.ttf").read_bytes()))
    cut = Subsetter(Options(layout_features=["*"]))
    cut.populate(unicodes=[code for first, last in IN_FORMULAS for code in range(first, last + 1)])
    cut.subset(font)
    font.save(Path(config["site_dir"]) / "STIXTwoMath.ttf")
