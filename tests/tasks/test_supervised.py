"""What leaves a task: state dicts of odd models, and paths that a model cannot take."""

import pytest
import torch
from torch import nn

import fedmom
from fedmom.data.partition import make_partition
from fedmom.tasks.models import build_model
from fedmom.tasks.supervised import Batch, Supervised
from runs import image_problem, run_plan, simple_plan, tiny_images

QUIET = [fedmom.Callback()]
MODELS = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self, size, classes):
        super().__init__()
        self.layer = nn.Linear(size, classes)
    def forward(self, x):
        x = x.flatten(1)
        return self.layer(x if x.abs().max().item() < 1e9 else 0 * x)

def branching(shape, classes):
    return Branching(shape.numel() if hasattr(shape, "numel") else shape[0] * shape[1] * shape[2], classes)

def normed(shape, classes):
    size = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))
"""


class Odd(nn.Module):
    """A frozen weight, a tied pair and a buffer that state_dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(64, 8).requires_grad_(False)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.last = nn.Linear(8, 3)
        self.register_buffer("hidden", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.last(self.second(torch.tanh(self.first(self.frozen(x.flatten(1))))) * self.hidden)


def test_state_dict_fits_the_model_whatever_is_frozen_tied_or_hidden():
    data = tiny_images()
    partition = make_partition("iid", data.y_train.numpy(), 3)
    before = Odd().state_dict()
    model = Odd()
    model.load_state_dict(before)
    problem = Supervised(data, model, partition, batch_size=5)
    done, _ = run_plan(problem, simple_plan(3), path="vmap")
    got = problem.state_dict(done.state)
    fresh = Odd()
    fresh.load_state_dict(got)
    assert torch.equal(got["frozen.weight"], before["frozen.weight"])
    assert torch.equal(got["first.weight"], got["second.weight"])
    assert not torch.equal(got["first.weight"], before["first.weight"])
    assert "hidden" not in got
    x = torch.randn(4, 1, 8, 8)
    want = torch.func.functional_call(model, {**done.state.params, **done.state.buffers}, (x,))
    torch.testing.assert_close(fresh(x), want)


@pytest.fixture
def own_models(in_tmp, monkeypatch):
    import sys

    (in_tmp / "own_models.py").write_text(MODELS)
    yield
    sys.modules.pop("own_models", None)


def config(model: str, **data) -> dict:
    return {"data": {"num_clients": 3, **data}, "model": {"name": model}, "run": {"num_rounds": 2}}


def test_auto_takes_the_loop_where_a_model_cannot_be_stacked(own_models):
    notes = []

    class Listen(fedmom.Callback):
        def on_start(self, start):
            notes.extend(start.notes)

    result = fedmom.run(config("own_models:branching"), callbacks=[Listen()])
    assert result.config.engine.path == "loop"
    assert any("cannot be stacked" in note for note in notes)


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_vmap_of_such_a_model_is_one_line_and_leaves_no_folder(own_models, in_tmp, chunk_size):
    sets = {"engine.path": "vmap", "engine.chunk-size": chunk_size}
    with pytest.raises(fedmom.InputError, match=r"engine\.path = 'vmap'.*use loop") as error:
        fedmom.run(config("own_models:branching"), sets=sets, out="run", callbacks=QUIET)
    assert "\n" not in str(error.value)
    assert not (in_tmp / "run").exists()


def test_batch_of_one_with_batch_norm_is_one_line(own_models):
    with pytest.raises(fedmom.InputError, match=r"data\.batch-size.*more than 1 value per channel") as error:
        fedmom.run(config("own_models:normed", batch_size=1), callbacks=QUIET)
    assert "\n" not in str(error.value)


def test_baselines_say_what_they_overrule_from_python_too():
    with pytest.warns(UserWarning, match="overrules beta"):
        fedmom.run(
            {"algorithm": {"name": "local-sgd", "beta": 0.9}, "model": {"name": "logistic"}, "run": {"num_rounds": 1}}
        )


class Partly(Odd):
    """… and a layer that the loss does not depend on, BatchNorm, and a buffer made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(64)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.copy_(self.first.weight.sum())
        return super().forward(self.norm(x.flatten(1)))


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet20", "odd"])
def test_the_gradient_alone_is_the_gradient(model):
    data = tiny_images()
    net = Partly() if model == "odd" else build_model(model, data.x_train.shape[1:], 3, seed=0)
    problem = Supervised(data, net, make_partition("iid", data.y_train.numpy(), 3), batch_size=5, dtype=torch.float64)
    first = torch.zeros(1, dtype=torch.int64)
    batch = Batch(*(field[0] for field in next(iter(problem.round_batches(first, first, 1)))))
    start = problem.start()
    before = {name: value.clone() for name, value in {**start.params, **start.buffers}.items()}
    with torch.no_grad():  # whatever is around it
        alone = problem.gradient_alone(start.params, start.buffers, batch)
    for found, right in zip(alone[:2], problem.gradient(start.params, start.buffers, batch)[:2], strict=True):
        assert found.keys() == right.keys()
        for name, value in right.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
            assert not found[name].requires_grad
    assert not alone[2].requires_grad
    assert all(torch.equal({**start.params, **start.buffers}[name], value) for name, value in before.items())


def test_every_step_of_every_client_drops_out_otherwise():
    """Keys go by client and step, whoever asks from which step on."""
    problem, clients = image_problem("cnn", 3), torch.arange(3)
    keys = torch.stack([batch.dropout_key for batch in problem.round_batches(clients, torch.zeros_like(clients), 4)])
    assert len(keys.unique()) == 12
    (later,) = problem.round_batches(clients[1:], torch.full((2,), 3), 1)
    assert torch.equal(later.dropout_key, keys[3, 1:])


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_evaluation_is_the_models_own_in_eval_mode(name):
    """Without dropout and by the running statistics, on the test examples."""
    problem, data = image_problem(name), tiny_images()
    net = build_model(name, tuple(data.x_train.shape[1:]), 3, seed=3, hidden=8).double().eval()
    with torch.no_grad():
        logits = net((data.x_test.double() / 255 - 0.4) / 0.3)
    found = problem.evaluate(problem.start())
    assert found["test_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, data.y_test)), rel=1e-9)
    assert found["test_accuracy"] == float((logits.argmax(1) == data.y_test).double().mean())
