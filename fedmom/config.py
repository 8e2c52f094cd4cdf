"""A run's configuration: frozen dataclasses <-> TOML <-> flat `section.key` scalars, and all of its validation.

TOML keys are kebab-case, Python names snake_case, and only this file translates. `load` reads and checks one
key at a time; `resolve` settles what several keys or the algorithm's name decide together, so that the
configuration in a run folder says exactly what ran.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedmom.algorithms import ALGORITHMS, INTERVALS, MOMENTUM_POLICIES, theory_interval
from fedmom.batches import AUGMENTATIONS, SAMPLINGS
from fedmom.datasets import DATASETS
from fedmom.errors import InputError, unknown
from fedmom.imports import is_spec
from fedmom.models import MODELS, NORMS
from fedmom.parsing import parse_numbers, parse_table
from fedmom.partition import PARTITIONS, QUANTITY_LAWS
from fedmom.schedules import SCHEDULES, UNITS, LearningRate

Scalar = str | bool | int | float
Check = Callable[[Any], str | None]  # value -> what would be right, or None where it is


def above(low: float) -> Check:
    return lambda value: None if value > low and math.isfinite(value) else f"must be a number > {low:g}"


def at_least(low: float) -> Check:
    return lambda value: None if value >= low and math.isfinite(value) else f"must be >= {low:g}"


def within(low: float, high: float) -> Check:
    return lambda value: None if low <= value < high else f"must be in [{low:g}, {high:g})"


def key(default: Scalar, doc: str, check: Check | Collection[str] | None = None, also: str = "") -> Any:
    """One key: its default, one line on it, and either a check or the names it may take (`also`: other forms)."""
    return field(default=default, metadata={"doc": doc, "check": check, "also": also})


@dataclass(frozen=True)
class DataConfig:
    dataset: str = key("digits", "see `fedmom datasets`", [*DATASETS, "quadratic"], "FILE.npz or module:function")
    data_dir: str = key("data", "folder (or .npz file) that holds the data set")
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
    curvatures: str = key("1;3", "quadratic: h_ik, clients by ; and coordinates by ,")
    centers: str = key("4;-2", "quadratic: c_ik, in the same form")
    start: str = key("0", "quadratic: x at the start, coordinates by ,")
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
    local_epochs: int = key(0, "passes over its own data per round, instead of I; 0: off", at_least(0))
    interval: str = key("fixed", "where I comes from", INTERVALS)
    beta: float = key(0.9, "β, momentum coefficient", within(0, 1))
    lr: float = key(0.05, "γ, learning rate (c for lr-schedule theory)", above(0))
    lr_schedule: str = key("constant", "how γ changes over the run", SCHEDULES)
    lr_milestones: str = key("0.5,0.75", "where schedule step decays, in lr-unit")
    lr_decay: float = key(0.1, "factor at each milestone", above(0))
    lr_unit: str = key("fraction", "unit of lr-milestones and lr-warmup", UNITS)
    lr_warmup: float = key(0.0, "length of the linear warm-up, in lr-unit", at_least(0))
    lr_min: float = key(0.0, "where schedule cosine ends", at_least(0))
    weight_decay: float = key(0.0, "λ, L2 penalty inside the gradient", at_least(0))
    momentum_policy: str = key("average", "what happens to u between rounds", MOMENTUM_POLICIES)
    client_weights: str = key("uniform", "weights of the averages of x and u", ["uniform", "samples"])
    running_var: str = key("pooled", "how BatchNorm variances are averaged", ["pooled", "mean"])
    cohort_size: int = key(0, "clients drawn per round; 0: all", at_least(0))


@dataclass(frozen=True)
class RunConfig:
    num_rounds: int = key(100, "R; run.num-steps overrules it", at_least(1))
    num_steps: int = key(0, "T, local steps in all, rounded up to whole rounds; 0: num-rounds × I", at_least(0))
    seed: int = key(0, "of data split, model, batches, cohorts", within(0, 2**31))
    eval_every: int = key(1, "rounds between two evaluations (the last round always is)", at_least(1))
    checkpoint_every: int = key(10, "rounds between two checkpoints", at_least(1))
    backend: str = key("engine", "who runs the clients", ["engine"])
    dtype: str = key("auto", "of x and u (auto: float64 for quadratic)", ["auto", "float32", "float64"])


@dataclass(frozen=True)
class EngineConfig:
    device: str = key("auto", "where tensors live", ["auto", "cpu", "cuda"])
    path: str = key("auto", "clients stacked (vmap) or one after another", ["auto", "vmap", "loop"])
    chunk_size: int = key(0, "K, clients stacked at once; 0: by memory", at_least(0))
    threads: int = key(0, "CPU threads; 0: torch's choice", at_least(0))


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    run: RunConfig = field(default_factory=RunConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


class Key(NamedTuple):
    """What is known of one `section.key`."""

    section: str
    name: str  # snake_case
    type: type
    default: Scalar
    doc: str
    check: Check | Collection[str] | None
    also: str


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _all_keys() -> dict[str, Key]:
    keys = {}
    for section in dataclasses.fields(Config):
        cls = typing.cast(type, section.type)
        for f in dataclasses.fields(cls):
            kind = typing.cast(type, f.type)
            keys[f"{section.name}.{_kebab(f.name)}"] = Key(
                section.name, f.name, kind, f.default, f.metadata["doc"], f.metadata["check"], f.metadata["also"]
            )
    return keys


KEYS = _all_keys()  # "section.key" -> Key


def flat(config: Config) -> dict[str, Scalar]:
    """{"section.key": value} for every key, in the order of the dataclasses."""
    return {name: getattr(getattr(config, k.section), k.name) for name, k in KEYS.items()}


def _checked(name: str, value: Any) -> Scalar:
    """`value` as the key's type, or the InputError that names the key, the value and what would be right."""
    if name not in KEYS:
        section, _, rest = name.partition(".")
        sections = [f.name for f in dataclasses.fields(Config)]
        if section not in sections:
            raise unknown("section", section, sections)
        near = difflib.get_close_matches(rest, [k.partition(".")[2] for k in KEYS], n=3)
        right = [k for k in KEYS if k.partition(".")[2] in near]
        hint = f"did you mean {' or '.join(right)}?" if right else "`fedmom keys` lists them all"
        raise InputError(f"{name} is not a key: {hint}")
    known = KEYS[name]
    if known.type is float and type(value) is int:
        value = float(value)
    if type(value) is not known.type:
        want = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[known.type]
        raise InputError(f"{name} = {value!r}: must be {want}")
    check = known.check
    if isinstance(check, Collection):
        own_form = known.also and (is_spec(value) or value.endswith(".npz"))
        if value not in check and not own_form:
            raise unknown(name, value, [*check, *([known.also] if known.also else [])])
    elif check is not None and (wrong := check(value)):
        raise InputError(f"{name} = {value!r}: {wrong}")
    return value


def _build(values: Mapping[str, Any], base: Config) -> Config:
    """`base` with `values` in place of some of its keys; each is checked by itself."""
    given: dict[str, dict[str, Scalar]] = {}
    for name, value in values.items():
        checked = _checked(name, value)
        given.setdefault(KEYS[name].section, {})[KEYS[name].name] = checked
    parts = {section: dataclasses.replace(getattr(base, section), **keys) for section, keys in given.items()}
    return dataclasses.replace(base, **parts)


def parse_set(text: str) -> tuple[str, Any]:
    """`section.key=value` from the command line; the value in TOML, or bare for a string."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals:
        raise InputError(f"--set {text!r}: must read section.key=value")
    if name in KEYS and KEYS[name].type is str and not value.startswith(('"', "'")):
        return name, value
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def _read_toml(path: Path) -> dict[str, Any]:
    """{"section.key": value} of one file, unchecked."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; configs/ holds complete examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a text file ({error})") from None
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is not TOML: {error}") from None
    if not tables:
        raise InputError(f"{path}: is empty; a config has sections {', '.join(_sections())}")
    values: dict[str, Any] = {}
    for section, table in tables.items():
        if section not in _sections():
            raise InputError(f"{path}: {unknown('section', section, _sections())}")
        if not isinstance(table, dict):
            raise InputError(f"{path}: {section} = {table!r}: must be a section, [{section}]")
        values.update({f"{section}.{name}": value for name, value in table.items()})
    return values


def _sections() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


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
        values = {}
        for name, value in source.items():
            nested = isinstance(value, Mapping)
            values.update({f"{name}.{_kebab(k)}": v for k, v in value.items()} if nested else {name: value})
    else:
        where = f"{source}: "
        values = _read_toml(Path(source))
    changes = dict(sets) if isinstance(sets, Mapping) else dict(parse_set(text) for text in sets)
    try:
        config = _build(values, Config())
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    return Loaded(_build(changes, config), frozenset(values) | frozenset(changes))


class Resolved(NamedTuple):
    """A configuration in which nothing is left open but the engine's own choices, and what was overruled."""

    config: Config
    notes: tuple[str, ...]


def resolve(loaded: Loaded) -> Resolved:
    """Settle what keys decide together: baselines, I, T, N, the cohort, the dtype.

    Resolving a resolved configuration changes nothing. Raises InputError naming the keys that disagree.
    """
    config, given = loaded
    notes: list[str] = []
    config = _resolve_data(config, given)
    config = _resolve_algorithm(config, given, notes)
    _check_together(config)
    return Resolved(config, tuple(notes))


def _replace(config: Config, section: str, **values: Scalar) -> Config:
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})


def _resolve_data(config: Config, given: frozenset[str]) -> Config:
    data = config.data
    quadratic = data.dataset == "quadratic"
    if quadratic:
        curvatures = parse_table("data.curvatures", data.curvatures)
        centers = parse_table("data.centers", data.centers)
        if len(curvatures) != len(centers):
            raise InputError(
                f"data.centers = {data.centers!r}: has {len(centers)} clients, data.curvatures {len(curvatures)}"
            )
        if "data.num-clients" in given and data.num_clients != len(curvatures):
            raise InputError(
                f"data.num-clients = {data.num_clients}: data.curvatures = {data.curvatures!r} has "
                f"{len(curvatures)} clients, separated by ;"
            )
        widths = {len(row) for row in (*curvatures, *centers, parse_numbers("data.start", data.start))}
        if len(widths) > 1:
            raise InputError(
                "data.curvatures, data.centers, data.start: every client and the start need the same number of "
                f"coordinates, got {sorted(widths)}"
            )
        config = _replace(config, "data", num_clients=len(curvatures), batch_size=1, augment="none")
    if config.run.dtype == "auto":
        config = _replace(config, "run", dtype="float64" if quadratic else "float32")
    return config


def _resolve_algorithm(config: Config, given: frozenset[str], notes: list[str]) -> Config:
    algorithm, run, num_clients = config.algorithm, config.run, config.data.num_clients
    cohort = algorithm.cohort_size or num_clients
    if cohort > num_clients:
        raise InputError(f"algorithm.cohort-size = {cohort}: must be at most data.num-clients = {num_clients} (0: all)")
    fixed = ALGORITHMS[algorithm.name]
    interval, steps, beta = algorithm.interval, algorithm.num_local_steps, algorithm.beta
    epochs = algorithm.local_epochs
    if fixed.interval is not None:
        said = [f"{k} = {v}" for k, v in [("num-local-steps", steps), ("local-epochs", epochs)] if v]
        said = [s for s in said if s != f"num-local-steps = {fixed.interval}"]
        said += [f'interval = "{interval}"'] if interval != "fixed" else []
        if said:
            notes.append(f"{algorithm.name} is I = {fixed.interval}: it overrules {', '.join(said)}")
        interval, steps, epochs = "fixed", fixed.interval, 0
    if fixed.beta is not None and beta != fixed.beta:
        if "algorithm.beta" in given:
            notes.append(f"{algorithm.name} is β = {fixed.beta:g}: it overrules beta = {beta:g}")
        beta = fixed.beta
    if epochs:
        if steps:
            raise InputError(f"algorithm.local-epochs = {epochs}: give it or num-local-steps = {steps}, not both")
        if interval != "fixed":
            raise InputError(f"algorithm.interval = {interval!r}: needs num-local-steps, not local-epochs")
        if run.num_steps:
            raise InputError(f"run.num-steps = {run.num_steps}: give run.num-rounds with local-epochs")
    elif interval != "fixed":
        if not run.num_steps:
            raise InputError(f"algorithm.interval = {interval!r}: needs run.num-steps = T, the steps in all")
        wanted = theory_interval(interval, run.num_steps, cohort)
        if steps not in (0, wanted):
            raise InputError(
                f"algorithm.num-local-steps = {steps}: interval = {interval!r} gives I = {wanted} for "
                f"T = {run.num_steps}, N = {cohort}; leave it 0"
            )
        steps = wanted
    elif not steps:
        steps = fixed.default_interval
    config = _replace(
        config,
        "algorithm",
        cohort_size=cohort,
        interval=interval,
        num_local_steps=steps,
        local_epochs=epochs,
        beta=beta,
    )
    if run.num_steps:
        rounds = math.ceil(run.num_steps / steps)
        if "run.num-rounds" in given and run.num_rounds != rounds:
            notes.append(f"run.num-steps = {run.num_steps} gives {rounds} rounds: it overrules num-rounds")
        config = _replace(config, "run", num_rounds=rounds)
    return config


def _check_together(config: Config) -> None:
    algorithm = config.algorithm
    milestones = parse_numbers("algorithm.lr-milestones", algorithm.lr_milestones)
    if list(milestones) != sorted(milestones) or milestones[0] < 0:
        raise InputError(f"algorithm.lr-milestones = {algorithm.lr_milestones!r}: must rise from 0")
    if algorithm.lr_schedule == "step" and algorithm.lr_unit == "fraction" and milestones[-1] > 1:
        raise InputError(
            f"algorithm.lr-milestones = {algorithm.lr_milestones!r}: must be at most 1 in lr-unit = 'fraction' "
            "(or use lr-unit = 'joint-epochs')"
        )
    if algorithm.lr_unit == "fraction" and algorithm.lr_warmup > 1:
        raise InputError(f"algorithm.lr-warmup = {algorithm.lr_warmup}: must be at most 1 in lr-unit = 'fraction'")
    if algorithm.lr_schedule == "theory" and algorithm.local_epochs:
        raise InputError("algorithm.lr-schedule = 'theory': needs num-local-steps, not local-epochs")


def learning_rate(algorithm: AlgorithmConfig) -> LearningRate:
    """The schedule's plain numbers."""
    return LearningRate(
        lr=algorithm.lr,
        schedule=algorithm.lr_schedule,
        milestones=parse_numbers("algorithm.lr-milestones", algorithm.lr_milestones),
        decay=algorithm.lr_decay,
        unit=algorithm.lr_unit,
        warmup=algorithm.lr_warmup,
        minimum=algorithm.lr_min,
    )


def length_keys(config: Config) -> list[str]:
    """The keys because of which lr or I depend on how long the run is; such a run cannot be made longer."""
    algorithm = config.algorithm
    keys = []
    if SCHEDULES[algorithm.lr_schedule].needs_length:
        keys.append("algorithm.lr-schedule")
    uses_unit = algorithm.lr_schedule == "step" or algorithm.lr_warmup > 0
    if algorithm.lr_unit == "fraction" and uses_unit:
        keys.append("algorithm.lr-unit")
    if algorithm.interval != "fixed":
        keys.append("algorithm.interval")
    return keys


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
