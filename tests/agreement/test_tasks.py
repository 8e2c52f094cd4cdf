"""Every task on Ray's actors and in a simulation: the engine's x and u, and its measures. All slow."""

import textwrap

import numpy as np
import pytest

import fedmom
from fedmom.tasks.kinds import TASKS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.xdist_group("Ray: tasks")]

OWN = """
    import numpy as np, torch, fedmom
    from torch import nn

    class Quantile(fedmom.Task):
        targets, metrics = "numbers", ("exceeded",)

        def loss(self, outputs, targets):
            away = targets - outputs
            return torch.maximum(0.9 * away, -0.1 * away).mean()

        def measure(self, outputs, targets):
            return {"exceeded": ((targets > outputs).sum(), targets.numel())}

    def tokens(shape, vocabulary):
        return nn.Sequential(nn.Embedding(vocabulary, 8), nn.LayerNorm(8), nn.Linear(8, vocabulary))

    def text():
        rng = np.random.default_rng(0)
        x = rng.integers(0, 9, (80, 6))
        y = np.where(rng.random((80, 6)) < 0.2, -100, (x + 1) % 9)
        return x[:60], y[:60], x[60:], y[60:]

    class Sides(nn.Module):
        def __init__(self, shapes, classes):
            super().__init__()
            self.left, self.right = (nn.Linear(shapes[name][0], classes) for name in ("left", "right"))

        def forward(self, right, left):
            return self.left(left) * torch.sigmoid(self.right(right))

    def two():
        x = np.random.default_rng(0).normal(size=(80, 6))
        parts = {"left": x[:, :2], "right": x[:, 2:]}
        train, test = ({n: v[rows] for n, v in parts.items()} for rows in (slice(60), slice(60, None)))
        y = np.arange(80) % 3
        return train, y[:60], test, y[60:]
"""
BASE = {
    "data.num-clients": 5,
    "data.batch-size": 4,
    "model.name": "mlp",
    "model.hidden": 8,
    "algorithm.nesterov": True,
    "algorithm.num-local-steps": 3,
    "run.num-rounds": 2,
    "run.dtype": "float64",
}
RUNS = {
    "regression": {"data.dataset": "diabetes", "algorithm.lr": 1e-4},
    "multi-label": {"data.dataset": "digit-traits", "run.metrics": "accuracy,f1,auc"},
    "per-token": {"data.dataset": "mine:text", "model.name": "mine:tokens", "data.partition": "iid"},
    "mine:Quantile": {"data.dataset": "diabetes", "algorithm.lr": 1e-3},
    "classification": {"data.dataset": "mine:two", "model.name": "mine:Sides"},
}


def test_every_task_is_the_engines_on_actors_and_in_a_simulation(tmp_path, monkeypatch):
    assert {*TASKS} <= {*RUNS}
    (tmp_path / "mine.py").write_text(textwrap.dedent(OWN), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    quiet = {"callbacks": [fedmom.Callback()]}
    for task, changes in RUNS.items():
        config = {**BASE, "data.task": task, **changes}
        want = fedmom.run(config, **quiet)
        ways = {"workers": {"engine.workers": 2}, "simulation": {"run.backend": "simulation"}}
        for way, more in ways.items():
            got = fedmom.run({**config, **more, "simulation.num-actors": 2, "simulation.num-cpus": 0.5}, **quiet)
            for part in ("state_dict", "momentum"):
                ours, theirs = getattr(want, part), getattr(got, part)
                off = sum(float((ours[n] - theirs[n]).square().sum()) for n in ours) ** 0.5
                assert off <= 1e-10 * sum(float(t.square().sum()) for t in ours.values()) ** 0.5, (task, way, part)
            for mine, other in zip(want.rounds, got.rounds, strict=True):
                names = [name for name in mine if name.startswith(("test_", "train_"))]
                assert len(names) > 2, (task, way)
                np.testing.assert_allclose([other[n] for n in names], [mine[n] for n in names], rtol=1e-9)
