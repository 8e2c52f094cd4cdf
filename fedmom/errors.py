"""The ways a run can end that are not a bug: the input was wrong, training diverged, clients failed."""

from collections.abc import Iterable
from difflib import get_close_matches

# What people call a choice that has another name here.
CALLED = {"gpu": "cuda", "fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "dirichlet": "dirichlet-client"}


class InputError(ValueError):
    """Bad input. The message is one line: the key or file, the value, and what would be right."""


class DivergedError(ArithmeticError):
    """The loss or the model became NaN or infinite. The message names the round and the lr."""


def unknown(key: str, value: str, choices: Iterable[str]) -> InputError:
    """The error for a name that is not among `choices`: the nearest ones first, then all of them."""
    names = list(choices)
    near = [name for name in names if name == CALLED.get(value.lower())]
    near = near or get_close_matches(value, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InputError(f"{key} = {value!r} is not known: {hint}choose one of {', '.join(names)}")


def missing_package(what: str, package: str, extra: str) -> InputError:
    """The error where `what` (a key with its value, a command) needs a package that only fedmom[`extra`] installs."""
    name = f"'fedmom[{extra}]'" if extra else package
    return InputError(f"{what} needs {package}, which is not installed: pip install {name}")


def require(what: str, extra: str, *packages: str) -> None:
    """InputError naming the first of `packages` that cannot be imported here; none of them is imported."""
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise missing_package(what, package, extra)


class ClientsFailedError(RuntimeError):
    """Clients did not answer as they must. The message names the round, the clients and the reason, in one line."""


class RayEndedError(ClientsFailedError):
    """Ray itself, or all that could run clients in it, is gone; the message says what ended."""


class RunStoppedError(RuntimeError):
    """A run inside a Flower app ended early: the message says why, and its records are in the run folder."""
