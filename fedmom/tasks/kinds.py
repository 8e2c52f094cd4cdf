"""fedmom's own tasks, by name: classification, regression, several labels, tokens; and how any task is made by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
)

from fedmom.data.targets import IGNORED, TARGETS
from fedmom.errors import InputError, unknown
from fedmom.tasks.metrics import (
    CLASS_METRICS,
    F64,
    LABEL_METRICS,
    MOST_RANKED,
    NUMBER_METRICS,
    TOKEN_METRICS,
    Metric,
    counted_tokens,
    share_of,
)
from fedmom.tasks.task import Task, finite_or_infinite, quotient, quotients
from fedmom.user_code import is_spec, load_object, one_line


class Asked(NamedTuple):
    """What a configuration says of a task besides its name."""

    loss: str = "auto"
    metrics: str = "auto"  # names, by commas; "": none
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()  # of classes 0, 1, …; empty: all alike


CROSS_ENTROPY, BCE = "cross-entropy", "bce"


class Named(Task):
    """A task whose loss and measures are fedmom's, by name."""

    name: ClassVar[str]
    called: ClassVar[str] = "logits"  # its outputs
    losses: ClassVar[dict[str, Callable[..., Tensor]]]  # that apply, as torch has them; the usual one first
    known: ClassVar[dict[str, Metric]]  # measures that apply
    usual: ClassVar[tuple[str, ...]]  # of these, where "auto" is asked for

    def __init__(self, asked: Asked) -> None:
        """Raises InputError for a loss or a measure that does not apply."""
        said, named = f"data.task = {self.name!r}", asked.loss
        named = next(iter(self.losses)) if named == "auto" else named
        if named not in self.losses:
            raise InputError(f"model.loss = {named!r}: {said} has {' or '.join(self.losses)}")
        names = self.usual if asked.metrics == "auto" else tuple(filter(None, map(str.strip, asked.metrics.split(","))))
        for metric in names:
            if metric not in self.known:
                right = ", ".join(self.known)
                raise InputError(f"run.metrics = {asked.metrics!r}: {metric} is no measure of {said}; it has {right}")
        for key, value in (("label-smoothing", asked.label_smoothing), ("class-weights", asked.class_weights)):
            if value and named != CROSS_ENTROPY:
                raise InputError(f"model.{key} = {value}: is for cross-entropy; {said} has the loss {named}")
        self.metrics, self.function, self.asked = tuple(dict.fromkeys(names)), self.losses[named], asked

    def check_size(self, num_outputs: int) -> None:
        if "auc" in self.metrics and num_outputs > MOST_RANKED:
            raise InputError(
                f"run.metrics: auc is for at most {MOST_RANKED} classes or labels, these are {num_outputs}"
            )

    def check_outputs(self, outputs: Any, shape: Sequence[int], num_outputs: int) -> str:
        """Outputs of that shape, with one number for each class, label or number at the end."""
        fits = isinstance(outputs, Tensor) and list(outputs.shape) == [*shape, num_outputs]
        return "" if fits else f"{self.called} {[*shape, num_outputs]}"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.function(outputs, targets)

    def client_losses(self, outputs: Tensor, targets: Tensor, num_clients: int) -> Tensor:
        each = self.function(outputs, targets.flatten(0, 1), reduction="none")
        return each.reshape(num_clients, -1).mean(1)

    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self._total(outputs, targets), **self._measured(outputs, targets)}

    def _total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[2]: the loss of all examples, and what it is divided by."""
        total = self.function(outputs, targets, reduction="sum").to(F64)
        return torch.stack([total, total.new_full((), targets.numel())])

    def _measured(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {name: self.known[name].sums(outputs, targets) for name in self.metrics}

    @property
    def judges_together(self) -> bool:
        return all(self.known[name].each is not None for name in self.metrics)

    def judge_each(self, outputs: Tensor, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        if not self.judges_together:
            return super().judge_each(outputs, targets, lengths)
        lengths = lengths.to(outputs.device)
        measured, counted, counts = self._elements(outputs, targets, lengths)
        found = {"loss": _segments(self._each_total(outputs, targets), lengths)}
        for name in self.metrics:
            each = self.known[name].each
            assert each is not None
            found[name] = _segments(each(measured, counted), counts)
        return found

    def _each_total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[n, 2]: `_total` of each example."""
        each = self.function(outputs, targets, reduction="none").flatten(1).to(F64)
        return torch.stack([each.sum(1), each.new_full((len(each),), each.shape[1])], 1)

    def _elements(self, outputs: Tensor, targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What measures see, one after another, and how many of them each client has."""
        return outputs, targets, lengths

    def values_each(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {"loss": quotients(totals["loss"])}
        for name in self.metrics:
            metric, sums = self.known[name], totals[name]
            if metric.value is share_of:
                found[name] = quotients(sums)
                continue
            values = finite_or_infinite(torch.tensor([metric.value(one) for one in sums], dtype=F64))
            said = torch.tensor([metric.defined(one) for one in sums], dtype=torch.bool)
            found[name] = torch.where(said, values, torch.nan)
        return found

    def values(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        return {"loss": quotient(totals["loss"])} | {n: self.known[n].value(totals[n]) for n in self.metrics}


def _segments(each: Tensor, lengths: Tensor) -> Tensor:
    """Sums of neighbours: [n, ...] and lengths [k], which may be 0, -> [k, ...]."""
    return torch.segment_reduce(each, "sum", lengths=lengths, axis=0, unsafe=True)


class ClassificationTask(Named):
    """One of C classes for each example: outputs [B, C], targets [B]."""

    name, targets = "classification", "labels"
    losses: ClassVar = {CROSS_ENTROPY: cross_entropy}
    known: ClassVar = CLASS_METRICS
    usual: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self.class_weights = torch.tensor(asked.class_weights, dtype=F64) if asked.class_weights else None

    @property
    def means(self) -> bool:
        return self.targets == "labels" and self.class_weights is None and {*self.metrics} <= {"accuracy", "top5"}

    def check_size(self, num_outputs: int) -> None:
        super().check_size(num_outputs)
        if self.class_weights is not None and len(self.class_weights) != num_outputs:
            given = f"{len(self.class_weights)} numbers"
            raise InputError(f"model.class-weights: has {given}, and there are {num_outputs} classes")

    def _each(self, outputs: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """Of outputs [M, C] and labels [M], as torch's cross_entropy reduces them."""
        weights = None if self.class_weights is None else self.class_weights.to(outputs.device, outputs.dtype)
        smoothing = self.asked.label_smoothing
        return self.function(outputs, labels, weight=weights, reduction=reduction, label_smoothing=smoothing)

    def _counts(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """How much each label of [...] counts, in the dtype of the outputs."""
        if self.class_weights is None:
            return (labels != IGNORED).to(outputs.dtype)
        weights = self.class_weights.to(outputs.device, outputs.dtype)
        return torch.where(labels == IGNORED, 0, weights[labels.clamp(min=0)])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._each(outputs, targets, "mean")

    def client_losses(self, outputs: Tensor, targets: Tensor, num_clients: int) -> Tensor:
        each = self._each(outputs, targets.reshape(-1), "none").reshape(num_clients, -1)
        if self.class_weights is None:
            return each.mean(1)
        return each.sum(1) / self._counts(outputs, targets).sum(1)

    def _total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total = self._each(outputs, targets, "sum").to(F64)
        if self.class_weights is None:
            return torch.stack([total, total.new_full((), len(targets))])
        return torch.stack([total, self._counts(outputs, targets).sum(dtype=F64)])

    def _each_total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        each = self._each(outputs.flatten(0, -2), targets.reshape(-1), "none").reshape(len(targets), -1)
        counts = self._counts(outputs, targets).reshape(len(targets), -1)
        return torch.stack([each.to(F64).sum(1), counts.to(F64).sum(1)], 1)


class PerTokenTask(ClassificationTask):
    """One of V classes for each of T tokens: outputs [B, T, V], targets [B, T], of which −100 counts nowhere."""

    name, targets = "per-token", "tokens"
    known: ClassVar = TOKEN_METRICS
    usual: ClassVar[tuple[str, ...]] = ("accuracy", "perplexity")

    def _shared(self, outputs: Tensor, targets: Tensor, num_clients: int) -> Tensor:
        """[K] the losses of minibatches [K·B, T, …]; 0 for one without a token that counts."""
        each = self._each(outputs.flatten(0, -2), targets.reshape(-1), "none")
        counts = self._counts(outputs, targets.reshape(num_clients, -1)).sum(1)
        return each.reshape(num_clients, -1).sum(1) / torch.where(counts > 0, counts, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._shared(outputs, targets, 1)[0]

    def client_losses(self, outputs: Tensor, targets: Tensor, num_clients: int) -> Tensor:
        return self._shared(outputs, targets, num_clients)

    def _total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total = self._each(outputs.flatten(0, -2), targets.reshape(-1), "sum").to(F64)
        return torch.stack([total, self._counts(outputs, targets).sum(dtype=F64)])

    def _measured(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return super()._measured(*counted_tokens(outputs, targets))

    def _elements(self, outputs: Tensor, targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        counts = (targets != IGNORED).flatten(1).sum(1).to(F64)
        return *counted_tokens(outputs, targets), _segments(counts, lengths).to(torch.int64)


class RegressionTask(Named):
    """Numbers for each example: outputs [B, d], targets [B, d]."""

    name, targets, called = "regression", "numbers", "numbers"
    losses: ClassVar = {"mse": mse_loss, "mae": l1_loss, "huber": huber_loss}
    exact = True

    def _total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super()._total(outputs.to(F64), targets.to(F64))

    def _each_total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super()._each_total(outputs.to(F64), targets.to(F64))

    known: ClassVar = NUMBER_METRICS
    usual: ClassVar[tuple[str, ...]] = ("mae", "r2")


class MultiLabelTask(Named):
    """Yes or no for each of L labels of an example: outputs [B, L], positive for yes, targets [B, L] of 0 and 1."""

    name, targets = "multi-label", "sets"
    losses: ClassVar = {BCE: binary_cross_entropy_with_logits}
    known: ClassVar = LABEL_METRICS
    usual: ClassVar[tuple[str, ...]] = ("accuracy", "f1")


LOSSES = {
    CROSS_ENTROPY: "classification, per-token: −log of the right class's softmax",
    "mse": "regression: mean of the squared errors",
    "mae": "regression: mean of the absolute errors",
    "huber": "regression: half the squared error up to 1, then the absolute one",
    BCE: "multi-label: binary cross-entropy of each label's sigmoid",
}
TASKS: dict[str, type[Named]] = {
    task.name: task for task in (ClassificationTask, RegressionTask, MultiLabelTask, PerTokenTask)
}


def make_task(name: str, asked: Asked = Asked()) -> Task:  # noqa: B008 - never changed
    """The task of that name, or of the user's own "module:Class".

    Raises InputError for what is no task, and for a loss or measures that it does not have.
    """
    if not is_spec(name):
        if name not in TASKS:
            raise unknown("data.task", name, [*TASKS, '"module:Class"'])
        return TASKS[name](asked)
    said, made = f"data.task = {name!r}", load_object("data.task", name)
    if not (isinstance(made, type) and issubclass(made, Task)):
        raise InputError(f"{said}: must be a class that derives from fedmom.Task")
    for key, value in (("model.loss", asked.loss), ("run.metrics", asked.metrics)):
        if value != "auto":
            raise InputError(f"{key} = {value!r}: {said} says that itself; leave it 'auto'")
    for key, given in (("label-smoothing", asked.label_smoothing), ("class-weights", asked.class_weights)):
        if given:
            raise InputError(f"model.{key}: is for cross-entropy; {said} has a loss of its own")
    try:
        task = made()
    except Exception as error:  # a user's own may raise anything
        raise InputError(f"{said}: {made.__name__}() raised {one_line(error)}") from error
    if made.loss is Task.loss:
        raise InputError(f"{said}: has no method loss(outputs, targets)")
    if not isinstance(task.targets, str) or task.targets not in TARGETS:
        raise unknown(f"{said}: targets", str(task.targets), TARGETS)
    names = task.metrics if isinstance(task.metrics, tuple | list) else (None,)
    right = all(isinstance(name, str) and name.isidentifier() and name != "loss" for name in names)
    if not right or len(set(names)) < len(names):
        raise InputError(f'{said}: metrics = {task.metrics!r}: must be names besides the loss, as in ("error",)')
    return task
