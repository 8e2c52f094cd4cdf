"""The names of algorithm.personal: what they mean for a model, and what is refused in one line."""

import copy
import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data.partition import make_partition
from fedmom.errors import InputError
from fedmom.tasks.models.adapters import lora
from fedmom.tasks.models.personal import personal_names
from fedmom.tasks.places import Places
from fedmom.tasks.supervised import Supervised
from laws import table
from runs import F64, run_plan, simple_plan, tiny_images

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import personal as example


class ScaleNorm(nn.Module):
    """A normalisation layer of somebody else's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Within(nn.Module):
    """A layer that has a norm; its own parameter is none of it."""

    def __init__(self):
        super().__init__()
        self.gain, self.norm = nn.Parameter(torch.ones(4)), nn.LayerNorm(4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.between, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
        self.out.weight = self.words.weight


def frozen(model, name):
    model.get_parameter(name).requires_grad_(False)
    return model


def named(**layers):
    return nn.Sequential(OrderedDict(layers))


BATCH = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
NORMS = named(
    fc=nn.Linear(4, 4),
    batch=nn.BatchNorm2d(4),
    layer=nn.LayerNorm(4),
    group=nn.GroupNorm(2, 4),
    instance=nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    rms=nn.RMSNorm(4),
    sync=nn.SyncBatchNorm(4),
    other=ScaleNorm(),
    within=Within(),
)
OF_NORMS = [f"{layer}.{name}" for layer in ("batch", "instance", "sync") for name in BATCH]
OF_NORMS += ["layer.weight", "layer.bias", "group.weight", "group.bias", "rms.weight", "other.weight"]
OF_NORMS += ["within.norm.weight", "within.norm.bias"]
DEEP = named(a=named(b=nn.Linear(2, 2), b1=nn.Linear(2, 2)), c=nn.BatchNorm1d(2), d=nn.Linear(2, 2), relu=nn.ReLU())


@table(
    "model, wanted, right",
    [
        (NORMS, "norm", OF_NORMS),
        (named(a=nn.Linear(2, 2), b=nn.BatchNorm1d(2, affine=False)), "norm", [f"b.{name}" for name in BATCH[2:]]),
        (DEEP, "head", ["d.weight", "d.bias"]),
        (DEEP, "a.b", ["a.b.weight", "a.b.bias"]),  # and not a.b1
        (DEEP, "a.b, c.running_mean, c.running_var", ["a.b.weight", "a.b.bias", "c.running_mean", "c.running_var"]),
        (DEEP, "d.weight,,head", ["d.weight", "d.bias"]),
        (frozen(copy.deepcopy(DEEP), "d.weight"), "head", ["d.bias"]),
        (frozen(frozen(copy.deepcopy(DEEP), "d.weight"), "d.bias"), "head", [f"c.{name}" for name in BATCH]),
        (Tied(), "head", ["words.weight", "out.bias"]),
        (Tied(), "out.weight", ["words.weight"]),
        (lora(named(a=nn.Linear(2, 2), b=nn.Linear(2, 2)), 1), "head", ["b.down.weight", "b.up.weight"]),
        (
            named(a=nn.Linear(2, 2), b=weight_norm(nn.Linear(2, 2))),
            "head",
            ["b.bias", *(f"b.parametrizations.weight.original{i}" for i in (0, 1))],
        ),
        (DEEP, "", []),
        (DEEP, " , ", []),
    ],
)
def test_names_are_those_of_the_models_tensors(model, wanted, right):
    assert personal_names(model, Places(model), wanted) == set(right)


ALL = "is every trained parameter, so that nothing would be averaged; name fewer"


@table(
    "model, wanted, words",
    [
        (
            DEEP,
            "c,layer4",
            "no trained parameter or averaged buffer is called 'layer4' or begins with 'layer4.'; there are a.b.w",
        ),
        (
            DEEP,
            "d.wei",
            "no trained parameter or averaged buffer is called 'd.wei' or begins with 'd.wei.'; there are ",
        ),
        (DEEP, "relu", "no trained parameter or averaged buffer is called 'relu'"),
        (spectral_norm(nn.Linear(2, 2)), "norm", "the model has no normalisation layer with tensors that move; there"),
        (
            frozen(named(a=nn.Linear(2, 2)), "a.weight"),
            "a.weight",
            "no trained parameter or averaged buffer is called 'a.weight'",
        ),
        (DEEP, "a, c.running_var", "has c.running_var and not c.running_mean, and the two are one statistic"),
        (DEEP, "c.running_mean", "has c.running_mean and not c.running_var, and the two are one statistic"),
        (DEEP, "a,norm,d", ALL),
        (nn.Linear(2, 2), "head", ALL),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(model, wanted, words):
    with pytest.raises(InputError, match=re.escape(f"algorithm.personal = {wanted!r}: {words}")) as error:
        personal_names(model, Places(model), wanted)
    assert "\n" not in str(error.value)


def test_what_has_no_part_for_a_client_is_refused_before_anything_is_read():
    for changes, words in (
        ({"data.dataset": "quadratic"}, "data.dataset = 'quadratic' has no model"),
        ({"algorithm.personal": " , "}, "names nothing; name norm, head or beginnings of names by commas"),
        ({"algorithm.name": "d-sgd-m"}, "needs Algorithm 1, and d-sgd-m is Algorithm 2"),
        (
            {"server.strategy": "fedavg", "run.backend": "simulation"},
            "needs server.strategy = 'pr-sgd-m', not 'fedavg'",
        ),
    ):
        with pytest.raises(
            InputError, match=re.escape(f"algorithm.personal = {changes.get('algorithm.personal', 'norm')!r}: {words}")
        ):
            resolve(load({"algorithm.personal": "norm", **changes}))


# --- the example's algorithms, against plain loops -----------------------------------------------------------------


def problem_of(build, task=None, personal=""):
    data = tiny_images(40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = build((1, 8, 8), 3)
    partition = make_partition("dirichlet-client", data.y_train.numpy(), 3, alpha=0.5, seed=1)
    twin = copy.deepcopy(model).double()
    return Supervised(data, model, partition, batch_size=5, dtype=F64, task=task, personal=personal), twin


def by_hand(problem, model, beta, loss, own, change):
    """Three rounds of six steps of three clients -> their models, which agree but in what is `own`, (name) -> bool.

    change(step, {name: p}, {name: p at the start}): what is done to p.grad.
    """
    models, momenta = [copy.deepcopy(model) for _ in range(3)], [{}, {}, {}]
    for r in range(3):
        for c, one in enumerate(models):
            moving = dict(one.named_parameters())
            start = {n: p.detach().clone() for n, p in moving.items()}
            sgd = torch.optim.SGD(moving.values(), 0.05, beta)
            for n, u in momenta[c].items():
                sgd.state[moving[n]]["momentum_buffer"] = u.clone()
            for s, rows in enumerate(problem.sampler.draw(torch.tensor([c]), torch.tensor([6 * r]), 6)[0]):
                sgd.zero_grad()
                x = (problem.dataset.x_train[rows].double() / 255 - 0.4) / 0.3
                loss(one(x), problem.dataset.y_train[rows]).backward()
                change(s, moving, start)
                sgd.step()
            momenta[c] = {n: sgd.state[p]["momentum_buffer"] for n, p in moving.items()} if beta else {}
        for tensors in ([one.state_dict() for one in models], momenta):
            for n in [n for n, v in tensors[0].items() if not own(n) and v.is_floating_point()]:
                mean = sum(one[n] for one in tensors) / 3
                for one in tensors:
                    one[n].copy_(mean)
    return models


def compare(problem, models, own, correction, beta, path):
    plan = simple_plan(3, num_local_steps=6, beta=beta, running_var="mean")
    plan = plan._replace(method=plan.method._replace(correction=correction))
    done, _ = run_plan(problem, plan, path=path, chunk_size=2)
    states, mine = [one.state_dict() for one in models], done.own
    for tree, rows in ((done.state.params, mine.params), (done.state.buffers, mine.buffers)):
        assert {*rows} == {name for name in tree if own(name)}
        for name in tree:
            want = torch.stack([state[name] for state in states])
            got = rows[name] if name in rows else tree[name].expand(want.shape)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.slow
def test_the_examples_fedrep_is_a_loop_of_head_steps_and_body_steps():
    problem, model = problem_of(example.small, personal="head")

    def own(name):
        return name.startswith("head.")

    def change(step, moving, start):
        for name, p in moving.items():
            if own(name) != (step < 4):
                p.grad.zero_()

    for beta, path in ((0.0, "vmap"), (0.9, "loop")):
        compare(problem, by_hand(problem, model, beta, cross_entropy, own, change), own, example.FedRep(), beta, path)


@pytest.mark.slow
def test_the_examples_ditto_is_two_loops_with_a_pull():
    """The shared model is what it is without the own one; the own one is pulled to where the shared one began."""
    problem, model = problem_of(example.two, example.Ditto(), "own")

    def own(name):
        return name.startswith("own.")

    def loss(outputs, y):
        return sum(cross_entropy(one, y) for one in outputs)

    def change(step, moving, start):
        for name, p in moving.items():
            if own(name):
                p.grad += 0.5 * (p.detach() - start["shared." + name.removeprefix("own.")])

    for beta, path in ((0.0, "loop"), (0.9, "vmap")):
        models = by_hand(problem, model, beta, loss, own, change)
        compare(problem, models, own, example.towards_shared, beta, path)
    state = problem.start()
    others = {name: 0 * x if name.startswith("shared.") else x for name, x in state.params.items()}
    judged = [problem.evaluate(one)["test_accuracy"] for one in (state, state._replace(params=others))]
    assert judged[0] == judged[1], "the own model is judged"
