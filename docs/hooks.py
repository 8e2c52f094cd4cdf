"""For mkdocs: links from docs/ to files of the checkout become their names, since a site holds docs/ alone."""

import re

OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)]*)\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    return OUTSIDE.sub(lambda link: link[1] if "`" in link[1] else f"{link[1]} (`{link[2].split('#')[0]}`)", markdown)
