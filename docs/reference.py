"""The generated pages of docs/reference/: `python docs/reference.py` writes them, and a test holds them equal.

keys.md has every key of a configuration, out of KEYS and the tables that the keys choose from; commands.md has every
command and its options, out of the command line itself.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import typer.main

from fedmom.cli.main import app
from fedmom.config import keys
from fedmom.config.keys import KEYS, SECTIONS, Key, kebab
from fedmom.config.load import toml_scalar
from fedmom.config.strategies import STRATEGIES
from fedmom.data.batches import AUGMENTATIONS, SAMPLINGS
from fedmom.data.datasets import DATASETS
from fedmom.data.partition import PARTITIONS
from fedmom.engine.paths import PATHS
from fedmom.method.algorithms import ALGORITHMS, INTERVALS, MOMENTUM_POLICIES
from fedmom.method.graphs import TOPOLOGIES, WEIGHTS
from fedmom.method.schedules import SCHEDULES, UNITS
from fedmom.tasks.models import MODELS
from fedmom.tasks.task import TASKS

HERE = Path(__file__).resolve().parent / "reference"
# What the values of a key mean.
VALUES: dict[str, Mapping[str, Any]] = {
    "data.dataset": DATASETS | TASKS,
    "data.partition": PARTITIONS,
    "data.quantity-law": {
        "log-normal": "sizes proportional to exp(data.sigma · z), z standard normal",
        "dirichlet": "sizes proportional to a draw of Dir(data.alpha)",
    },
    "data.sampling": SAMPLINGS,
    "data.augment": AUGMENTATIONS,
    "model.name": MODELS,
    "model.norm": {"batch": "BatchNorm", "group": "GroupNorm"},
    "algorithm.name": ALGORITHMS,
    "algorithm.interval": INTERVALS,
    "algorithm.lr-schedule": SCHEDULES,
    "algorithm.lr-unit": UNITS,
    "algorithm.momentum-policy": MOMENTUM_POLICIES,
    "algorithm.correction": {"none": "the gradient is used as it is"},
    "algorithm.client-weights": {
        "uniform": "1/N for every client (the paper)",
        "samples": "in proportion to the client's number of training examples",
    },
    "algorithm.running-var": {
        "pooled": "the variance of all clients' activations together",
        "mean": "the weighted mean of the clients' variances",
    },
    "algorithm.topology": TOPOLOGIES,
    "algorithm.mixing-weights": WEIGHTS,
    "run.backend": keys.BACKENDS,
    "run.dtype": keys.DTYPES,
    "engine.device": {
        "auto": "a CUDA GPU where there is one, else the CPU",
        "cpu": "the CPU",
        "cuda": "the CUDA GPU",
    },
    "engine.path": {"auto": "the fastest that agrees with plain torch, by timing"} | PATHS,
    "engine.matmul": keys.MATMULS,
    "server.strategy": STRATEGIES,
    "server.on-failure": keys.ON_FAILURE,
    "simulation.on-link-failure": keys.ON_LINK_FAILURE,
}
ABOUT = {
    "data": "The data set, the clients, and who holds which examples.",
    "model": "The model that all clients train.",
    "algorithm": "The method, its step sizes, what happens to the momentum, and who exchanges with whom.",
    "run": "How long a run is, what it records, and where.",
    "engine": "The device, and how clients run side by side on it.",
    "server": "Flower's server: the strategy, and what follows when a client fails.",
    "simulation": "Ray actors, for the backend simulation and for engine.workers.",
}
# An example for keys whose value is no name out of a table: a value that is not the default.
EXAMPLES: dict[str, Any] = {
    "data.dataset": "mine:data",
    "data.data-dir": "/srv/data",
    "data.classes": "cat,dog",
    "data.num-clients": 100,
    "data.alpha": 0.1,
    "data.min-size": 10,
    "data.shards-per-client": 4,
    "data.sigma": 0.5,
    "data.batch-size": 64,
    "data.curvatures": "0.5;2;1",
    "data.centers": "-1;3;0",
    "data.start": "1",
    "data.noise-sigma": 1.0,
    "model.name": "mine:model",
    "model.hidden": 100,
    "algorithm.num-local-steps": 8,
    "algorithm.local-epochs": 1,
    "algorithm.beta": 0.5,
    "algorithm.lr": 0.1,
    "algorithm.lr-milestones": "0.5,0.8",
    "algorithm.lr-decay": 0.5,
    "algorithm.lr-warmup": 0.05,
    "algorithm.lr-min": 0.001,
    "algorithm.weight-decay": 0.0001,
    "algorithm.correction": "fedprox:correction",
    "algorithm.cohort-size": 10,
    "algorithm.slow-momentum": 0.5,
    "algorithm.slow-lr": 0.7,
    "algorithm.topology-degree": 3,
    "algorithm.topology-p": 0.3,
    "run.num-rounds": 200,
    "run.num-steps": 640,
    "run.seed": 1,
    "run.eval-every": 10,
    "run.eval-clients": 8,
    "run.checkpoint-every": 50,
    "run.out": "runs/first",
    "run.resume": "runs/first",
    "engine.chunk-size": 50,
    "engine.threads": 2,
    "engine.workers": 2,
    "server.min-clients": 8,
    "server.retries": 5,
    "server.timeout-seconds": 600.0,
    "server.wait-seconds": 60.0,
    "server.window": 16,
    "server.lr": 0.01,
    "server.momentum": 0.5,
    "server.trim": 0.1,
    "server.num-malicious": 2,
    "server.noise-multiplier": 0.5,
    "server.clipping-norm": 10.0,
    "simulation.clients-per-node": 50,
    "simulation.num-actors": 4,
    "simulation.num-cpus": 0.5,
    "simulation.num-gpus": 0.25,
    "simulation.ray-address": "head:6379",
    "simulation.retries": 0,
    "simulation.straggler-seconds": 120.0,
}
KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "`true` or `false`"}


def keys_page() -> str:
    """Every key under its section."""
    lines = [
        "# Every key of a configuration",
        "",
        "A configuration is a TOML file of seven sections.",
        "Every key has a default, so a file holds only what differs from it.",
        "`--set section.key=value` changes a key on the command line; `fedmom keys WORD` finds keys in the terminal.",
        "This page is generated from the code.",
    ]
    for section in SECTIONS:
        lines += ["", f"## [{section}]", "", ABOUT[section]]
        for name, key in KEYS.items():
            if key.section == section:
                lines += ["", f"### {name}", "", *_about_key(name, key)]
    return "\n".join(lines) + "\n"


def _about_key(name: str, key: Key) -> Iterator[str]:
    doc = (
        key.doc
        if key.doc.startswith(("d-sgd-m", "pr-sgd-m", "dp-fedavg", "fedtrimmedavg", "krum"))
        else _upper(key.doc)
    )
    yield f"{doc}."
    yield ""
    yield f"* Default: `{toml_scalar(key.default)}`"
    if not key.choices:
        yield f"* Type: {_type(key)}"
    else:
        yield "* Values:"
        for value in key.choices:
            summary = VALUES[name][value]
            summary = summary if isinstance(summary, str) else _summary(summary)
            yield f"    * `{value}`: {summary}"
        if key.also:
            yield f"    * or {key.also}"
    example = toml_scalar(_example(name, key))
    yield f"* Example: `{kebab(key.name)} = {example}` under `[{key.section}]`"


def _summary(entry: Any) -> str:
    """What a row of a table says of itself; of a function, its docstring's first line."""
    return str(getattr(entry, "summary", "") or (inspect.getdoc(entry) or "").split("\n")[0].rstrip("."))


def _example(name: str, key: Key) -> Any:
    if name in EXAMPLES:
        return EXAMPLES[name]
    return not key.default if key.type is bool else next(value for value in key.choices if value != key.default)


def _type(key: Key) -> str:
    """The kind, and what the key's check asks for: "not a number" is in no range, so it makes the check say which."""
    wrong = (key.check(math.nan) or "") if key.check else ""
    bound = wrong.removeprefix("must be ").removeprefix("a number ").replace(">=", "≥")
    return f"{KINDS[key.type]}, {bound}" if bound else KINDS[key.type]


def _upper(text: str) -> str:
    return text[0].upper() + text[1:] if text[0].isascii() and text[1:2] not in ",:" else text


def commands_page() -> str:
    """Every command with its help, its arguments and its options."""
    lines = [
        "# Every command",
        "",
        "`fedmom COMMAND --help` prints the same in the terminal.",
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
        yield from ("", "| | | default |", "|---|---|---|")
        for name, argument in zip(names, arguments, strict=True):
            yield f"| {_cell(name)} | {getattr(argument, 'help', None) or ''} | |"
        for option in options:
            yield f"| {_cell(_option(option))} | {_escaped(option.help or '')} | {_default(option)} |"


def _option(option: click.Option) -> str:
    name = " / ".join([*option.opts, *option.secondary_opts])
    if option.is_flag:
        return name
    return f"{name} {option.metavar or {'integer range': 'N', 'float range': 'X'}.get(option.type.name, 'TEXT')}"


def _default(option: click.Option) -> str:
    unset = option.default in (None, "", (), []) or option.is_flag or option.multiple
    return "" if unset else _cell(str(option.default))


def _cell(text: str) -> str:
    return f"`{_escaped(text)}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


PAGES = {"keys.md": keys_page, "commands.md": commands_page}

if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
        print(HERE / name)
