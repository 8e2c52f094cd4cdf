"""What is asked of a model: which targets it has, the loss of its outputs, and what it is judged by.

A task is written for ONE client's minibatch; the engine stacks it (torch.vmap), so nothing in it may branch on the
value of a tensor. Evaluation takes pieces of a data set, whose sums add up exactly.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fedmom.errors import InputError
from fedmom.tasks.metrics import F64

Sums = dict[str, tuple[Tensor, Tensor | int]]  # {measure: (sum [], count [])}


class Task:
    """A task of your own derives from this, and is named as data.task = "module:Class". It is made without arguments.

    `loss` is all that it must have. Outputs are what the model returns: a tensor [B, ...], or a tuple or dict of such.
    """

    exact: ClassVar[bool] = False  # whether it is judged by targets as they came, in no rounder dtype
    targets: ClassVar[str] = "anything"  # the kind of targets that are taken: one of fedmom's TARGETS
    metrics: tuple[str, ...] = ()  # the names of what `measure` gives besides the loss

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss [] of one client's minibatch, a mean over its B examples: outputs [B, ...], targets [B, ...]."""
        raise NotImplementedError

    def measure(self, outputs: Any, targets: Any) -> Sums:
        """Sums and counts over n examples in evaluation, of each of `metrics`: their quotient is recorded."""
        return {}

    @property
    def means(self) -> bool:
        """Whether all that it measures are means over examples: clients' own, by their sizes, then make everybody's."""
        return False

    def check_outputs(self, outputs: Any, shape: Sequence[int], num_outputs: int) -> str:
        """What the outputs of a model must be, in words, if they are something else; "" where they are right.

        shape: of the targets without what is predicted, [n] or [n, T]; num_outputs: how many a model was asked for.
        """
        return ""

    def check_size(self, num_outputs: int) -> None:
        """Raise InputError where the task is not for so many outputs."""

    # What fedmom's own tasks do otherwise, and faster.

    def client_losses(self, outputs: Any, targets: Any, num_clients: int) -> Tensor:
        """[K] the losses of K clients whose outputs lie one after another, [K·B, ...]; targets [K, B, ...]."""
        apart = tree_map(lambda t: t.reshape(num_clients, -1, *t.shape[1:]), outputs)
        losses: Tensor = torch.vmap(self.loss)(apart, targets)
        return losses

    def judge(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """{measure: sums} of n examples, the loss among them: float64 tensors that add up over pieces."""
        count = len(tree_leaves(targets)[0])
        pairs = {"loss": (self.loss(outputs, targets).to(F64) * count, count), **self.measure(outputs, targets)}
        if missing := [name for name in self.metrics if name not in pairs]:
            raise InputError(f"data.task: {type(self).__name__}.measure gives no {missing[0]!r}, which metrics names")
        device = pairs["loss"][0].device
        return {
            name: torch.stack([torch.as_tensor(t, device=device).to(F64).reshape(()) for t in pair])
            for name, pair in pairs.items()
        }

    @property
    def judges_together(self) -> bool:
        """Whether `judge_each` takes many clients in few operations, and makes few numbers of each."""
        return False

    def judge_each(self, outputs: Any, targets: Any, lengths: Tensor) -> dict[str, Tensor]:
        """`judge` of k clients whose examples lie one after another, lengths [k] in main memory: {measure: [k, s]}."""
        ends = lengths.cumsum(0).tolist()
        found = [
            self.judge(*(tree_map(lambda t, a=first, b=last: _some(t, a, b), part) for part in (outputs, targets)))
            for first, last in zip([0, *ends[:-1]], ends, strict=True)
        ]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    def values_each(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`values` of each of k clients: totals [k, s] in main memory -> [k] float64, NaN where they say nothing."""
        return {name: quotients(totals[name]) for name in ("loss", *self.metrics)}

    def values(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """The loss and the measures of the totals of all pieces, which are in main memory."""
        return {name: quotient(totals[name]) for name in ("loss", *self.metrics)}


def quotient(total: Tensor) -> float:
    """A sum divided by its count, [2]; 0 of nothing."""
    value, count = total.tolist()
    return float(value / count) if count else 0.0


def _some(t: Any, first: int, last: int) -> Any:
    """Some examples of what may be no tensor."""
    return t[first:last] if isinstance(t, Tensor) else t


def quotients(totals: Tensor) -> Tensor:
    """`quotient` of each of [k, 2]; NaN of nothing, which is no number of a client's."""
    value, count = totals.unbind(1)
    return torch.where(count > 0, finite_or_infinite(value / count), torch.nan)


def finite_or_infinite(values: Tensor) -> Tensor:
    """Infinity for what is no number: something was there, and has diverged."""
    return values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
