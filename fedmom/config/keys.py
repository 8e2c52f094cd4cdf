"""A run's configuration: frozen dataclasses <-> TOML <-> flat `section.key` scalars, and all of its validation.

TOML keys are kebab-case, Python names snake_case, and only this file translates. Everything here looks at one key
at a time; resolve.py settles what several of them decide together.
"""

import dataclasses
import difflib
import json
import math
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmom.config.numbers import as_list, read_toml, typed, without_brackets
from fedmom.config.strategies import STRATEGIES
from fedmom.data.batches import AUGMENTATIONS, SAMPLINGS
from fedmom.data.datasets import DATASETS
from fedmom.data.partition import PARTITIONS, QUANTITY_LAWS
from fedmom.engine.engine import PATHS
from fedmom.errors import InputError, unknown
from fedmom.method.algorithms import ALGORITHMS, INTERVALS, MOMENTUM_POLICIES
from fedmom.method.graphs import TOPOLOGIES, WEIGHTS
from fedmom.method.schedules import SCHEDULES, UNITS
from fedmom.method.topology import FILES
from fedmom.tasks.models import MODELS, NORMS
from fedmom.user_code import is_spec

Scalar = str | bool | int | float
Check = Callable[[Any], str | None]  # value -> what would be right, or None where it is
BACKENDS = {
    "engine": "fedmom's own, on one device",
    "simulation": "Flower's messages, on Ray actors here",
    "flower": "recorded of a run that `flwr run` started",
}
DTYPES = {
    "auto": "float64 for quadratic, else float32",
    "float32": "the usual",
    "float64": "for checking laws",
    "bfloat16": "half the memory and its traffic; numbers to three digits, so small steps are lost",
}
MATMULS = {
    "float32": "exact to rounding",
    "tf32": "on a GPU, factors rounded to 10 bits and several times as fast; nothing changes on a CPU",
}
ON_FAILURE = {
    "stop": "the run stops and names the client",
    "retry": "the client is asked again (server.retries times), then the run stops",
    "proceed": "the round's means are over the others, at least server.min-clients",
}
ON_LINK_FAILURE = {
    "stop": "the run stops and names the link",
    "skip": "both keep the weight of that link (symmetric W only)",
}
OTHER_DATA = ("quadratic", "local")  # exact gradients; every client's own examples
LARGEST = 2**31 - 1  # of any count: a position t·B in a client's stream must fit into 64 bits


def above(low: float) -> Check:
    return lambda value: None if low < value < math.inf else f"must be a number > {low:g}"


def at_least(low: float) -> Check:
    return lambda value: None if low <= value < math.inf else f"must be >= {low:g}"


def within(low: float, high: float) -> Check:
    return lambda value: None if low <= value < high else f"must be in [{low:g}, {high:g})"


def key(
    default: Scalar, doc: str, right: Check | Iterable[str] | None = None, also: str = "", *, holds: str = ""
) -> Any:
    """One key: its default, one line on it, and either a check or the names it may take (`also`: other forms).

    holds: "," where its string is a list, ";" where it is a list of lists.
    """
    check, choices = (right, ()) if callable(right) else (None, tuple(right or ()))
    about = {"doc": doc, "check": check, "choices": choices, "also": also, "holds": holds}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class DataConfig:
    dataset: str = key("digits", "see `fedmom datasets`", [*DATASETS, *OTHER_DATA], "FILE.npz or module:function")
    data_dir: str = key("data", "folder (or .npz file) that holds the data set")
    classes: str = key("", "local: names of image folders in the order of their labels, by ,", holds=",")
    num_clients: int = key(20, "N", at_least(1))
    partition: str = key("dirichlet-client", "who gets which examples", PARTITIONS)
    alpha: float = key(0.3, "Dirichlet concentration; small is skewed", above(0))
    min_size: int = key(1, "fewest examples a client may get (dirichlet-class, quantity)", at_least(0))
    shards_per_client: int = key(2, "for partition shards", at_least(1))
    quantity_law: str = key("log-normal", "law of the sizes, for partition quantity", QUANTITY_LAWS)
    sigma: float = key(1.0, "spread of log-normal sizes", at_least(0))
    batch_size: int = key(32, "B, examples per client and step", at_least(1))
    sampling: str = key("shuffle", "how a client's stream of examples is drawn", SAMPLINGS)
    augment: str = key("auto", "random changes to training images (auto: the data set's)", AUGMENTATIONS)
    curvatures: str = key("1;3", "quadratic: h_ik, clients by ; and coordinates by ,", holds=";")
    centers: str = key("4;-2", "quadratic: c_ik, in the same form", holds=";")
    start: str = key("0", "quadratic: x at the start, coordinates by ,", holds=",")
    noise_sigma: float = key(0.0, "quadratic: standard deviation of the gradient noise", at_least(0))


@dataclass(frozen=True)
class ModelConfig:
    name: str = key("cnn", "see `fedmom models`", MODELS, "module:function")
    norm: str = key("batch", "normalisation layers of the resnets", NORMS)
    hidden: int = key(200, "width of the mlp's two hidden layers", at_least(1))


@dataclass(frozen=True)
class AlgorithmConfig:
    name: str = key("pr-sgd-m", "the method", ALGORITHMS)
    nesterov: bool = key(False, "option II (Nesterov) instead of option I (Polyak)")
    num_local_steps: int = key(0, "I, steps between two averagings; 0: the algorithm's own", at_least(0))
    local_epochs: int = key(0, "passes of ⌈n/B⌉ steps over its own data per round, instead of I; 0: off", at_least(0))
    interval: str = key("fixed", "where I comes from", INTERVALS)
    beta: float = key(0.9, "β, momentum coefficient", within(0, 1))
    lr: float = key(0.05, "γ, learning rate (c for lr-schedule theory)", above(0))
    lr_schedule: str = key("constant", "how γ changes over the run", SCHEDULES)
    lr_milestones: str = key("0.5,0.75", "where schedule step decays, in lr-unit", holds=",")
    lr_decay: float = key(0.1, "factor at each milestone", above(0))
    lr_unit: str = key("fraction", "unit of lr-milestones and lr-warmup", UNITS)
    lr_warmup: float = key(0.0, "length of the linear warm-up, in lr-unit", at_least(0))
    lr_min: float = key(0.0, "where schedule cosine ends", at_least(0))
    weight_decay: float = key(0.0, "λ, L2 penalty inside the gradient", at_least(0))
    momentum_policy: str = key("average", "what happens to u between rounds", MOMENTUM_POLICIES)
    correction: str = key("none", "your own change of a client's gradient", ["none"], "module:function")
    client_weights: str = key("uniform", "weights of the averages of x and u", ["uniform", "samples"])
    running_var: str = key("pooled", "how BatchNorm variances are averaged", ["pooled", "mean"])
    cohort_size: int = key(0, "clients drawn per round; 0: all", at_least(0))
    slow_momentum: float = key(0.0, "α, server momentum on top (SlowMo); 0 with slow-lr 1: off", within(0, 1))
    slow_lr: float = key(1.0, "η, learning rate of the server's step (SlowMo)", above(0))
    topology: str = key(
        "complete", "d-sgd-m: who exchanges with whom", TOPOLOGIES, " or ".join(f"FILE{e}" for e in FILES)
    )
    mixing_weights: str = key("metropolis", "d-sgd-m: W of an undirected graph", WEIGHTS)
    topology_degree: int = key(4, "random-regular: neighbours of each client", at_least(1))
    topology_p: float = key(
        0.0,
        "erdos-renyi: probability of each link; 0: 2 ln N / N",
        lambda p: None if 0 <= p <= 1 else "must be in [0, 1]",
    )


@dataclass(frozen=True)
class RunConfig:
    num_rounds: int = key(100, "R; run.num-steps overrules it", at_least(1))
    num_steps: int = key(0, "T, local steps in all, rounded up to whole rounds; 0: num-rounds × I", at_least(0))
    seed: int = key(0, "of data split, model, batches, cohorts", at_least(0))
    eval_every: int = key(1, "rounds between two evaluations (the last round always is)", at_least(1))
    eval_clients: int = key(64, "d-sgd-m: clients whose own models are evaluated, evenly spaced; 0: all", at_least(0))
    checkpoint_every: int = key(10, "rounds between two checkpoints", at_least(1))
    backend: str = key("engine", "who runs the clients", BACKENDS)
    out: str = key("", "the run folder (the command: --out); empty: runs/NAME-TIME")
    resume: str = key("", "a run folder to go on with (the command: --resume)")
    dtype: str = key("auto", "of x and u (auto: float64 for quadratic)", DTYPES)


@dataclass(frozen=True)
class EngineConfig:
    device: str = key("auto", "where tensors live", ["auto", "cpu", "cuda"])
    path: str = key("auto", "how clients run side by side; auto: the fastest, by timing", ["auto", *PATHS])
    chunk_size: int = key(0, "K, clients stacked at once; 0: by memory", at_least(0))
    matmul: str = key("float32", "how exactly a GPU multiplies float32", MATMULS)
    threads: int = key(0, "CPU threads, fewer than 1025; 0: torch's choice", within(0, 1025))
    workers: int = key(0, "Ray actors that share the clients, each as [simulation] says; 0: this process", at_least(0))


@dataclass(frozen=True)
class ServerConfig:
    strategy: str = key("pr-sgd-m", "who averages under Flower: ours, or one of Flower's own", STRATEGIES)
    on_failure: str = key("stop", "when a client fails", ON_FAILURE)
    min_clients: int = key(1, "on-failure proceed: fewest clients whose updates make a round", at_least(1))
    retries: int = key(2, "on-failure retry: how often a client is asked again", at_least(0))
    timeout_seconds: float = key(3600.0, "how long a client's answer may take; 0: for ever", at_least(0))
    wait_seconds: float = key(600.0, "how long to wait until every client has a node", at_least(0))
    window: int = key(0, "messages under way between the oldest unanswered and the newest; 0: by size", at_least(0))
    lr: float = key(0.0, "server learning rate; 0: the strategy's own (fedavgm 1, fedadam 0.1)", at_least(0))
    momentum: float = key(0.9, "server momentum of fedavgm", within(0, 1))
    trim: float = key(0.2, "fedtrimmedavg: share cut off at each end", within(0, 0.5))
    num_malicious: int = key(0, "krum: clients that may lie", at_least(0))
    noise_multiplier: float = key(1.0, "dp-fedavg: noise over clipping-norm (no ε is accounted)", at_least(0))
    clipping_norm: float = key(1.0, "dp-fedavg: bound on the norm of a client's update", above(0))


@dataclass(frozen=True)
class SimulationConfig:
    clients_per_node: int = key(1, "clients that one simulated Flower node holds", at_least(1))
    num_actors: int = key(0, "Ray actors; 0: as many as fit", at_least(0))
    num_cpus: float = key(1.0, "CPU cores per actor", at_least(0))
    num_gpus: float = key(
        0.0, "GPUs per actor; a fraction lets several share one; 0: a share where engine.device is cuda", at_least(0)
    )
    ray_address: str = key("", "a Ray cluster to join; empty: start Ray here")
    retries: int = key(2, "how often a message is tried again after its actor died", at_least(0))
    on_link_failure: str = key("stop", "d-sgd-m with engine.workers: when rows do not arrive", ON_LINK_FAILURE)
    straggler_seconds: float = key(
        0.0, "an actor that works longer on a message (60 s on its first) is replaced; 0: never", at_least(0)
    )
    show_output: bool = key(False, "backend simulation: print what the nodes' clients print and log")


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    run: RunConfig = field(default_factory=RunConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)


class Key(NamedTuple):
    """What is known of one `section.key`."""

    section: str
    name: str  # snake_case
    type: type[Any]
    default: Scalar
    doc: str
    check: Check | None
    choices: tuple[str, ...]  # the names it may take, if it takes names
    also: str  # other forms of a name
    holds: str  # what separates the parts of a list in it: "", "," or ";"


def _kebab(name: str) -> str:
    return name.replace("_", "-")


SECTIONS: dict[str, type[Any]] = {f.name: typing.cast(type[Any], f.type) for f in dataclasses.fields(Config)}
KEYS: dict[str, Key] = {
    f"{section}.{_kebab(f.name)}": Key(
        section, f.name, typing.cast(type[Any], f.type), typing.cast(Scalar, f.default), **f.metadata
    )
    for section, cls in SECTIONS.items()
    for f in dataclasses.fields(cls)
}


def flat(config: Config) -> dict[str, Scalar]:
    """{"section.key": value} for every key, in the order of the dataclasses."""
    return {name: getattr(getattr(config, k.section), k.name) for name, k in KEYS.items()}


def replace(config: Config, section: str, **values: Scalar) -> Config:
    """`config` with other (right) values in one section."""
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})


def _not_a_key(name: str) -> InputError:
    section, _, rest = name.partition(".")
    if section not in SECTIONS:
        full = [known for known in KEYS if known.endswith("." + _kebab(name))]
        if full:
            return InputError(f"{name} is not a key: did you mean {' or '.join(full)}?")
        return unknown("section", section, SECTIONS)
    if _kebab(name) in KEYS:
        return InputError(f"{name} is not a key: did you mean {_kebab(name)}?")
    near = difflib.get_close_matches(_kebab(rest), dict.fromkeys(k.partition(".")[2] for k in KEYS), n=3)
    right = [k for tail in near for k in KEYS if k.partition(".")[2] == tail]
    hint = f"did you mean {' or '.join(right)}?" if right else "`fedmom keys` lists them all"
    return InputError(f"{name} is not a key: {hint}")


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes out no whole number of more than 4,300 digits
        return "(thousands of digits)"


def _plain(value: Any, kind: type[Any], holds: str = "") -> Any:
    """What a caller from Python may pass as well: numpy's numbers, paths, whole numbers for floats, lists."""
    value = value.item() if isinstance(value, np.generic) else value
    value = as_list(value, holds) if holds else value
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 2**1000 else math.inf * (1 if value > 0 else -1)
    return value


def _checked(name: str, value: Any) -> Scalar:
    """`value` as the key's type, or the InputError that names the key, the value and what would be right."""
    if name not in KEYS:
        raise _not_a_key(name)
    known = KEYS[name]
    value = _plain(value, known.type, known.holds)
    if type(value) is not known.type:
        want = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[known.type]
        raise InputError(f"{name} = {_shown(value)}: must be {want}")
    if known.type is int and value > LARGEST:
        raise InputError(f"{name} = {_shown(value)}: must be at most {LARGEST}")
    if known.type is str and not value.isascii() and value.encode(errors="ignore").decode() != value:
        raise InputError(f"{name} = {value!r}: must be valid Unicode")
    if known.choices and value not in known.choices:
        if not known.also:
            raise unknown(name, value, known.choices)
        files = tuple(word.removeprefix("FILE") for word in known.also.split() if word.startswith("FILE."))
        if not ("module:function" in known.also and is_spec(value)) and not (files and value.endswith(files)):
            raise unknown(name, value, [*known.choices, known.also])
    if known.check and (wrong := known.check(value)):
        raise InputError(f"{name} = {_shown(value)}: {wrong}")
    return value


def as_held(name: str, value: Any) -> Any:
    """The value as the configuration would hold it: 1 is an lr of 1.0. A wrong one as it is."""
    try:
        return _checked(name, value)
    except InputError:
        return repr(value)


def _build(values: Mapping[str, Any], base: Config) -> Config:
    """`base` with `values` in place of some of its keys; each is checked by itself."""
    for name, value in values.items():
        checked = _checked(name, value)
        base = replace(base, KEYS[name].section, **{KEYS[name].name: checked})
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
        values.update({f"{name}.{_kebab(k)}": v for k, v in value.items()} if nested else {name: value})
    return values


def read_tables(path: Path, remedy: str = "") -> dict[str, Any]:
    """The tables of a TOML file, with a byte order mark or without. InputError names the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a text file ({error})") from None
    try:
        return read_toml(text)
    except ValueError as error:
        raise InputError(f"{path}: is not TOML: {error}") from None


def _read_config(path: Path) -> dict[str, Any]:
    """{"section.key": value} of one file, unchecked."""
    tables = read_tables(path, "; configs/ holds complete examples")
    if not tables:
        raise InputError(f"{path}: is empty; a config has sections {', '.join(SECTIONS)}")
    values: dict[str, Any] = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            raise InputError(f"{path}: {unknown('section', section, SECTIONS)}")
        if not isinstance(table, dict):
            raise InputError(f"{path}: {section} = {_shown(table)}: must be a section, [{section}]")
        values.update({f"{section}.{name}": value for name, value in table.items()})
    return values


class Loaded(NamedTuple):
    """A configuration as given, and which of its keys somebody wrote (the others are defaults)."""

    config: Config
    given: frozenset[str]


def load(source: str | Path | Mapping[str, Any] | Config, sets: Iterable[str] | Mapping[str, Any] = ()) -> Loaded:
    """Read a configuration from a TOML file, a (nested or flat) mapping or a Config, with changes on top.

    Raises InputError with one line that names the file or key, the value and what would be right.
    """
    where = ""
    if isinstance(source, Config):
        values = {name: value for name, value in flat(source).items() if value != KEYS[name].default}
    elif isinstance(source, Mapping):
        values = _flattened(source)
    else:
        where = f"{source}: "
        values = _read_config(Path(source))
    changes = parse_sets(sets)
    try:
        config = _build(values, Config())
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    return Loaded(_build(changes, config), frozenset(values) | frozenset(changes))


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
