"""Transformers, adapters and frozen layers: every path is plain torch, and what is frozen is one product for all."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmom.data.datasets import Dataset
from fedmom.data.partition import make_partition
from fedmom.engine.stacked.folded.clients import FoldError
from fedmom.engine.stacked.folded.embeddings import common_indexes
from fedmom.engine.stacked.steps import Stack
from fedmom.rounds.plan import beginning, round_job
from fedmom.tasks.kinds import make_task
from fedmom.tasks.models.adapters import lora
from fedmom.tasks.models.gpt import GPT
from fedmom.tasks.supervised import Supervised
from runs import F64, run_plan, simple_plan

WORDS, LENGTH, BATCH, LR, BETA, ROUNDS, STEPS = 7, 5, 3, 0.1, 0.8, 2, 2


class Encoder(nn.Module):
    """torch's own layers: a padding_idx, positions held by the module, a causal mask, a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8, padding_idx=0)
        self.places = nn.Parameter(torch.randn(1, LENGTH, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))
        self.head = nn.Linear(8, WORDS)

    def forward(self, tokens):
        h = self.words(tokens) + self.places
        return self.head(self.encode(h, mask=self.mask))


MODELS = {
    "gpt": lambda: GPT(LENGTH, WORDS, 8, 1, 2),
    "gpt with adapters": lambda: lora(GPT(LENGTH, WORDS, 8, 1, 2), 2),
    "encoder": Encoder,
    "encoder with adapters": lambda: lora(Encoder(), 1),
}


def made(build):
    torch.manual_seed(0)
    net = build().double()
    with torch.no_grad():  # adapters that are 0 would hide the frozen products
        for name, parameter in net.named_parameters():
            if name.endswith("up.weight"):
                parameter.normal_()
    return net


def problem(net, num_clients, batch_size=BATCH):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(WORDS, (40, LENGTH), generator=generator)
    y = torch.where(torch.rand(x.shape, generator=generator) < 0.2, -100, (x + 1) % WORDS)
    data = Dataset(x, y, x[:6], y[:6], WORDS, (), (), "none")
    partition = make_partition("iid", torch.zeros(40).numpy(), num_clients, seed=2)
    return Supervised(data, net, partition, batch_size=batch_size, dtype=F64, task=make_task("per-token"))


def by_plain_torch(net, of, num_clients, nesterov):
    """Algorithm 1: deep copies, loss.backward(), torch.optim.SGD, averages of x and of u."""
    clients = [copy.deepcopy(net).train() for _ in range(num_clients)]
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    x = {n: p.detach().clone() for n, p in net.named_parameters() if n in names}
    u = {n: torch.zeros_like(t) for n, t in x.items()}
    for r in range(ROUNDS):
        ends = []
        for c, client in enumerate(clients):
            params = {n: p for n, p in client.named_parameters() if n in names}
            sgd = torch.optim.SGD(params.values(), LR, BETA, nesterov=nesterov)
            for n, p in params.items():
                p.data.copy_(x[n])
                sgd.state[p]["momentum_buffer"] = u[n].clone()
            for rows in of.sampler.draw(torch.tensor([c]), torch.tensor([r * STEPS]), STEPS)[0]:
                sgd.zero_grad(set_to_none=False)
                logits = client(of.dataset.x_train[rows])
                cross_entropy(logits.flatten(0, 1), of.dataset.y_train[rows].flatten()).backward()
                sgd.step()
            ends.append(({n: p.detach() for n, p in params.items()}, {n: sgd.state[p] for n, p in params.items()}))
        x = {n: torch.stack([end[0][n] for end in ends]).mean(0) for n in names}
        u = {n: torch.stack([end[1][n]["momentum_buffer"] for end in ends]).mean(0) for n in names}
    return x, u


@pytest.mark.filterwarnings("ignore:.*performance drop")
@pytest.mark.parametrize("name", MODELS)
def test_every_path_is_plain_torch(name):
    """Options I and II, 1, 2 and 5 clients, chunks of which the last is shorter."""
    for num_clients, nesterov, chunk_size in ((1, False, 1), (2, True, 2), (5, False, 3)):
        plan = simple_plan(
            num_clients, num_rounds=ROUNDS, lr=LR, beta=BETA, batch_size=BATCH, num_local_steps=STEPS, nesterov=nesterov
        )
        x, u = by_plain_torch(made(MODELS[name]), problem(made(MODELS[name]), num_clients), num_clients, nesterov)
        for path in ("loop", "vmap", "stack", "factors"):
            of = problem(made(MODELS[name]), num_clients)
            done, _ = run_plan(of, plan, path=path, chunk_size=1 if path == "loop" else chunk_size)
            assert done.state.params.keys() == x.keys(), "what is sent is what is trained"
            for n in x:
                said = f"{path}, {num_clients} clients: {n}"
                torch.testing.assert_close(done.state.params[n], x[n], rtol=1e-11, atol=1e-11, msg=said)
                torch.testing.assert_close(done.state.momentum[n], u[n], rtol=1e-11, atol=1e-11, msg=said)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made, of those that are no views of a model's parameters."""

    def __init__(self, net) -> None:
        super().__init__()
        self.numbers, self.own = 0, {p.untyped_storage().data_ptr() for p in net.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        held = [(t.untyped_storage(), t.itemsize) for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        self.numbers = max([self.numbers, *(h.nbytes() // size for h, size in held if h.data_ptr() not in self.own)])
        return found


class Wide(nn.Module):
    """Mostly weights: 12 · 64² in its layer, 5 tokens a client."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encode = nn.Embedding(WORDS, 64), nn.TransformerEncoderLayer(64, 2, 256, 0.0, batch_first=True)
        self.head = nn.Linear(64, WORDS)

    def forward(self, tokens):
        return self.head(self.encode(self.words(tokens)))


def test_what_is_frozen_has_no_copy_per_client():
    """Nothing as large as a frozen weight is made in a round, however many clients; where it is trained, K are."""
    largest = {}
    for trained in (False, True):
        for K in (2, 8):
            net = made(Wide)
            net = net if trained else lora(net, 1).double()
            of, plan = problem(net, K, batch_size=1), simple_plan(K, num_local_steps=2, batch_size=1)
            stack = Stack(of, plan.method)
            begin = beginning(of, plan)
            job = round_job(of, plan, begin)
            frozen = {id(p) for p in net.parameters() if not p.requires_grad}
            assert frozen <= {id(p) for p in stack.model.parameters()}, "the folded model has the model's own"
            with Largest(of.model) as seen:
                stack.run(begin.state, job)
            largest[trained, K] = seen.numbers
    assert largest[True, 8] == 4 * largest[True, 2] >= 8 * 64 * 256
    assert largest[False, 8] < 64 * 256


def test_the_index_of_positions_is_told_from_that_of_words():
    class Net(nn.Module):
        def __init__(self, way) -> None:
            super().__init__()
            self.words, self.places, self.way = nn.Embedding(WORDS, 2), nn.Embedding(LENGTH, 2), way

        def forward(self, x):
            self.places(self.way(x))
            return self.words(x)

    x = torch.zeros(3, LENGTH, dtype=torch.int64)
    places = torch.arange(LENGTH)
    for way in (lambda x: places, lambda x: places[None], lambda x: places[:1]):
        assert common_indexes(Net(way), x) == {"places"}
    for way in (lambda x: places.expand(len(x), -1), lambda x: places.expand(len(x), -1)[..., None].squeeze(-1)):
        assert common_indexes(Net(way), x) == set()
    for way in (lambda x: places.expand(len(x), -1).T, lambda x: torch.zeros(len(x) + 1, 1, dtype=torch.int64)):
        with pytest.raises(FoldError, match="'places' has an index whose first axis is not the examples'"):
            common_indexes(Net(way), x)
