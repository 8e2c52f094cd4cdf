"""Where a model begins: at the model that another run ended with."""

import hashlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedmom.errors import InputError
from fedmom.machine.files import at_home
from fedmom.tasks.places import Places

_TRAINED, _BUFFERS = "params/", "buffers/"  # in a run's own files, whose momenta are not read


def digest_of(file: str) -> str:
    """What tells a file of model.start from another, in some digits; "" for no file. InputError for one not there."""
    try:
        return hashlib.sha256(at_home(file).read_bytes()).hexdigest()[:16] if file else ""
    except OSError as error:
        raise InputError(f"model.start = {file!r}: cannot be read ({error.strerror})") from None


def begin_from(model: nn.Module, file: str) -> None:
    """Put the tensors of a safetensors file into the model's parameters and buffers of the same names.

    It may be another run's final.safetensors or best.safetensors, whose x and buffers are taken, or a state_dict.
    Raises InputError naming the file where it cannot be read, lacks a parameter or an averaged buffer of the model, or
    has what the model has not, or in another shape.
    """
    said = f"model.start = {file!r}"
    try:
        found = load_file(at_home(file))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{said}: cannot be read as a safetensors file ({' '.join(str(error).split())})") from None
    if any(name.startswith(_TRAINED) for name in found):
        parts = ((name.partition("/"), tensor) for name, tensor in found.items())
        found = {name: tensor for (part, _, name), tensor in parts if f"{part}/" in (_TRAINED, _BUFFERS)}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    again = [n for n, _ in model.named_parameters(remove_duplicate=False)]  # of tied weights
    needed = [*dict(model.named_parameters()), *Places(model).buffers]
    if missing := [name for name in needed if name not in found]:
        raise InputError(f"{said}: has no {missing[0]}, which the model has; give a file of such a model")
    if other := [name for name in found if name not in own and name not in again]:
        raise InputError(f"{said}: has {other[0]}, which the model has not; give a file of such a model")
    with torch.no_grad():
        for name in found.keys() & own.keys():
            if found[name].shape != own[name].shape:
                shapes = f"{list(found[name].shape)}, and the model {list(own[name].shape)}"
                raise InputError(f"{said}: has {name} of shape {shapes}")
            own[name].copy_(found[name])
