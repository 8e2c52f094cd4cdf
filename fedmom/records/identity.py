"""What makes a run this run: a resume goes on only with what began.

A checkpoint carries the number of a formula and what the formula makes of the configuration, and beside it a
fingerprint of everything that the configuration names without holding it: data, code, a file of W.
"""

import contextlib
import functools
import hashlib
import inspect
import io
import json
import sys
import textwrap
import tokenize
from collections.abc import Collection, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.config.examples import is_given
from fedmom.config.keys import KEYS, Config
from fedmom.config.load import flat
from fedmom.data.datasets import Dataset
from fedmom.data.inputs import NARROW, pieces
from fedmom.errors import InputError
from fedmom.machine.files import at_home
from fedmom.method.algorithms import ALGORITHMS
from fedmom.method.decentralized.topology import FILES
from fedmom.tasks.problem import Problem, data_kind
from fedmom.tasks.supervised import Supervised
from fedmom.user_code import is_own_file, is_spec, load_object

# Keys that may differ on resume without changing what is computed up to the rounds already done.
LENGTH = ("run.num-rounds", "run.num-steps", "run.stop-at", "run.patience", "run.min-delta", "run.monitor")
# Keys that say where a run happens and how its failures are met; a resumed run may have others.
PLACE = tuple(
    f"{section}.{name}"
    for section, names in {
        "run": ("out", "resume", "keep-best"),
        "engine": ("workers", "remember"),
        "server": ("on-failure", "min-clients", "retries", "timeout-seconds", "wait-seconds", "window", "own-rows"),
        "simulation": [name.partition(".")[2] for name in KEYS if name.startswith("simulation.")],
    }.items()
    for name in names
)
FORMULA = 2  # of new runs; a run keeps the one that it began with
# Formula 1 took every key that there was in its time, so it must go on to know them.
_KEYS_OF_1 = {
    "data": "dataset data-dir classes num-clients partition alpha min-size shards-per-client quantity-law sigma "
    "batch-size sampling augment curvatures centers start noise-sigma",
    "model": "name norm hidden",
    "algorithm": "name nesterov num-local-steps local-epochs interval beta lr lr-schedule lr-milestones lr-decay "
    "lr-unit lr-warmup lr-min weight-decay momentum-policy correction client-weights running-var cohort-size "
    "slow-momentum slow-lr topology mixing-weights topology-degree topology-p",
    "run": "seed eval-every eval-clients checkpoint-every backend dtype",
    "engine": "device path chunk-size matmul threads",
    "server": "strategy lr momentum trim num-malicious noise-multiplier clipping-norm",
}
_WHAT = dict.fromkeys(("model.name", "algorithm.correction", "data.task"), "its code") | {
    "data.data-dir": "what the clients hold",
    "data.partition": "which client holds which example",
    "run.client-eval-every": "the clients' own test examples",
}


class Identity(NamedTuple):
    """A run's own, in every formula."""

    ids: Mapping[int, str]  # {formula: what it makes of the configuration}
    contents: Mapping[str, str]  # {key: fingerprint of what it names}, since formula 2
    settings: Mapping[str, Any]

    @property
    def stamp(self) -> dict[str, Any]:
        """What a new run's files carry."""
        return {"run_id": self.ids[FORMULA], **({"content": dict(self.contents)} if self.contents else {})}

    def agreed(self, about: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """The stamp of a checkpoint, which its run goes on to carry; `about`: what the file says of itself.

        Raises InputError where it is another run's, naming what was changed.
        """
        run_id, contents = str(about.get("run_id")), about.get("content", {})
        number, _, _ = run_id.rpartition(":")
        formula = int(number) if number.isdigit() else 1
        if formula > FORMULA:
            raise InputError(f"{path}: was written by a newer fedmom (identity {run_id}); take that one")
        for key, now in self.contents.items():
            if contents.get(key, now) != now:
                what = f"{_WHAT.get(key, 'the data or the file')} was changed since the run in {path.parent} began"
                raise InputError(f"{key} = {self.settings[key]!r}: {what}; restore it, or start a new run")
        if self.ids[formula] != run_id:
            raise InputError(
                f"{path}: belongs to another run, or config.toml, a file that it names or a client's own data were "
                f"changed since (the checkpoint's run is {run_id}, this one {self.ids[formula]})"
            )
        return {name: about[name] for name in ("run_id", "content") if name in about}


def identity_of(config: Config, problem: Problem | None = None) -> Identity:
    """The identity of a resolved configuration's run, and of what it names; `problem`: with its data."""
    settings, contents = flat(config), _contents(config, problem)
    decides = {key: value for key, value in settings.items() if key not in LENGTH + PLACE}
    first = {key: value for key, value in decides.items() if key in _names_of_1()}
    if "algorithm.topology" in contents:
        first["algorithm.topology's content"] = _hash_of_file(config.algorithm.topology)
    second = {key: value for key, value in decides.items() if value != KEYS[key].default}
    ids = {1: fingerprint({**first, **_known_of_data(config, problem)}), 2: f"2:{fingerprint(second)}"}
    return Identity(ids, contents, settings)


def fingerprint(settings: Any) -> str:
    """Short hash of values that JSON has."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _names_of_1() -> Collection[str]:
    return {f"{section}.{name}" for section, names in _KEYS_OF_1.items() for name in names.split()}


def _known_of_data(config: Config, problem: Problem | None) -> dict[str, Any]:
    """Where every client brings its own data: their sizes, and the images' sums."""
    if not data_kind(config.data.dataset).own_data or not isinstance(problem, Supervised):
        return {}
    return {"sizes": problem.sizes.tolist(), "mean": problem.dataset.mean, "std": problem.dataset.std}


def _contents(config: Config, problem: Problem | None) -> dict[str, str]:
    """{key: fingerprint} of everything that the configuration names and does not hold."""
    found: dict[str, str] = {}
    if isinstance(problem, Supervised):
        data = problem.dataset
        arrays = _tensors_of(data)
        about = {
            "arrays": of_tensors(arrays, as_used=True),
            "classes": data.num_classes,
            **_known_of_data(config, problem),
        }
        found["data.data-dir" if data_kind(config.data.dataset).own_data else "data.dataset"] = fingerprint(about)
        if config.run.client_eval_every:
            found["run.client-eval-every"] = _of_tests(problem)
        if is_given(config):
            sampler = problem.sampler
            found["data.partition"] = of_tensors({"indices": sampler.indices, "offsets": sampler.offsets})
    topology = config.algorithm.topology
    if ALGORITHMS[config.algorithm.name].decentralized and topology.endswith(FILES):
        with contextlib.suppress(OSError):  # that it is missing is said by whoever reads W
            found["algorithm.topology"] = _hash_of_file(topology)[:16]
    if config.model.start and data_kind(config.data.dataset).has_examples:
        with contextlib.suppress(OSError):  # as above
            found["model.start"] = _hash_of_file(config.model.start)[:16]
    for key in ("model.name", "algorithm.correction", "data.task"):
        spec = str(flat(config)[key])
        if is_spec(spec) and (key == "algorithm.correction" or data_kind(config.data.dataset).has_examples):
            found[key] = of_code(load_object(key, spec))
    return found


def _of_tests(problem: Supervised) -> str:
    """Fingerprint of the clients' own test examples, and of who holds which; of sizes alone where clients hold them."""
    own = problem.own
    if own is None:
        return fingerprint({"sizes": [] if problem.own_sizes is None else problem.own_sizes.tolist()})
    inputs = {"x": own.x} if isinstance(own.x, Tensor) else {f"x {name}": one for name, one in own.x.items()}
    parts = {"y": own.y, **inputs}
    places = {"indices": own.partition.indices, "offsets": own.partition.offsets}
    return of_tensors(parts | {name: torch.from_numpy(one) for name, one in places.items()}, as_used=True)


def _tensors_of(data: Dataset) -> dict[str, Tensor]:
    parts = {name: getattr(data, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    several = {name: part if isinstance(part, dict) else {"": part} for name, part in parts.items()}
    return {f"{name} {own}".rstrip(): tensor for name, part in several.items() for own, tensor in part.items()}


def _hash_of_file(name: str) -> str:
    return hashlib.sha256(at_home(name).read_bytes()).hexdigest()


def of_tensors(tensors: Mapping[str, Tensor], *, as_used: bool = False) -> str:
    """Fingerprint of tensors by name, dtype, shape and bytes; `as_used`: narrow integers are the int64 of minibatches.

    So a file that is mapped has the fingerprint that it has in memory.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        dtype = torch.int64 if as_used and tensor.dtype in NARROW else tensor.dtype
        total.update(f"{name} {dtype} {list(tensor.shape)} ".encode())
        for piece in pieces(tensor.detach().reshape(-1) if tensor.ndim == 0 else tensor.detach()):
            value = piece.to(dtype).cpu().contiguous()
            total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


# --- code -------------------------------------------------------------------------------------------------------


def of_code(function: Any) -> str:
    """Fingerprint of a function's source and of all of the user's own that it may reach by name.

    That are functions, classes with their bases, and constants, here and in the user's other modules. Comments and
    what the function does not use may change; libraries are known by their versions in environment.json.
    """
    return fingerprint(sorted(_Reached(function).parts))


class _Reached:
    """(where, source or value) of what can be reached from one object."""

    def __init__(self, value: Any) -> None:
        # The package that the configuration names is the user's, though it be installed like a library; not torch's.
        package = str(getattr(inspect.unwrap(value), "__module__", "")).partition(".")[0]
        self._package = "" if package in ("torch", "torchvision") else package
        self.parts: set[tuple[str, str]] = set()
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # so that no id is given twice
        self._waiting = [("", value)]
        while self._waiting:
            where, value = self._waiting.pop()
            if id(value) not in self._seen or isinstance(value, _PLAIN):
                self._seen.add(id(value))
                self._kept.append(value)
                self._visit(where, value)

    def _visit(self, where: str, value: Any) -> None:
        if isinstance(value, functools.partial):
            self._later(where, {"": value.func, "args": value.args, **value.keywords})
        elif isinstance(value, staticmethod | classmethod | MethodType):
            self._later(where, {"": value.__func__})
        elif isinstance(value, property):
            self._later(where, {"get": value.fget, "set": value.fset})
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, Mapping):
            self._later(where, {f"[{key!r}]": one for key, one in value.items()})
        elif isinstance(value, list | tuple):
            self._later(where, {f"[{place}]": one for place, one in enumerate(value)})
        elif isinstance(value, _PLAIN):
            self.parts.add((where, repr(value)))
        elif isinstance(value, Tensor | np.ndarray):
            self.parts.add((where, of_tensors({"": torch.as_tensor(value)})))
        elif self._is_owned(type(value).__module__):
            self._class(type(value))
            self._later(where, vars(value) if hasattr(value, "__dict__") else {})

    def _later(self, where: str, values: Mapping[str, Any]) -> None:
        self._waiting += [(f"{where}.{name}", value) for name, value in values.items()]

    def _class(self, cls: type) -> None:
        if self._is_owned(cls.__module__):
            self._source(cls)
            # Of names like __firstlineno__ Python makes its own.
            own = {n: v for n, v in vars(cls).items() if isinstance(v, FunctionType) or not n.startswith("__")}
            self._later(f"{cls.__module__}.{cls.__qualname__}", own)
            self._later("", {base.__qualname__: base for base in cls.__bases__})

    def _function(self, function: FunctionType) -> None:
        code, where = function.__code__, f"{function.__module__}.{function.__qualname__}"
        self._later("", {where: function.__wrapped__} if hasattr(function, "__wrapped__") else {})
        for cell, name in zip(function.__closure__ or (), code.co_freevars, strict=True):
            with contextlib.suppress(ValueError):  # not filled yet
                self._later(where, {name: cell.cell_contents})
        if not self._is_owned(function.__module__) and not is_own_file(code.co_filename):
            return
        self._source(function)
        self._later(where, {"defaults": function.__defaults__, "more": function.__kwdefaults__})
        names, known = _names_in(code), function.__globals__
        for name in names:
            inner = [name, f"{known.get('__package__') or ''}.{name}"]  # imported within the function
            value = known.get(name, next((sys.modules[n] for n in inner if n in sys.modules), None))
            self._named(f"{function.__module__}.{name}", value, names)

    def _named(self, where: str, value: Any, names: Collection[str]) -> None:
        """What a name in a function stands for; of a module, what that function takes from it."""
        if not isinstance(value, ModuleType):
            self._later("", {where: value})
        elif self._is_owned(value.__name__):
            for name in names:
                inner = getattr(value, name, None)
                if inner is not None and inner is not value:
                    self._named(f"{value.__name__}.{name}", inner, [n for n in names if n != name])

    def _is_owned(self, name: str | None) -> bool:
        file = getattr(sys.modules.get(name or ""), "__file__", None) or "<"
        return str(name).partition(".")[0] == self._package or is_own_file(file)

    def _source(self, thing: Any) -> None:
        try:
            text = _without_comments(inspect.getsource(thing))
        except (OSError, TypeError):  # typed into an interpreter
            code = getattr(thing, "__code__", None)
            text = code.co_code.hex() if code else ""
        self.parts.add((f"{thing.__module__}.{thing.__qualname__}", text))


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def _names_in(code: CodeType) -> list[str]:
    names = dict.fromkeys(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names |= dict.fromkeys(_names_in(inner))
    return list(names)


def _without_comments(text: str) -> str:
    lines = textwrap.dedent(text).splitlines()
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
            if token.type == tokenize.COMMENT:
                lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    return "\n".join(line.rstrip() for line in lines if line.strip())
