"""Low-rank adapters: a model stays as it is, and small matrices beside its dense layers are trained."""

from torch import Tensor, nn

from fedmom.errors import InputError


class Adapted(nn.Module):
    """W h + b + B (A h): `base` is frozen, A [r, in] is drawn as nn.Linear's weights, B [out, r] is 0."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.zeros_(self.up.weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear names it
        """[..., in] -> [..., out]."""
        y: Tensor = self.base(input) + self.up(self.down(input))
        return y


def lora(model: nn.Module, rank: int) -> nn.Module:
    """The model itself, frozen, with an adapter of `rank` r trained beside each nn.Linear (Hu et al., ICLR 2022).

    A layer W h + b becomes W h + b + B (A h), with A [r, in] drawn by torch's global generator and B [out, r] = 0, so
    that the model computes at first what it did; the scale is 1. What is adapted is an nn.Linear itself, of no derived
    class, whose weight no other module has: a head that is tied to an embedding stays as it is, and so does the inside
    of nn.MultiheadAttention. Clients train, exchange and average A and B alone, and statistics of BatchNorm layers.

    Raises InputError for a rank below 1, and for a model without such a layer.
    """
    if rank < 1:
        raise InputError(f"rank = {rank}: must be at least 1")
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    model.requires_grad_(False)
    made = {id(m): Adapted(m, rank) for m in model.modules() if type(m) is nn.Linear and uses[id(m.weight)] == 1}
    if not made:
        raise InputError(f"rank = {rank}: {type(model).__name__} has no nn.Linear whose weight is its alone")
    for module in [*model.modules()]:
        for name, child in module._modules.items():
            module._modules[name] = made.get(id(child), child)
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # by which torch's fused evaluation would pass the adapters by
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return made.get(id(model), model)


def adapted(name: str, model: nn.Module, rank: int) -> nn.Module:
    """The model of a config's `model.name`, with adapters if its rank is not 0. Raises InputError naming the keys."""
    if rank == 0:
        return model
    try:
        return lora(model, rank)
    except InputError as error:
        raise InputError(f"model.lora-rank = {rank}: model.name = {name!r}: {error}") from None
