"""What a model is judged by: measures that are made of sums over examples, so that pieces add up exactly.

Outputs and targets are of n examples in evaluation. Sums are float64 where the model is, so counts stay whole up to
2^53; `value` makes the measure of the sums of all pieces.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedmom.data.targets import IGNORED

F64 = torch.float64


class Metric(NamedTuple):
    """One measure."""

    summary: str
    sums: Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> [s] float64, which add up over examples
    value: Callable[[Tensor], float]  # of their totals, in main memory
    rises: bool = True  # whether larger is better
    share: bool = True  # whether it lies in [0, 1], and is shown in per cent
    short: str = ""  # in tables, where it is not its name
    # (outputs, targets) -> [n, s], the sums of each example alone; None where that is too many numbers
    each: Callable[[Tensor, Tensor], Tensor] | None = None
    defined: Callable[[Tensor], bool] = lambda sums: bool(sums[-1] > 0)  # whether totals say anything of one client


# Classes: outputs [M, C], labels [M]; of tokens all that count, one after the other.


def share_of(sums: Tensor) -> float:
    """Right ones / all."""
    right, count = sums.tolist()
    return right / count if count else 0.0


def _counted(each: Tensor) -> Tensor:
    """[n] numbers -> [n, 2]: the number, and that it is one."""
    each = each.to(F64)
    return torch.stack([each, torch.ones_like(each)], 1)


def _right(outputs: Tensor, labels: Tensor) -> Tensor:
    right = (outputs.argmax(1) == labels).sum()
    return torch.stack([right.to(F64), right.new_full((), len(labels)).to(F64)])


def _each_right(outputs: Tensor, labels: Tensor) -> Tensor:
    return _counted(outputs.argmax(1) == labels)


def _among_five(outputs: Tensor, labels: Tensor) -> Tensor:
    """[n] bool."""
    best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1)


def _right_of_five(outputs: Tensor, labels: Tensor) -> Tensor:
    right = _among_five(outputs, labels).sum()
    return torch.stack([right.to(F64), right.new_full((), len(labels)).to(F64)])


def _each_of_five(outputs: Tensor, labels: Tensor) -> Tensor:
    return _counted(_among_five(outputs, labels))


def _surprises(outputs: Tensor, labels: Tensor, reduction: str) -> Tensor:
    wide = outputs.float() if outputs.dtype.itemsize < 4 else outputs
    return cross_entropy(wide, labels, reduction=reduction).to(F64)


def _surprise(outputs: Tensor, labels: Tensor) -> Tensor:
    total = _surprises(outputs, labels, "sum")
    return torch.stack([total, total.new_full((), len(labels))])


def _each_surprise(outputs: Tensor, labels: Tensor) -> Tensor:
    return _counted(_surprises(outputs, labels, "none"))


def _perplexity(sums: Tensor) -> float:
    total, count = sums.tolist()
    return float(torch.tensor(total / count if count else 0.0, dtype=F64).exp())


def _confusion(outputs: Tensor, labels: Tensor) -> Tensor:
    """[3 C]: right, predicted and there, of each class."""
    classes, found = outputs.shape[1], outputs.argmax(1)
    counts = [torch.bincount(each, minlength=classes) for each in (labels[found == labels], found, labels)]
    return torch.cat(counts).to(F64)


def _label_confusion(outputs: Tensor, targets: Tensor) -> Tensor:
    """[3 L]: of outputs [n, L], positive for yes."""
    found, there = outputs > 0, targets > 0
    return torch.cat([(found & there).sum(0), found.sum(0), there.sum(0)]).to(F64)


def _any(sums: Tensor) -> bool:
    return bool(sums.any())


def _macro_f1(sums: Tensor) -> float:
    """The mean of 2 right / (predicted + there) over the classes that occur or were predicted."""
    right, found, there = sums.reshape(3, -1)
    known = found + there > 0
    return float((2 * right[known] / (found + there)[known]).mean()) if bool(known.any()) else 0.0


def _label_right(outputs: Tensor, targets: Tensor) -> Tensor:
    right = ((outputs > 0) == (targets > 0)).sum()
    return torch.stack([right.to(F64), right.new_full((), targets.numel()).to(F64)])


def _each_label_right(outputs: Tensor, targets: Tensor) -> Tensor:
    right = ((outputs > 0) == (targets > 0)).flatten(1)
    return torch.stack([right.sum(1).to(F64), right.new_full((len(right),), right.shape[1], dtype=F64)], 1)


# The area under the ROC curve, of scores that are rounded to 16 bits (bfloat16): 2^16 counts of each kind add up.

_BINS = 1 << 16
MOST_RANKED = 100  # classes or labels, of which each has 2 · 2^16 counts


def _ranked(scores: Tensor, positive: Tensor) -> Tensor:
    """[n, L] scores and whether they should be high -> [L · 2 · 2^16] counts, in the order of the scores."""
    bits = (scores.detach().to(torch.bfloat16) + 0).view(torch.int16).to(torch.int64) & 0xFFFF
    place = torch.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)  # falling bits of negative numbers rise
    labels = torch.arange(scores.shape[1], device=scores.device)
    flat = (2 * labels + positive.to(torch.int64)) * _BINS + place
    return torch.bincount(flat.reshape(-1), minlength=2 * scores.shape[1] * _BINS).to(F64)


def _class_ranks(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of two classes the second against the first; of more each against all others, by its probability."""
    classes = outputs.shape[1]
    if classes == 2:
        return _ranked(outputs[:, 1:] - outputs[:, :1], labels[:, None] == 1)
    # The log-odds: probabilities near 1 would be rounded to one number.
    rest = torch.stack([outputs[:, [j for j in range(classes) if j != c]].logsumexp(1) for c in range(classes)], 1)
    return _ranked(outputs - rest, labels[:, None] == torch.arange(classes, device=labels.device))


def _has_both(sums: Tensor) -> bool:
    """Whether some label has positive and negative examples."""
    negative, positive = sums.reshape(-1, 2, _BINS).sum(2).unbind(1)
    return bool(((negative > 0) & (positive > 0)).any())


def _area(sums: Tensor) -> float:
    """The mean over labels of P(score of a positive > of a negative) + ½ P(equal), where a label has both kinds."""
    negative, positive = sums.reshape(-1, 2, _BINS).unbind(1)
    below = negative.cumsum(1) - negative / 2
    pairs = negative.sum(1) * positive.sum(1)
    areas = (positive * below).sum(1)[pairs > 0] / pairs[pairs > 0]
    return float(areas.mean()) if len(areas) else 0.5


# Numbers: outputs and targets [n, d].


def _errors(power: int) -> Callable[[Tensor, Tensor], Tensor]:
    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        total = ((outputs.to(F64) - targets.to(F64)).abs() ** power).sum()
        return torch.stack([total, total.new_full((), targets.numel())])

    return sums


def _each_error(power: int) -> Callable[[Tensor, Tensor], Tensor]:
    def each(outputs: Tensor, targets: Tensor) -> Tensor:
        errors = ((outputs.to(F64) - targets.to(F64)).abs() ** power).flatten(1)
        return torch.stack([errors.sum(1), errors.new_full((len(errors),), errors.shape[1])], 1)

    return each


def _root(sums: Tensor) -> float:
    total, count = sums.tolist()
    return float((total / count) ** 0.5) if count else 0.0


def _variation(outputs: Tensor, targets: Tensor) -> Tensor:
    """[3 d + 1]: Σ (y − ŷ)², Σ y, Σ y² of each number, and n."""
    y = targets.to(F64)
    each = [((outputs.to(F64) - y) ** 2).sum(0), y.sum(0), (y**2).sum(0)]
    return torch.cat([*each, y.new_full((1,), len(y))])


def _each_variation(outputs: Tensor, targets: Tensor) -> Tensor:
    y = targets.to(F64)
    return torch.cat([(outputs.to(F64) - y) ** 2, y, y**2, y.new_ones(len(y), 1)], 1)


def _around(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ (y − ŷ)², Σ (y − ȳ)², whether it is more than rounding) of each number."""
    (left, total, squares), count = sums[:-1].reshape(3, -1), float(sums[-1])
    around = squares - total**2 / max(1.0, count)
    return left, around, around > 1e-12 * squares


def _varies(sums: Tensor) -> bool:
    return bool(_around(sums)[2].any())


def _explained(sums: Tensor) -> float:
    """R²: the mean over the numbers of 1 − Σ (y − ŷ)² / Σ (y − ȳ)²; 0 for a number that never changes."""
    left, around, moves = _around(sums)
    return float(torch.where(moves, 1 - left / around.where(moves, torch.ones_like(around)), 0.0).mean())


_ACCURACY = "share of the examples whose largest output is the right one"
CLASS_METRICS = {
    "accuracy": Metric(_ACCURACY, _right, share_of, each=_each_right),
    "top5": Metric(
        "share of the examples whose five largest outputs hold the right one",
        _right_of_five,
        share_of,
        short="top-5 accuracy",
        each=_each_of_five,
    ),
    "f1": Metric(
        "mean over classes of the harmonic mean of precision and recall",
        _confusion,
        _macro_f1,
        short="F1",
        defined=_any,
    ),
    "auc": Metric(
        "area under the ROC curve; of more than two classes the mean of each against all others",
        _class_ranks,
        _area,
        share=False,
        short="AUC",
        defined=_has_both,
    ),
    "perplexity": Metric(
        "exponential of the mean cross-entropy", _surprise, _perplexity, rises=False, share=False, each=_each_surprise
    ),
}
TOKEN_METRICS = {name: CLASS_METRICS[name] for name in ("accuracy", "top5", "f1", "perplexity")}
LABEL_METRICS = {
    "accuracy": Metric("share of all labels that are right", _label_right, share_of, each=_each_label_right),
    "f1": Metric(
        "mean over labels of the harmonic mean of precision and recall",
        _label_confusion,
        _macro_f1,
        short="F1",
        defined=_any,
    ),
    "auc": Metric(
        "area under the ROC curve, mean over labels",
        lambda o, t: _ranked(o, t > 0),
        _area,
        share=False,
        short="AUC",
        defined=_has_both,
    ),
}
NUMBER_METRICS = {
    "mae": Metric("mean absolute error", _errors(1), share_of, False, False, short="MAE", each=_each_error(1)),
    "rmse": Metric(
        "root of the mean squared error", _errors(2), _root, False, False, short="RMSE", each=_each_error(2)
    ),
    "r2": Metric(
        "R², share of the variance that is explained",
        _variation,
        _explained,
        share=False,
        short="R²",
        defined=_varies,
        each=_each_variation,
    ),
}
# By name, whatever the task: a name means one thing to a reader.
METRICS = CLASS_METRICS | LABEL_METRICS | NUMBER_METRICS
# How the names of what rises end: of ours, and of measures of the user's own.
_RISING = (*(name for name, one in METRICS.items() if one.rises), "score", "precision", "recall", "jain")


def rises(measure: str) -> bool:
    """Whether larger is better: accuracies, scores and speeds rise, everything else falls."""
    return measure.endswith(_RISING) or "per_second" in measure


def is_share(measure: str) -> bool:
    """Whether a measure lies in [0, 1], and is shown in per cent."""
    return any(one.share and measure.endswith(f"_{name}") for name, one in METRICS.items())


def counted_tokens(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[n, T, V] and [n, T] -> [M, V] and [M]: the tokens whose target counts."""
    flat, labels = outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1)
    kept = labels != IGNORED
    return flat[kept], labels[kept]


def named(metrics: Sequence[str]) -> tuple[str, ...]:
    """The names under which an evaluation of x̂ records a loss and these."""
    return ("test_loss", *(f"test_{name}" for name in metrics))
