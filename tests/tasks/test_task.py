"""Every task is plain torch's on every path, and its measures add up to scikit-learn's."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fedmom
from fedmom.data.batches import Sampler
from fedmom.data.datasets import Dataset
from fedmom.data.inputs import rows_of_inputs
from fedmom.data.partition import make_partition
from fedmom.errors import InputError
from fedmom.tasks.evaluation import Evaluation
from fedmom.tasks.kinds import TASKS, Asked, make_task
from fedmom.tasks.supervised import Supervised
from fedmom.tasks.task import Task
from runs import F64, run_plan, simple_plan

B, D, T, V = 4, 6, 5, 7


class Quantiles(Task):
    """A task of somebody's own: the pinball loss at 0.9 of one number, and how often it is exceeded."""

    targets = "numbers"
    metrics = ("exceeded",)

    def loss(self, outputs, targets):
        away = targets - outputs
        return torch.maximum(0.9 * away, -0.1 * away).mean()

    def measure(self, outputs, targets):
        return {"exceeded": ((targets > outputs).sum(), targets.numel())}


def data_for(kind, n=60, parts=False):
    """(x [n, ...], y [n, ...], outputs) of a task: features, of per-token ids; `parts`: two inputs by name."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n, D, generator=g, dtype=F64)
    if parts:
        return {"left": x[:, : D // 2], "right": x[:, D // 2 :]}, torch.arange(n) % 3, 3
    if kind == "per-token":
        y = torch.randint(0, V, (n, T), generator=g)
        y[torch.rand(n, T, generator=g) < 0.3] = -100
        y[0] = -100  # of this one nothing counts
        return torch.randint(0, V, (n, T), generator=g), y, V
    if kind == "multi-label":
        return x, torch.randint(0, 2, (n, 3), generator=g).to(torch.uint8), 3
    if kind == "classification":
        return x, torch.arange(n) % 3, 3
    d = 2 if kind == "regression" else 1
    return x, torch.randn(n, d, generator=g, dtype=F64), d


class Sides(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(D // 2, 3), nn.Linear(D // 2, 3)

    def forward(self, right, left):  # by name, not by order
        return self.left(left) * torch.sigmoid(self.right(right))


def net_for(kind, outputs, parts=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if parts:
            return Sides().double()
        if kind == "per-token":
            return nn.Sequential(nn.Embedding(V, 8), nn.LayerNorm(8), nn.Linear(8, outputs)).double()
        return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def torchs(kind, asked):
    """The loss as torch writes it."""
    weight = torch.tensor(asked.class_weights, dtype=F64) if asked.class_weights else None
    smooth = asked.label_smoothing

    def tokens(o, y):
        if bool((y == -100).all()):
            return o.sum() * 0
        return functional.cross_entropy(o.flatten(0, 1), y.flatten(), weight=weight, label_smoothing=smooth)

    names = {"mse": functional.mse_loss, "mae": functional.l1_loss, "huber": functional.huber_loss}
    return {
        "classification": lambda o, y: functional.cross_entropy(o, y, weight=weight, label_smoothing=smooth),
        "per-token": tokens,
        "multi-label": lambda o, y: functional.binary_cross_entropy_with_logits(o, y.to(o.dtype)),
        "regression": names.get(asked.loss, functional.mse_loss),
        "own": lambda o, y: torch.where(y > o, 0.9 * (y - o), 0.1 * (o - y)).mean(),
    }[kind]


def plainly(net, loss, x, y, sampler, *, rounds, steps, lr, beta, nesterov):
    """Algorithm 1 by deep copies and torch.optim.SGD -> (x, u, train losses)."""
    count = len(sampler.sizes)
    mean = {n: p.detach().clone() for n, p in net.named_parameters()}
    momentum = {n: torch.zeros_like(p) for n, p in mean.items()}
    losses = []
    for r in range(rounds):
        ends, moments, total = [], [], 0.0
        for c in range(count):
            model = copy.deepcopy(net)
            model.load_state_dict(mean)
            sgd = torch.optim.SGD(model.parameters(), lr, beta, nesterov=nesterov)
            for n, p in model.named_parameters():
                sgd.state[p]["momentum_buffer"] = momentum[n].clone()
            rows = sampler.draw(torch.tensor([c]), torch.tensor([r * steps]), steps)[0]
            for s in range(steps):
                inputs = rows_of_inputs(x, rows[s])
                value = loss(model(**inputs) if isinstance(inputs, dict) else model(inputs), y[rows[s]])
                sgd.zero_grad()
                value.backward()
                sgd.step()
                total += value.item() / steps / count
            ends.append({n: p.detach() for n, p in model.named_parameters()})
            moments.append({n: sgd.state[p]["momentum_buffer"] for n, p in model.named_parameters()})
        mean = {n: torch.stack([e[n] for e in ends]).mean(0) for n in mean}
        momentum = {n: torch.stack([m[n] for m in moments]).mean(0) for n in mean}
        losses.append(total)
    return mean, momentum, losses


CASES = [
    ("classification", Asked(label_smoothing=0.1, class_weights=(1.0, 3.0, 0.5))),
    ("per-token", Asked()),
    ("per-token", Asked(label_smoothing=0.2, class_weights=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0))),
    ("multi-label", Asked()),
    ("regression", Asked("mse")),
    ("regression", Asked("mae")),
    ("regression", Asked("huber")),
    ("own", Asked()),
    ("two inputs", Asked()),
]


def norm(tree):
    return math.sqrt(sum(float(t.square().sum()) for t in tree.values()))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "asked"), CASES, ids=[f"{k}-{a.loss}-{bool(a.class_weights)}" for k, a in CASES])
def test_a_task_is_plain_torchs_on_every_path(kind, asked):
    """x and u to 1e-10 of their norm, and the losses; N = 1, 2, 5, options I and II, chunks with a shorter last one."""
    parts = kind == "two inputs"
    kind = "classification" if parts else kind
    x, y, outputs = data_for(kind, parts=parts)
    net, loss = net_for(kind, outputs, parts), torchs(kind, asked)
    task = Quantiles() if kind == "own" else make_task(kind, asked)
    for clients, nesterov in ((1, False), (2, True), (5, False)):
        split = make_partition("iid", np.zeros(len(y), np.int64), clients, seed=1)
        data = Dataset(x, y, x, y, outputs, (), (), "none")
        want_x, want_u, losses = plainly(
            net, loss, x, y, Sampler(split, B), rounds=2, steps=3, lr=0.05, beta=0.9, nesterov=nesterov
        )
        for path in ("loop", "vmap", "stack", "factors"):
            problem = Supervised(data, copy.deepcopy(net), split, batch_size=B, task=task, dtype=F64)
            plan = simple_plan(clients, num_rounds=2, batch_size=B, nesterov=nesterov)
            done, records = run_plan(problem, plan, path=path, chunk_size=2)
            for name, got, want in (("x", done.state.params, want_x), ("u", done.state.momentum, want_u)):
                off = norm({n: got[n] - want[n] for n in want})
                assert off <= 1e-10 * norm(want), (path, clients, name, off)
            assert [r["train_loss"] for r in records] == pytest.approx(losses, rel=1e-10, abs=1e-12), (path, clients)


def whole(task, outputs, y, pieces):
    """The measures of outputs that were judged in pieces."""
    totals = {}
    for a, b in zip(outputs.split(pieces), y.split(pieces), strict=True):
        for name, sums in task.judge(a, b).items():
            totals[name] = totals.get(name, 0) + sums
    return task.values(totals)


def test_measures_are_scikit_learns_whatever_the_pieces():
    from sklearn import metrics as theirs  # here: other tests' processes do without its seconds

    g = torch.Generator().manual_seed(1)
    n = 300
    logits = torch.randn(n, 7, generator=g, dtype=F64).to(torch.bfloat16).double()  # AUC's scores have 16 bits
    y = torch.randint(0, 6, (n,), generator=g)  # the last class never occurs
    task, p = make_task("classification", Asked(metrics="accuracy,top5,f1,perplexity,auc")), logits.softmax(1).numpy()
    found, pred, there = whole(task, logits, y, 7), logits.argmax(1).numpy(), np.unique(y)
    assert found == pytest.approx(whole(task, logits, y, n), rel=1e-12)
    assert found["accuracy"] == theirs.accuracy_score(y, pred)
    assert found["top5"] == theirs.top_k_accuracy_score(y, p, k=5, labels=range(7))
    assert found["f1"] == pytest.approx(theirs.f1_score(y, pred, average="macro"), rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(theirs.log_loss(y, p, labels=range(7))), rel=1e-9)
    odds = np.log(p) - np.log1p(-p)
    areas = [theirs.roc_auc_score(y == c, odds[:, c]) for c in there]
    assert found["auc"] == pytest.approx(np.mean(areas), abs=2e-3)  # of scores that bfloat16 rounds
    two, labels = logits[:, :2], (y > 2).long()
    apart = make_task("classification", Asked(metrics="auc"))
    score = (two[:, 1] - two[:, 0]).to(torch.bfloat16).double()
    assert whole(apart, two, labels, 11)["auc"] == pytest.approx(theirs.roc_auc_score(labels, score), rel=1e-12)

    many = torch.randint(0, 2, (n, 3), generator=g).to(torch.uint8)
    found = whole(make_task("multi-label", Asked(metrics="accuracy,f1,auc")), logits[:, :3], many.double(), 7)
    assert found["accuracy"] == pytest.approx(((logits[:, :3] > 0) == many.bool()).double().mean().item(), rel=1e-12)
    assert found["f1"] == pytest.approx(theirs.f1_score(many, (logits[:, :3] > 0).long(), average="macro"), rel=1e-12)
    assert found["auc"] == pytest.approx(theirs.roc_auc_score(many, logits[:, :3].numpy()), rel=1e-12)

    numbers = torch.randn(n, 2, generator=g, dtype=F64) + 5
    found = whole(make_task("regression", Asked(metrics="mae,rmse,r2")), logits[:, :2], numbers, 7)
    assert found["mae"] == pytest.approx(theirs.mean_absolute_error(numbers, logits[:, :2]), rel=1e-12)
    assert found["rmse"] ** 2 == pytest.approx(theirs.mean_squared_error(numbers, logits[:, :2]), rel=1e-12)
    assert found["r2"] == pytest.approx(theirs.r2_score(numbers, logits[:, :2]), rel=1e-9)

    tokens = y.reshape(-1, 5).clone()
    tokens[:, 2] = -100
    found = whole(make_task("per-token"), logits.reshape(-1, 5, 7), tokens, 7)
    kept = tokens.flatten() != -100
    assert found["accuracy"] == theirs.accuracy_score(y[kept], pred[kept])
    assert found["loss"] == pytest.approx(theirs.log_loss(y[kept], p[kept], labels=range(7)), rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)


def test_an_evaluation_is_the_tasks_in_pieces_and_of_one_example(monkeypatch):
    for kind in (*TASKS, "own"):
        x, y, outputs = data_for(kind)
        task = Quantiles() if kind == "own" else make_task(kind)
        split = make_partition("iid", np.zeros(len(y), np.int64), 2)
        for rows in (slice(None), slice(1, 2)):
            data = Dataset(x, y, x[rows], y[rows], outputs, (), (), "none")
            problem = Supervised(data, net_for(kind, outputs), split, batch_size=B, task=task, dtype=F64)
            problem.check_evaluation(problem.start())
            want = problem.evaluate(problem.start())
            assert [*want] == [*problem.measures], kind
            loss = torchs(kind, Asked())(net_for(kind, outputs)(x[rows]), y[rows])
            assert want["test_loss"] == pytest.approx(loss.item(), rel=1e-12), kind
            monkeypatch.setattr(Evaluation, "_piece", lambda self, state, x_all: 7)
            assert problem.evaluate(problem.start()) == pytest.approx(want, rel=1e-12), kind
            monkeypatch.undo()


WRONG = {
    "model.loss = 'mse'": {"model.loss": "mse"},
    "r2 is no measure of data.task = 'classification'": {"run.metrics": "r2"},
    "model.label-smoothing = 0.1: is for cross-entropy": {
        "data.task": "regression", "model.label-smoothing": 0.1, "data.dataset": "diabetes",
    },
    "model.class-weights: has 2 numbers, and there are 10 classes": {"model.class-weights": "1,2"},
    "model.class-weights = '1,-2': must be positive": {"model.class-weights": "1,-2"},
    "its targets are labels, and data.task asks for numbers": {"data.task": "regression"},
    "data.task = 'regresion' is not known: did you mean regression": {"data.task": "regresion"},
    "must be a class that derives from fedmom.Task": {"data.task": "math:floor"},
    "run.monitor = 'test_accuracy'": {
        "data.task": "regression", "data.dataset": "diabetes", "run.monitor": "test_accuracy",
    },
}  # fmt: skip


def test_what_is_wrong_of_a_task_is_one_line_before_anything_is_trained(tmp_path):
    for said, changes in WRONG.items():
        config = {"model.name": "mlp", "run.num-rounds": 1, "data.num-clients": 2, **changes}
        with pytest.raises(InputError) as error:
            fedmom.run(config, out=tmp_path / "run", callbacks=[])
        assert said in str(error.value), (said, str(error.value))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run" / "rounds.jsonl").exists()
