"""A small GPT of token ids, adapters beside frozen layers, and models that begin where another run ended."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedmom
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.errors import InputError
from fedmom.records.files import FINAL
from fedmom.tasks.kinds import make_task
from fedmom.tasks.models import build_model

GPT = {
    "data.dataset": "tokens.npz",
    "data.task": "per-token",
    "data.partition": "iid",
    "data.num-clients": 2,
    "data.batch-size": 2,
    "model.name": "gpt",
    "model.hidden": 8,
    "model.layers": 1,
    "model.heads": 2,
    "algorithm.num-local-steps": 1,
    "run.num-rounds": 1,
    "engine.path": "loop",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where tokens.npz lies: each token is followed by the next one of five."""
    monkeypatch.chdir(tmp_path)
    x = np.arange(12)[:, None] % 5 + np.arange(4) % 2
    write(x % 5)
    return tmp_path


def write(x, name="tokens"):
    np.savez(f"{name}.npz", x_train=x[:8], y_train=(x[:8] + 1) % 5, x_test=x[8:], y_test=(x[8:] + 1) % 5)


def refused(*words, **sets):
    sets = {f"{section}.{key}": value for name, value in sets.items() for section, _, key in [name.partition("_")]}
    with pytest.raises(InputError) as caught:
        fedmom.run({**GPT, **{name.replace("_", "-"): value for name, value in sets.items()}})
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_token_sees_those_before_it_and_the_head_is_the_words():
    model = build_model("gpt", (4,), 5, seed=0, hidden=8, layers=2, heads=2)
    x = torch.tensor([[0, 1, 2, 3]])
    y = model(x)
    assert y.shape == (1, 4, 5)
    for t in range(1, 4):
        other = x.clone()
        other[0, t] = 4
        differs = (model(other) != y).any(-1)[0]
        assert differs.tolist() == [s >= t for s in range(4)]
    # words and places, two layers of 12 d² + 13 d, and the last norm
    assert sum(p.numel() for p in model.parameters()) == (5 + 4) * 8 + 2 * (12 * 64 + 13 * 8) + 16
    assert model.head.weight is model.words.weight


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
            self.encode = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 6, 0.0, batch_first=True), 1)
            self.again = self.first = nn.Linear(8, 8)
            self.head.weight = self.words.weight

        def forward(self, x):
            return self.head(self.again(self.first(self.encode(self.words(x)))))

    x = torch.tensor([[0, 1, 2]])
    for model in (Net(), nn.Linear(3, 2)):
        x = x if isinstance(model, Net) else torch.rand(2, 3)
        before = model(x)
        found = fedmom.lora(model, 2)
        assert torch.equal(found(x), before)
        trained = {n: list(p.shape) for n, p in found.named_parameters() if p.requires_grad}
        if isinstance(model, Net):
            layers = {"encode.layers.0.linear1": (8, 6), "encode.layers.0.linear2": (6, 8), "again": (8, 8)}
        else:
            layers = {"": (3, 2)}
        shapes = {}
        for name, (size_in, size_out) in layers.items():
            at = f"{name}." if name else ""
            shapes |= {f"{at}down.weight": [2, size_in], f"{at}up.weight": [size_out, 2]}
        assert trained == shapes
        for name, p in found.named_parameters():  # torch's fused layer in evaluation must not pass them by
            if name.endswith("up.weight"):
                nn.init.normal_(p)
        moved = found(x)
        with torch.no_grad():
            assert not torch.allclose(moved, before)
            try:
                judged = found.eval()(x)
            except AttributeError as error:  # it looks for the weights of an nn.Linear
                pytest.fail(f"torch's fused layer was called: {error}")
            torch.testing.assert_close(judged, moved)
    for model, rank in ((nn.Linear(1, 1), 0), (nn.Conv1d(1, 1, 1), 1)):
        with pytest.raises(InputError, match=f"rank = {rank}"):
            fedmom.lora(model, rank)


def test_a_run_begins_where_another_ended_and_sends_adapters_alone(folder):
    fedmom.run(GPT, out="base")
    drawn, begun = (resolve(load(GPT, {"model.lora-rank": 1, "model.start": start})) for start in ("", f"base/{FINAL}"))
    assert ("model.start begins from a trained one" in str(drawn.notes), begun.notes) == (True, ())
    base = load_file(f"base/{FINAL}")
    begun = build_model(
        "gpt", (4,), 5, seed=9, hidden=8, layers=1, heads=2, task=make_task("per-token"), start=f"base/{FINAL}"
    )
    for name, p in begun.named_parameters():
        assert torch.equal(p, base[f"params/{name}"]), name
    tuned = {**GPT, "model.start": f"base/{FINAL}", "model.lora-rank": 1, "run.num-rounds": 2}
    result = fedmom.run(tuned, out="tuned")
    after = load_file(f"tuned/{FINAL}")
    numbers = sum(t.numel() for n, t in after.items() if n.startswith("params/"))
    assert numbers == (8 + 24) + (8 + 8) + (8 + 32) + (32 + 8)  # r (in + out) of the four dense layers
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in after} == {"down", "up"}
    assert result.rounds[-1]["bytes_sent"] == 2 * 2 * 2 * 4 * numbers  # rounds, clients, x and u, float32
    # The frozen model belongs to what the run is.
    save_file({n: t + 1 for n, t in base.items()}, f"base/{FINAL}")
    with pytest.raises(InputError, match=r"model.start = .*was changed since"):
        fedmom.run(resume="tuned", sets={"run.num-rounds": 3})


def test_what_a_model_cannot_begin_from_is_one_line(folder):
    refused("model.start = 'no.safetensors'", "cannot be read", model_start="no.safetensors")
    own = dict(build_model("gpt", (4,), 5, seed=0, hidden=8, layers=1, heads=2).named_parameters())
    own = {n: p.detach() for n, p in own.items()}
    for change, words in (
        ({"norm.bias": None}, "has no norm.bias, which the model has"),
        ({"other": torch.zeros(1)}, "has other, which the model has not"),
        ({"norm.bias": torch.zeros(9)}, "has norm.bias of shape [9], and the model [8]"),
    ):
        save_file({n: t for n, t in {**own, **change}.items() if t is not None}, "some.safetensors")
        refused("model.start = 'some.safetensors'", words, model_start="some.safetensors")


def test_what_a_gpt_cannot_take_is_one_line(folder):
    refused("model.heads = 3", "must divide model.hidden = 8", model_heads=3)
    refused("model.name = 'mlp'", "takes real numbers", model_name="mlp")
    refused("model.lora-rank = -1", "must be >= 0", model_lora_rank=-1)
    np.savez(
        "labels.npz", x_train=np.eye(4, dtype=int), y_train=[0, 1] * 2, x_test=np.eye(4, dtype=int), y_test=[0] * 4
    )
    refused("model.name = 'gpt'", "'per-token'", data_dataset="labels.npz", data_task="classification")
    x = np.zeros((12, 4), dtype=int)
    x[0] = 9
    np.savez("large.npz", x_train=x, y_train=x % 5, x_test=x, y_test=x % 5)
    refused("large.npz", "has a token 9", "0 to 4", data_dataset="large.npz")
    np.savez("real.npz", x_train=x.astype(np.float32), y_train=x % 5, x_test=x.astype(np.float32), y_test=x % 5)
    refused("real.npz", "float32 [12, 4]", "token ids", data_dataset="real.npz")
