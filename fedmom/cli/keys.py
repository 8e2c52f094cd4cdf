"""`fedmom keys`: what every key of a config means, from the schema that the package ships."""

import shlex
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedmom.cli.options import DONE
from fedmom.errors import InputError
from fedmom.machine.output import terminal_width

if TYPE_CHECKING:
    from fedmom.config.schema import About

MARK = "*"  # of the ten keys to know first
# What people call a key that has another name here.
CALLED = {
    "learning-rate": "algorithm.lr",
    "momentum": "algorithm.beta",
    "local-steps": "algorithm.num-local-steps",
    "steps": "algorithm.num-local-steps",
    "epochs": "algorithm.local-epochs",
    "clients": "data.num-clients",
    "batch": "data.batch-size",
    "rounds": "run.num-rounds",
    "gpu": "engine.device",
    "gpus": "simulation.num-gpus",
    "cpus": "simulation.num-cpus",
    "actors": "simulation.num-actors",
    "non-iid": "data.partition",
    "decay": "algorithm.weight-decay",
    "compression": "algorithm.codecs",
    "quantization": "algorithm.codecs",
    "server-lr": "algorithm.outer-lr",
    "outer-optimizer": "algorithm.outer",
}
NARROW = 100  # columns; on a terminal with fewer, a key's meaning stands below its name


def keys(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]...", help="Only keys with such a word; or one key's full name."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema instead, by which an editor completes TOML files.")
    ] = False,
) -> int:
    """Explain the keys of a config: default, meaning, and the values a key can take.

    fedmom keys momentum

    fedmom keys algorithm.lr

    The ten keys to know first are marked with a *.

    fedmom keys --schema > fedmom.schema.json

    With the line `#:schema fedmom.schema.json` on top of a config, editors that know TOML schemas complete its keys.
    """
    from fedmom.config.schema import FILE, read_keys

    if schema:
        print(FILE.read_text(encoding="utf-8"), end="")
        return DONE
    known = read_keys()
    if words and len(words) == 1 and words[0] in known:
        print("\n".join(explained(known[words[0]], terminal_width())))
        return DONE
    chosen = [key for key in known.values() if not words or any(word.lower() in searched(key) for word in words)]
    if not chosen:
        raise InputError(_no_such(" ".join(words or []), known))
    print("\n".join(listed(chosen, terminal_width())))
    return DONE


def searched(key: "About") -> str:
    """The text in which a word is looked for."""
    return " ".join([key.name, toml(key.default), meaning(key)]).lower()


def meaning(key: "About") -> str:
    """What a key means, and the names that it takes."""
    names = ", ".join([*key.choices, key.also] if key.also else key.choices)
    return f"{key.doc}: {names}" if names else key.doc


def toml(value: object) -> str:
    """A scalar as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def typed(value: object) -> str:
    """A scalar as `--set` takes it."""
    return value if isinstance(value, str) else toml(value)


def change(name: str, value: str) -> str:
    """What follows `--set` where this key becomes `value`, quoted where a shell would take it apart."""
    return shlex.quote(f"{name}={value}")


def listed(keys: Iterable["About"], width: int | None) -> Iterator[str]:
    """The lines of a list by section, at most `width` columns wide; None: a line for each key."""
    chosen = [*keys]
    names = {key.name: f"{key.name} {MARK}" if key.first else key.name for key in chosen}
    first = max(map(len, names.values())) + 2
    second = max(len(toml(key.default)) for key in chosen) + 2
    section = ""
    for key in chosen:
        if key.section != section:
            yield from ([""] if section else []) + [f"[{key.section}]"]
            section = key.section
        start = names[key.name].ljust(first) + toml(key.default).ljust(second)
        if width is None:
            yield start + meaning(key)
        elif width < NARROW:
            yield start.rstrip()
            yield from _wrapped(meaning(key), width, "    ", "    ")
        else:
            yield from _wrapped(meaning(key), width, start, " " * (first + second))


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def explained(key: "About", width: int | None = None) -> Iterator[str]:
    """A paragraph on one key: its default, meaning, range, choices, and an example; lines as in `listed`."""
    kind = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "a string"}
    yield f"{key.name} = {toml(key.default)}"
    yield from _wrapped(key.doc, width or sys.maxsize, "  ", "  ")
    if not key.choices:
        yield f"  Takes {kind[key.kind]}{f' {key.range}' if key.range else ''}."
    column = max(map(len, key.choices), default=0) + 6
    for name, says in key.choices.items():
        yield from _wrapped(says, width or sys.maxsize, f"    {name}".ljust(column), " " * column) or [f"    {name}"]
    if key.also:
        yield f"    or {key.also}"
    _, _, tail = key.name.partition(".")
    yield f"  On the command line: --set {change(key.name, typed(key.example))}"
    yield f"  In a config:         [{key.section}] {tail} = {toml(key.example)}"
    if key.first:
        yield "  One of the ten keys to know first."


def _no_such(text: str, known: Collection[str]) -> str:
    near = nearest(text, known)
    hint = f"did you mean {' or '.join(near)}?" if near else "`fedmom keys` lists them all"
    return f"{text}: is in no key, default or meaning; {hint}"


def meant(text: str, known: Collection[str]) -> list[str]:
    """The keys whose last part, or whose usual name elsewhere, is `text`."""
    last = text.replace("_", "-").lower().rpartition(".")[2]
    called = [name for word, name in CALLED.items() if word == last]
    return list(dict.fromkeys([*called, *(name for name in known if name.partition(".")[2] == last)]))


def nearest(text: str, known: Collection[str]) -> list[str]:
    """The keys that somebody who typed `text` may have meant, at most three: the likeliest first."""
    text = text.replace("_", "-").lower()
    if exact := meant(text, known):
        return exact[:3]
    last = text.rpartition(".")[2]
    words = {**{name.partition(".")[2]: name for name in reversed([*known])}, **CALLED}
    whole = get_close_matches(text, known, n=1, cutoff=0.85)
    close = [words[word] for word in get_close_matches(last, words, n=2)]
    parts = [name for name in known if last in name.partition(".")[2].split("-")]
    return list(dict.fromkeys([*whole, *close, *parts]))[: 1 if whole else 3]


def no_such_option(error: click.NoSuchOption, words: Sequence[str]) -> str:
    """What to write instead of an option that does not exist: most often somebody means a key."""
    from fedmom.config.schema import read_keys

    option, known = error.option_name, read_keys()
    takes_keys = error.ctx is not None and any("--set" in parameter.opts for parameter in error.ctx.command.params)
    near = meant(option.lstrip("-"), known)
    if not near and not error.possibilities:
        near = nearest(option.lstrip("-"), known)
    if not near or not takes_keys:
        right = " or ".join(error.possibilities or ())
        return f"{option}: is no option; " + (
            f"did you mean {right}?" if right else "--help lists those of the command"
        )
    at = next((n for n, word in enumerate(words) if word.partition("=")[0] == option), len(words))
    given = "".join(words[at : at + 1]).partition("=")[2] or "".join(words[at + 1 : at + 2])
    value = given if given and not given.startswith("-") else typed(known[near[0]].example)
    right = change(near[0], value)
    also = f" (or {', '.join(near[1:])})" if near[1:] else ""
    if "," in value and error.ctx and any("--grid" in parameter.opts for parameter in error.ctx.command.params):
        return f"{option}: is no option; the values of a key are given by --grid {right}{also}"
    return f"{option}: is no option; a key is changed by --set {right}{also}"
