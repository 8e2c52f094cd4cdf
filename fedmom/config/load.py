"""Configurations as people write and read them: TOML files, mappings, `--set section.key=value` <-> `Config`."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from fedmom.config.keys import KEYS, SECTIONS, Config, Scalar, checked, kebab
from fedmom.config.numbers import read_toml, shown, typed, without_brackets
from fedmom.errors import InputError, unknown
from fedmom.machine.files import at_home
from fedmom.user_code import app_root


def flat(config: Config) -> dict[str, Scalar]:
    """{"section.key": value} for every key, in the order of the dataclasses."""
    return {name: getattr(getattr(config, k.section), k.name) for name, k in KEYS.items()}


def replace(config: Config, section: str, **values: Scalar) -> Config:
    """`config` with other (right) values in one section."""
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})


def as_held(name: str, value: Any) -> Any:
    """The value as the configuration would hold it: 1 is an lr of 1.0. A wrong one as it is."""
    try:
        return checked(name, value)
    except InputError:
        return repr(value)


def _build(values: Mapping[str, Any], base: Config) -> Config:
    """`base` with `values` in place of some of its keys; each is checked by itself."""
    parts: dict[str, dict[str, Scalar]] = {}
    for name, value in values.items():
        right = checked(name, value)
        parts.setdefault(KEYS[name].section, {})[KEYS[name].name] = right
    for section, rights in parts.items():
        base = replace(base, section, **rights)
    return base


def parse_set(text: str) -> tuple[str, Any]:
    """`section.key=value` from the command line, unchecked."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals:
        raise InputError(f"--set {text!r}: must read section.key=value")
    return name, typed_value(name, value)


def typed_value(name: str, text: str) -> Any:
    """The value of a key as somebody types it: numbers in any form, names without quotes, lists in brackets."""
    if name not in KEYS:
        return typed(text)
    found = typed(text, KEYS[name].type)
    try:
        return without_brackets(found) if KEYS[name].holds and isinstance(found, str) else found
    except ValueError as error:
        raise InputError(f"{name} = {found!r}: {error}") from None


def parse_sets(sets: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """{"section.key": value} of several changes, unchecked; the last one counts."""
    if isinstance(sets, Mapping):
        return _flattened(sets)
    changes = [*sets]
    if wrong := [one for one in changes if not isinstance(one, str)]:
        raise InputError(f"sets: {wrong[0]!r} is no change of a key; write 'section.key=value', or give a mapping")
    return dict(parse_set(text) for text in changes)


def _flattened(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.key": value} of {"section": {"key" (or "k_e_y"): value}} and of {"section.key": value}."""
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise InputError(f"{name!r} is no key: keys are strings, such as algorithm.lr")
        nested = isinstance(value, Mapping)
        values.update({f"{name}.{kebab(k)}": v for k, v in value.items()} if nested else {name: value})
    return values


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, with a byte order mark or without. InputError names the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a text file ({error})") from None
    try:
        return read_toml(text)
    except ValueError as error:
        raise InputError(f"{path}: is not TOML: {error}") from None


def shipped() -> dict[str, Path]:
    """{name: file} of the configurations that come with fedmom, such as "quickstart" and "decentralized/ring"."""
    try:
        folder = app_root() / "configs"
    except InputError:  # a node of Flower's has the code alone
        return {}
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.toml"))}


def config_file(source: str | Path) -> Path:
    """The file that CONFIG means: itself if there is one, else fedmom's own of that name (without .toml).

    Raises InputError, with the names that are near, where there is neither.
    """
    path = at_home(source)
    if path.is_file():
        return path
    names = shipped()
    if not path.suffix and path.as_posix() in names:
        return names[path.as_posix()]
    try:
        path.stat()
    except FileNotFoundError:
        raise InputError(f"{source}: no such file{_near(path, names)}") from None
    except OSError:
        pass  # as below
    return path  # a folder, or a pipe: reading it says what is wrong, if anything is


def _near(path: Path, names: Iterable[str]) -> str:
    """What may have been meant: names that end alike or are near, else all at the top and the folders of the others."""
    asked = path.with_suffix("").as_posix().removeprefix("configs/")
    ends = [name for name in names if asked in (name, name.rpartition("/")[2])]
    if near := ends or get_close_matches(asked, names, n=3):
        return f"; did you mean {' or '.join(near)}?"
    heads = sorted({head + (f"{slash}…" if slash else "") for head, slash, _ in (n.partition("/") for n in names)})
    return f"; fedmom's own are {', '.join(heads)}" if heads else ""


def _read_config(path: Path) -> dict[str, Any]:
    """{"section.key": value} of one file, unchecked."""
    tables = read_tables(path)
    if not tables:
        raise InputError(f"{path}: is empty; a config has sections {', '.join(SECTIONS)}")
    values: dict[str, Any] = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            raise InputError(f"{path}: {unknown('section', section, SECTIONS)}")
        if not isinstance(table, dict):
            raise InputError(f"{path}: {section} = {shown(table)}: must be a section, [{section}]")
        values.update({f"{section}.{name}": value for name, value in table.items()})
    return values


class Loaded(NamedTuple):
    """A configuration as given, and which of its keys somebody wrote (the others are defaults)."""

    config: Config
    given: frozenset[str]


def load(source: str | Path | Mapping[str, Any] | Config, sets: Iterable[str] | Mapping[str, Any] = ()) -> Loaded:
    """Read a configuration from a TOML file, a (nested or flat) mapping or a Config, with changes on top.

    A name that is no file here means fedmom's own configuration of that name: "quickstart", "decentralized/ring".
    Raises InputError with one line that names the file or key, the value and what would be right.
    """
    where = ""
    if isinstance(source, Config):
        values = {name: value for name, value in flat(source).items() if value != KEYS[name].default}
    elif isinstance(source, Mapping):
        values = _flattened(source)
    else:
        where = f"{source}: "
        values = _read_config(config_file(source))
    changes = parse_sets(sets)
    try:
        config = _build(values, Config())
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    return Loaded(_build(changes, config), frozenset(values) | frozenset(changes))


load_config = load  # as fedmom has it, where `load` is of a run folder


def to_toml(config: Config, comment: str = "") -> str:
    """The configuration as TOML; `load` of it gives the same configuration back."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    section = None
    for name, value in flat(config).items():
        head, _, tail = name.partition(".")
        if head != section:
            lines += ["", f"[{head}]"] if lines else [f"[{head}]"]
            section = head
        lines.append(f"{tail} = {toml_scalar(value)}")
    return "\n".join(lines) + "\n"


def toml_scalar(value: Scalar) -> str:
    """One value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    # JSON's strings are TOML basic strings, once DEL (which JSON leaves bare) is escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


def with_choices(config: Config, choices: Mapping[str, Scalar]) -> Config:
    """A resolved configuration with what a backend chose: {"engine.path": …}."""
    for name, value in choices.items():
        section, _, key = name.partition(".")
        config = replace(config, section, **{key.replace("-", "_"): value})
    return config
