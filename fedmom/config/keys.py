"""A run's configuration as frozen dataclasses, the table KEYS of their flat `section.key` scalars, and its validation.

TOML keys are kebab-case, Python names snake_case, and only `kebab` translates. Everything here looks at one key at a
time; load.py reads and writes configurations, and resolve.py settles what several keys decide together.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedmom.config.names import (
    BACKENDS,
    DEVICES,
    DTYPES,
    MATMULS,
    ON_FAILURE,
    ON_LINK_FAILURE,
    OWN_ROWS,
)
from fedmom.config.numbers import Range, above, as_plain, at_least, shown, within
from fedmom.config.sections.algorithm import AlgorithmConfig as AlgorithmConfig
from fedmom.config.sections.key import Scalar as Scalar
from fedmom.config.sections.key import key
from fedmom.config.strategies import STRATEGIES
from fedmom.data.batches import AUGMENTATIONS, SAMPLINGS
from fedmom.data.given.natural import NATURAL
from fedmom.data.partition import PARTITIONS, QUANTITY_LAWS
from fedmom.data.shipped import DATASETS
from fedmom.data.sources.folders import is_folder
from fedmom.engine.paths import AUTO, PATHS
from fedmom.errors import InputError, unknown
from fedmom.tasks.kinds import LOSSES, TASKS
from fedmom.tasks.models import MODELS, NORMS
from fedmom.tasks.problem import DATA_KINDS
from fedmom.user_code import HUB, is_spec

LARGEST = 2**31 - 1  # of any count: a position t·B in a client's stream must fit into 64 bits


@dataclass(frozen=True)
class DataConfig:
    dataset: str = key(
        "digits",
        "data set; `fedmom datasets` lists them",
        DATASETS | DATA_KINDS,
        "FILE.npz, FILE.bin, FOLDER/, hf:NAME or module:function",
    )
    data_dir: str = key("data", "folder or .npz file that holds the data set")
    task: str = key("classification", "what is asked of the model", TASKS, "module:Class")
    columns: str = key("", "hf:NAME: columns of inputs and, last, the target, by commas; empty: by type", holds=",")
    context: int = key(0, "T, tokens of the windows into which a stream is cut; 0: no stream", at_least(0))
    classes: str = key("", "classes in the order of their labels, by commas (image folders, words)", holds=",")
    clients: str = key("", "partition natural: array of the data set with the id of each example's client")
    num_clients: int = key(20, "N, number of clients; partition natural draws N, 0: all", at_least(0))
    partition: str = key(
        "dirichlet-client",
        "rule that gives the training examples to the clients",
        PARTITIONS | NATURAL,
        "module:function",
    )
    alpha: float = key(0.3, "α of the Dirichlet partitions; the smaller, the more skewed", above(0))
    min_size: int = key(1, "dirichlet-class, quantity: fewest examples of a client", at_least(0))
    shards_per_client: int = key(2, "partition shards: number of shards of each client", at_least(1))
    quantity_law: str = key("log-normal", "partition quantity: law of the sizes", QUANTITY_LAWS)
    sigma: float = key(1.0, "quantity-law log-normal: spread of the sizes", at_least(0))
    batch_size: int = key(32, "B, examples per client and local step", at_least(1))
    client_test_share: float = key(
        0.0, "share of each client's training examples that it holds out as its own test set; 0: none", within(0, 1)
    )
    sampling: str = key("shuffle", "order in which a client draws its examples", SAMPLINGS)
    augment: str = key("auto", "augmentation of training images", AUGMENTATIONS)
    curvatures: str = key("1;3", "quadratic: h_ik, clients by semicolons, coordinates by commas", holds=";")
    centers: str = key("4;-2", "dataset quadratic: c_ik, written as data.curvatures", holds=";")
    start: str = key("0", "dataset quadratic: initial x, coordinates by commas", holds=",")
    noise_sigma: float = key(0.0, "dataset quadratic: standard deviation of the gradient noise", at_least(0))


@dataclass(frozen=True)
class ModelConfig:
    name: str = key("cnn", "model; `fedmom models` lists them", MODELS, "module:function")
    norm: str = key("batch", "resnet20 and resnet56: normalisation layers", NORMS)
    hidden: int = key(200, "mlp: width of its two hidden layers; gpt: width", at_least(1))
    layers: int = key(2, "gpt: number of layers", at_least(1))
    heads: int = key(4, "gpt: number of attention heads, a divisor of model.hidden", at_least(1))
    lora_rank: int = key(0, "rank of trained adapters beside a frozen model's dense layers; 0: off", at_least(0))
    start: str = key("", "FILE.safetensors to begin from, such as a run's final.safetensors; empty: drawn by the seed")
    loss: str = key("auto", "loss of the task", {"auto": "the usual one of data.task"} | LOSSES)
    label_smoothing: float = key(0.0, "cross-entropy: share of the target that all classes have alike", within(0, 1))
    class_weights: str = key("", "cross-entropy: weights of classes 0, 1, …, by commas; empty: all alike", holds=",")


@dataclass(frozen=True)
class RunConfig:
    num_rounds: int = key(100, "R, number of rounds; run.num-steps overrules it", at_least(1))
    num_steps: int = key(0, "T, local steps of one client in all, rounded up to whole rounds; 0: R × I", at_least(0))
    seed: int = key(0, "seed of the partition, initial model, minibatches and cohorts", at_least(0))
    eval_every: int = key(1, "rounds between two evaluations; the last round is always evaluated", at_least(1))
    metrics: str = key("auto", "measures of an evaluation besides the loss, by commas; auto: by data.task", holds=",")
    eval_clients: int = key(64, "d-sgd-m: clients, evenly spaced, whose own models are evaluated; 0: all", at_least(0))
    client_eval_every: int = key(
        0, "rounds between two evaluations on every client's own test examples; 0: none", at_least(0)
    )
    personal_steps: int = key(
        0, "local steps from x̂ after which a client's own evaluation measures its model once more; 0: none", at_least(0)
    )
    stop_at: str = key("", "value at which the run ends, such as accuracy=0.9 or test_loss=0.5")
    patience: int = key(0, "evaluations without progress after which the run ends; 0: off", at_least(0))
    min_delta: float = key(0.0, "what an evaluation must be better by, to be progress", at_least(0))
    monitor: str = key("auto", "measure that patience and keep-best look at; auto: test accuracy, else the loss")
    keep_best: bool = key(False, "write best.safetensors, the model of the best evaluation so far")
    checkpoint_every: int = key(10, "rounds between two checkpoints", at_least(1))
    backend: str = key("engine", "what runs the clients", BACKENDS)
    out: str = key("", "run folder, as --out; empty: runs/NAME-TIME")
    resume: str = key("", "run folder of the run to resume, as --resume")
    dtype: str = key("auto", "number format of x and u", DTYPES)


@dataclass(frozen=True)
class EngineConfig:
    device: str = key("auto", "device of the tensors", DEVICES)
    path: str = key(AUTO, "how clients are computed side by side", {AUTO: "the fastest right one, by timing"} | PATHS)
    chunk_size: int = key(0, "K, clients that are stacked at once; 0: chosen by memory", at_least(0))
    remember: bool = key(True, "keep what auto chose by timing in the cache folder, and reuse it")
    matmul: str = key("float32", "precision of float32 products on a GPU", MATMULS)
    threads: int = key(0, "CPU threads, fewer than 1025; 0: PyTorch's choice", within(0, 1025))
    workers: int = key(0, "Ray actors that share the clients, see [simulation]; 0: none", at_least(0))


@dataclass(frozen=True)
class ServerConfig:
    strategy: str = key("pr-sgd-m", "server strategy under Flower: fedmom's, or one of Flower's own", STRATEGIES)
    on_failure: str = key("stop", "what to do when a client fails", ON_FAILURE)
    min_clients: int = key(1, "on-failure proceed: fewest clients that must answer in a round", at_least(1))
    retries: int = key(2, "on-failure retry: how often a client is asked again", at_least(0))
    timeout_seconds: float = key(3600.0, "longest time for a client's answer, in seconds; 0: no limit", at_least(0))
    wait_seconds: float = key(600.0, "longest wait until every client has a node, in seconds", at_least(0))
    window: int = key(0, "largest number of messages in flight; 0: chosen by their size", at_least(0))
    own_rows: str = key("auto", "who keeps what clients have of their own between rounds", OWN_ROWS)
    lr: float = key(0.0, "fedavgm, fedadam: server learning rate; 0: the strategy's own (1, 0.1)", at_least(0))
    momentum: float = key(0.9, "fedavgm: server momentum", within(0, 1))
    trim: float = key(0.2, "fedtrimmedavg: fraction of the values that is cut off at each end", within(0, 0.5))
    num_malicious: int = key(0, "krum: number of clients that may be malicious", at_least(0))
    noise_multiplier: float = key(1.0, "dp-fedavg: noise over clipping-norm; no ε is accounted", at_least(0))
    clipping_norm: float = key(1.0, "dp-fedavg: largest norm of a client's update", above(0))


@dataclass(frozen=True)
class SimulationConfig:
    clients_per_node: int = key(1, "clients of one simulated Flower node", at_least(1))
    num_actors: int = key(0, "number of Ray actors; 0: as many as fit", at_least(0))
    num_cpus: float = key(1.0, "CPU cores per actor", at_least(0))
    num_gpus: float = key(0.0, "GPUs per actor, or a fraction; 0: a share where engine.device is cuda", at_least(0))
    ray_address: str = key("", "Ray cluster to join; empty: start Ray on this machine")
    retries: int = key(2, "how often a message is sent again after its actor died", at_least(0))
    on_link_failure: str = key("stop", "d-sgd-m, engine.workers: when rows do not arrive", ON_LINK_FAILURE)
    straggler_seconds: float = key(
        0.0, "replace an actor that takes longer (first message: 60 s); 0: never", at_least(0)
    )
    show_output: bool = key(False, "backend simulation: print what the clients print and log")


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
    check: Range | None
    choices: dict[str, str]  # {a name that it may take: what it means}, if it takes names
    also: str  # other forms of a name
    holds: str  # what separates the parts of a list in it: "", "," or ";"


def kebab(name: str) -> str:
    """A Python name as TOML writes it: "num_clients" is "num-clients"."""
    return name.replace("_", "-")


SECTIONS: dict[str, type[Any]] = {f.name: typing.cast(type[Any], f.type) for f in dataclasses.fields(Config)}
KEYS: dict[str, Key] = {
    f"{section}.{kebab(f.name)}": Key(
        section, f.name, typing.cast(type[Any], f.type), typing.cast(Scalar, f.default), **f.metadata
    )
    for section, cls in SECTIONS.items()
    for f in dataclasses.fields(cls)
}


def _not_a_key(name: str) -> InputError:
    section, _, rest = name.partition(".")
    if section not in SECTIONS:
        full = [known for known in KEYS if known.endswith("." + kebab(name))]
        if full:
            return InputError(f"{name} is not a key: did you mean {' or '.join(full)}?")
        return unknown("section", section, SECTIONS)
    if kebab(name) in KEYS:
        return InputError(f"{name} is not a key: did you mean {kebab(name)}?")
    near = difflib.get_close_matches(kebab(rest), dict.fromkeys(k.partition(".")[2] for k in KEYS), n=3)
    right = [k for tail in near for k in KEYS if k.partition(".")[2] == tail]
    hint = f"did you mean {' or '.join(right)}?" if right else "`fedmom keys` lists them all"
    return InputError(f"{name} is not a key: {hint}")


def checked(name: str, value: Any) -> Scalar:
    """`value` as the key's type; raises the InputError that names the key, the value and what would be right."""
    if name not in KEYS:
        raise _not_a_key(name)
    known = KEYS[name]
    value = as_plain(value, known.type, known.holds)
    if type(value) is not known.type:
        want = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[known.type]
        raise InputError(f"{name} = {shown(value)}: must be {want}")
    if known.type is int and value > LARGEST:
        raise InputError(f"{name} = {shown(value)}: must be at most {LARGEST}")
    if known.type is str and not value.isascii() and value.encode(errors="ignore").decode() != value:
        raise InputError(f"{name} = {value!r}: must be valid Unicode")
    if known.choices and value not in known.choices:
        if not known.also:
            raise unknown(name, value, known.choices)
        files = tuple(word.strip(",").removeprefix("FILE") for word in known.also.split() if word.startswith("FILE."))
        places = "FOLDER/" in known.also and (is_folder(value) or value.startswith(HUB))
        forms = ("module:" in known.also and is_spec(value), places)
        if not any(forms) and not (files and value.endswith(files)):
            raise unknown(name, value, [*known.choices, known.also])
    if known.check and (wrong := known.check(value)):
        raise InputError(f"{name} = {shown(value)}: {wrong}")
    return value
