"""The keys as a JSON schema: what editors complete TOML by, and what `fedmom keys` reads without loading torch.

schema.json is generated from KEYS by `python -m fedmom.config.schema`; a test keeps the two equal. It is draft 7, which
the TOML language servers of today understand, with their `x-taplo` for the meanings of single values.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("schema.json")
# The ten to know first, in the order of a first configuration.
FIRST = (
    "data.dataset",
    "data.num-clients",
    "data.partition",
    "data.alpha",
    "data.batch-size",
    "model.name",
    "algorithm.num-local-steps",
    "algorithm.lr",
    "algorithm.momentum-policy",
    "run.num-rounds",
)
# Where the rule below finds none: another value than the default that somebody may well want.
EXAMPLES: dict[str, Any] = {
    "data.dataset": "fashion-mnist",
    "data.data-dir": "/data/images",
    "data.classes": "cat,dog",
    "data.clients": "writer",
    "data.alpha": 0.1,
    "data.task": "regression",
    "data.context": 256,
    "data.columns": "image,label",
    "data.client-test-share": 0.2,
    "data.curvatures": "1,2;3,4",
    "data.centers": "0,1;2,3",
    "data.start": "1,1",
    "data.noise-sigma": 0.5,
    "model.name": "resnet20",
    "model.lora-rank": 4,
    "model.start": "runs/base/final.safetensors",
    "model.loss": "huber",
    "model.label-smoothing": 0.1,
    "model.class-weights": "1,5",
    "algorithm.num-local-steps": 8,
    "algorithm.local-epochs": 1,
    "algorithm.beta": 0.95,
    "algorithm.beta2": 0.99,
    "algorithm.states": "x: average every 1; u: average every 4",
    "algorithm.outer-lr": 0.7,
    "algorithm.outer-momentum": 0.5,
    "algorithm.outer-beta2": 0.999,
    "algorithm.outer-states": "x,m",
    "algorithm.lr": 0.1,
    "algorithm.lr-milestones": "80,120",
    "algorithm.lr-decay": 0.2,
    "algorithm.lr-warmup": 0.05,
    "algorithm.lr-min": 0.001,
    "algorithm.weight-decay": 0.0001,
    "algorithm.momentum-policy": "reset",
    "algorithm.codecs": "x: int8; u: topk 0.1",
    "algorithm.codecs-down": "x: int8",
    "algorithm.correction": "mine:proximal",
    "algorithm.prox-mu": 0.1,
    "algorithm.fedcm-alpha": 0.2,
    "algorithm.personal": "norm",
    "algorithm.cohort-size": 10,
    "algorithm.slow-momentum": 0.5,
    "algorithm.slow-lr": 0.7,
    "algorithm.fragments": 4,
    "algorithm.interval-milestones": "0.25,0.5,0.75",
    "algorithm.topology": "ring",
    "algorithm.topology-p": 0.2,
    "run.num-steps": 10000,
    "run.seed": 1,
    "run.stop-at": "accuracy=0.9",
    "run.patience": 10,
    "run.min-delta": 0.001,
    "run.monitor": "test_loss",
    "run.metrics": "accuracy,f1",
    "run.eval-clients": 0,
    "run.client-eval-every": 10,
    "run.personal-steps": 5,
    "run.out": "runs/mine",
    "run.resume": "runs/mine",
    "run.dtype": "float64",
    "engine.device": "cuda",
    "engine.chunk-size": 16,
    "engine.threads": 4,
    "engine.workers": 2,
    "server.on-failure": "proceed",
    "server.timeout-seconds": 600.0,
    "server.wait-seconds": 60.0,
    "server.window": 8,
    "server.own-rows": "nodes",
    "server.lr": 0.5,
    "server.momentum": 0.5,
    "server.trim": 0.1,
    "server.num-malicious": 1,
    "simulation.clients-per-node": 10,
    "simulation.num-actors": 4,
    "simulation.num-cpus": 0.5,
    "simulation.num-gpus": 0.25,
    "simulation.ray-address": "10.0.0.5:6379",
    "simulation.straggler-seconds": 120.0,
}
_TYPES = {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}
_SECTIONS = {
    "data": "What the clients learn from.",
    "model": "What is trained.",
    "algorithm": "What clients and server compute.",
    "run": "How long, from which seed, and what is kept.",
    "engine": "How one machine computes it.",
    "server": "How a Flower server behaves.",
    "simulation": "Ray actors: for run.backend = 'simulation' and engine.workers.",
}


class About(NamedTuple):
    """What the schema says of one key."""

    section: str
    name: str  # "section.key"
    kind: str  # "integer", "number", "string" or "boolean"
    default: Any
    doc: str
    choices: dict[str, str]  # {name: what it means}, where it takes names
    also: str  # other forms of a name
    range: str  # "> 0", "in [0, 1)"; empty for all
    example: Any
    first: bool  # one of the ten to know first


def read_schema() -> dict[str, Any]:
    """The schema of a configuration, as the package ships it."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def read_keys() -> dict[str, About]:
    """{"section.key": what is known of it}, in the order of the sections, from schema.json alone."""
    found = {}
    for section, table in read_schema()["properties"].items():
        for key, entry in table["properties"].items():
            name = f"{section}.{key}"
            extra = entry["x-fedmom"]
            found[name] = About(
                section, name, extra["kind"], entry["default"], extra["doc"], extra["choices"], extra["also"],
                extra["range"], entry["examples"][0], extra["first"],
            )  # fmt: skip
    return found


def make_schema() -> dict[str, Any]:
    """The schema of a configuration, from KEYS."""
    from fedmom.config.keys import KEYS, SECTIONS

    sections: dict[str, Any] = {}
    for section in SECTIONS:
        of_section = {name: key for name, key in KEYS.items() if key.section == section}
        sections[section] = {
            "type": "object",
            "description": _SECTIONS[section],
            "additionalProperties": False,
            "properties": {name.partition(".")[2]: _entry(name, key) for name, key in of_section.items()},
        }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A configuration of fedmom",
        "type": "object",
        "additionalProperties": False,
        "properties": sections,
    }


def _entry(name: str, key: Any) -> dict[str, Any]:
    """One key: its type and default, and what it may be."""
    kind, names = _TYPES[key.type.__name__], dict(key.choices)
    entry: dict[str, Any] = {
        "type": kind,
        "default": key.default,
        "description": key.doc,
        "examples": [_example(name, key)],
    }
    if key.holds:
        entry["type"] = [kind, "array"]
    if names:
        entry["description"] += "\n\n" + "\n".join(f"- {' : '.join(filter(None, pair))}" for pair in names.items())
        if key.also:
            entry["description"] += f"\n- or {key.also}"
            entry["anyOf"] = [{"enum": [*names]}, {"pattern": _pattern(key.also)}]
        else:
            entry["enum"] = [*names]
            entry["x-taplo"] = {"docs": {"enumValues": [meaning or None for meaning in names.values()]}}
    if key.check:
        low, high = key.check.low, key.check.high
        entry["minimum" if key.check.with_low else "exclusiveMinimum"] = low
        if high != float("inf"):
            entry["maximum" if key.check.with_high else "exclusiveMaximum"] = high
    entry["x-fedmom"] = {
        "doc": key.doc,
        "kind": kind,
        "choices": names,
        "also": key.also,
        "range": str(key.check or "").removeprefix("a number "),
        "first": name in FIRST,
    }
    return entry


def _pattern(also: str) -> str:
    """What other forms of a name look like: module:function, a file's ending, or a folder's slash."""
    endings = [word.strip(",").removeprefix("FILE.") for word in also.split() if word.startswith("FILE.")]
    ways = [rf"\.({'|'.join(endings)})$"] if endings else []
    ways += ["/", "^hf:"] if "FOLDER/" in also else []
    return "|".join([*ways, *([r"^[^:]+:[^:]+$"] if "module:function" in also else [])])


def _example(name: str, key: Any) -> Any:
    """Another value than the default."""
    if name in EXAMPLES:
        return EXAMPLES[name]
    if key.type is bool:
        return not key.default
    if key.choices:
        return next(choice for choice in key.choices if choice != key.default)
    return key.default * 2


def as_json(schema: Mapping[str, Any]) -> str:
    """The text of schema.json."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(as_json(make_schema()), encoding="utf-8")
    print(FILE)
