"""Which tensors stay with each client: what the names of algorithm.personal mean for a model.

`norm`: FedBN (Li, Jiang, Zhang, Kamp, Dou, ICLR 2021). `head`: FedPer (Arivazhagan, Aggarwal, Singh, Choudhary, 2019).
"""

import re
from collections.abc import Iterable

from torch import nn

from fedmom.errors import InputError
from fedmom.tasks.models.adapters import Adapted
from fedmom.tasks.places import Places

NORM, HEAD = "norm", "head"
# By the names of a layer's classes, so that those of other packages (LlamaRMSNorm, FrozenBatchNorm2d) count too.
_NORM = re.compile(r"[A-Za-z]\w*Norm(\dd)?")
_SHOWN = 5  # names in a message
_WITHIN = "model."  # how the names of Places.names begin


def personal_names(model: nn.Module, places: Places, wanted: str) -> frozenset[str]:
    """The names of x and of the buffers for which `wanted` asks, a string as algorithm.personal.

    model: the one of `places`. A weight that several modules share has the one name that it has in x, whichever of its
    names is asked for. Raises InputError for a part that matches nothing, and where nothing would be shared.
    """
    parts = [*filter(None, map(str.strip, wanted.split(",")))]
    if not parts:
        return frozenset()
    # {every name of a tensor that moves: the one in x or among the buffers}
    known = {
        place.removeprefix(_WITHIN): name for name in (*places.params, *places.buffers) for place in places.names[name]
    }
    said, found = f"algorithm.personal = {wanted!r}", set[str]()
    for part in parts:
        beginnings = _BEGINNINGS[part](model) if part in _BEGINNINGS else [part]
        own = {known[place] for place in known if any(_begins(place, name) for name in beginnings)}
        if not own:
            raise InputError(f"{said}: {_nothing(part)}; there are {_some(known.values())}")
        found |= own
    for name in sorted(found):
        for one, other in (("running_mean", "running_var"), ("running_var", "running_mean")):
            partner = name.removesuffix(one) + other
            if name.endswith(one) and partner in places.buffers and partner not in found:
                raise InputError(f"{said}: has {name} and not {partner}, and the two are one statistic; name both")
    if found >= set(places.params):
        raise InputError(f"{said}: is every trained parameter, so that nothing would be averaged; name fewer")
    return frozenset(found)


def _norms(model: nn.Module) -> list[str]:
    """The names of the tensors that normalisation layers have themselves."""
    return [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if any(_NORM.fullmatch(cls.__name__) for cls in type(module).__mro__)
        for own in (*module._parameters, *module._buffers)
    ]


def _head(model: nn.Module) -> list[str]:
    """The name of the last module with trained parameters of its own.

    A layer whose weight is parametrized, or has an adapter, is one module.
    """
    last, adapted = "", [name for name, module in model.named_modules() if isinstance(module, Adapted)]
    for name, module in model.named_modules():
        if any(p is not None and p.requires_grad for p in module._parameters.values()):
            last = name
    last = last.partition(".parametrizations.")[0]
    return [next((name for name in adapted if _begins(last, name)), last)]


_BEGINNINGS = {NORM: _norms, HEAD: _head}


def _begins(name: str, beginning: str) -> bool:
    """Whether `beginning` ends at a dot of the name or with it; "" begins every name."""
    return not beginning or name == beginning or name.startswith(beginning + ".")


def _nothing(part: str) -> str:
    if part == NORM:
        return "the model has no normalisation layer with tensors that move"
    return f"no trained parameter or averaged buffer is called {part!r} or begins with '{part}.'"


def _some(names: Iterable[str]) -> str:
    every = [*dict.fromkeys(names)]
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")
