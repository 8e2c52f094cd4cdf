"""The generated pages of docs/reference/: `python docs/reference.py` writes them, and a test holds them equal.

keys.md has every key of a configuration, from the schema; commands.md has every command and its options, from the
command line itself.
"""

import html
import inspect
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import click
import typer.main

from fedmom.cli.main import app
from fedmom.config.load import toml_scalar
from fedmom.config.schema import About, read_keys, read_schema

HERE = Path(__file__).resolve().parent / "reference"
KINDS = {"integer": "a whole number", "number": "a number", "string": "a string", "boolean": "`true` or `false`"}


def keys_page() -> str:
    """Every key under its section."""
    keys = read_keys()
    first = ", ".join(f"[`{name}`](#{name.replace('.', '')})" for name, about in keys.items() if about.first)
    lines = [
        "# Every key of a configuration",
        "",
        "A configuration is a TOML file.",
        "Every key has a default, so a file holds only what differs from it.",
        "`--set section.key=value` changes a key on the command line; `fedmom keys WORD` finds keys in the terminal.",
        "`fedmom keys --schema` prints a JSON schema, by which editors complete and check the file.",
        "This page is generated from the code.",
        "",
        f"The ten keys to know first: {first}.",
    ]
    for section, table in read_schema()["properties"].items():
        lines += ["", f"## [{section}]", "", table["description"]]
        for name, about in keys.items():
            if about.section == section:
                lines += ["", f"### {name}", "", *_about_key(about)]
    return "\n".join(lines) + "\n"


def _about_key(key: About) -> Iterator[str]:
    yield f"{_upper(key.doc)}."
    yield ""
    yield f"* Default: `{toml_scalar(key.default)}`"
    if key.choices:
        yield "* Values:"
        yield from (
            f"    * `{value}`: {meaning}" if meaning else f"    * `{value}`" for value, meaning in key.choices.items()
        )
        if key.also:
            yield f"    * or {key.also}"
    else:
        yield f"* Type: {KINDS[key.kind]}{f', {key.range}' if key.range else ''}"
    yield f"* Example: `{key.name.partition('.')[2]} = {toml_scalar(key.example)}` under `[{key.section}]`"


def _upper(text: str) -> str:
    """A capital at the start, unless the first word is a name or a symbol."""
    word = text.split()[0]
    return text if word.endswith((":", ",")) or not word.isalpha() or len(word) == 1 else text[0].upper() + text[1:]


def commands_page() -> str:
    """Every command with its help, its arguments and its options."""
    lines = [
        "# Every command",
        "",
        "`fedmom COMMAND --help` prints the same in the terminal, and `fedmom --version` the version.",
        "The exit status is 0 when all is done, 2 for bad input (one line says what is wrong), 3 when a run diverged,"
        " 4 when clients failed, and 130 after an interruption.",
        "This page is generated from the code.",
    ]
    for path, command in _commands(typer.main.get_command(app), "fedmom"):
        lines += ["", f"## {path}", "", *_about_command(path, command)]
    return "\n".join(lines) + "\n"


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, part in getattr(command, "commands", {}).items():
        if getattr(part, "commands", None):
            yield from _commands(part, f"{path} {name}")
        elif not part.hidden:
            yield f"{path} {name}", part


def _about_command(path: str, command: click.Command) -> Iterator[str]:
    arguments = [part for part in command.params if isinstance(part, click.Argument)]
    options = [part for part in command.params if isinstance(part, click.Option) and not part.hidden]
    names = [str(part.make_metavar(click.Context(command))) for part in arguments]
    yield "```sh"
    yield " ".join([path, *names, *(["[OPTIONS]"] if options else [])])
    yield "```"
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(command.help or "").split("\n\n")]
    for is_example, texts in groupby(paragraphs, lambda text: text.startswith("fedmom ")):
        for text in ["\n".join(["```sh", *texts, "```"])] if is_example else texts:
            yield from ("", text)
    if arguments or options:
        yield from ("", "| argument or option | meaning |", "|---|---|")
        for name, argument in zip(names, arguments, strict=True):
            yield f"| {_cell(name)} | {_escaped(getattr(argument, 'help', None) or '')} |"
        for option in options:
            yield f"| {_cell(_option(option))} | {_escaped(option.help or '')}{_default(option)} |"


def _option(option: click.Option) -> str:
    name = " / ".join([*option.opts, *option.secondary_opts])
    if option.is_flag:
        return name
    return f"{name} {option.metavar or {'integer range': 'N', 'float range': 'X'}.get(option.type.name, 'TEXT')}"


def _default(option: click.Option) -> str:
    unset = option.default in (None, "", (), []) or option.is_flag or option.multiple
    return "" if unset else f" Default: {_cell(str(option.default))}."


def _cell(text: str) -> str:
    """As code; a bar would end the cell, and in backticks not every Markdown takes its escape."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


PAGES = {"keys.md": keys_page, "commands.md": commands_page}

if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
        print(HERE / name)
