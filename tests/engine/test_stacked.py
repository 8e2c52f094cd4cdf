"""The folded model, in rows and in factors, is the plain loop: every layer, option, policy, chunk, number of steps."""

import contextlib

import pytest
import torch
from torch import nn

from fedmom.data.datasets import Dataset
from fedmom.data.partition import make_partition
from fedmom.engine.auto import choose
from fedmom.engine.engine import Engine
from fedmom.engine.stacked import means
from fedmom.engine.stacked.convolutions import CONVOLUTIONS
from fedmom.engine.stacked.factors import numbers, pays
from fedmom.engine.stacked.folded import layers
from fedmom.engine.stacked.folded.clients import FoldError
from fedmom.engine.stacked.folded.fold import fold
from fedmom.engine.stacked.steps import Stack
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning, round_job
from fedmom.tasks.dropout import address_dropout
from fedmom.tasks.models import build_model
from fedmom.tasks.places import BoundedGathers
from fedmom.tasks.supervised import Supervised
from runs import F64, image_problem, run_plan, simple_plan, tiny_images

FACTORS = {"rows": False, "factors": None}  # None: every dense layer that can be
forms = pytest.mark.parametrize("form", FACTORS)


class Attention(nn.Module):
    """Tokens -> classes: Embedding, LayerNorm and dense layers over [B, L, d], attention in between."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.qkv, self.out = nn.Linear(6, 18, bias=False), nn.Linear(6, num_classes)

    def forward(self, tokens):
        h = self.norm(self.embed(tokens))
        q, k, v = self.qkv(h).chunk(3, -1)
        h = h + torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.out(h.mean(1))


class Block(nn.Module):
    """A residual block with everything that has channels."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, stride=2, bias=False), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, "valid")
        )
        self.body[3] = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=2, dilation=1)
        self.short, self.drop, self.head = nn.Conv2d(1, 4, 1, stride=2), nn.Dropout2d(0.3), nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.body(x) + self.short(x))).flatten(1))


class Tied(nn.Module):
    """One layer used twice, and two layers with one weight: dense weights that cannot be in factors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(64, 8), nn.Linear(8, 8)
        self.other, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.other.weight = self.again.weight

    def forward(self, x):
        h = torch.tanh(self.first(x.flatten(1)))
        return self.head(self.other(torch.tanh(self.again(torch.tanh(self.again(h))))))


def made(build):
    """image_task with a model of our own."""

    def problem(num_clients=3, **options):
        data = options.pop("data", tiny_images())
        torch.manual_seed(0)
        net = address_dropout(build())
        partition = make_partition("dirichlet-client", data.y_train.numpy(), num_clients, alpha=0.5, seed=1)
        options.setdefault("batch_size", 5)
        return Supervised(data, net, partition, dtype=options.pop("dtype", F64), **options)

    return problem


def named(name, **fixed):
    side = 4 if name == "resnet20" else 8
    return lambda num_clients=3, **options: image_problem(
        name, num_clients, data=tiny_images(side=side), **fixed, **options
    )


def tokens(num_clients=3, **options):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(7, (60, 5), generator=generator), torch.arange(60) % 3
    data = Dataset(x, y, x[:20], y[:20], 3, (0.0,), (1.0,), "none")
    return made(lambda: Attention(3))(num_clients, data=data, **options)


DATA_KINDS = {
    "logistic": named("logistic"),
    "mlp": named("mlp"),
    "cnn": named("cnn"),
    "small-cnn": made(
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    ),
    "resnet20": named("resnet20"),
    "resnet20-group": named("resnet20", norm="group"),
    "batch": made(lambda: Block(nn.BatchNorm2d)),
    "group": made(lambda: Block(lambda c: nn.GroupNorm(2, c))),
    "no-affine": made(lambda: Block(lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False))),
    "attention": tokens,
    "tied": made(Tied),
    "conv1d": made(
        lambda: nn.Sequential(
            nn.Flatten(2), nn.Conv1d(1, 3, 5, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Dropout(0.2), nn.Linear(90, 3)
        )
    ),
}


class StackEngine(Engine):
    """The engine with a stack made by hand."""

    def __init__(self, problem, method, *, chunk_size, factors, convolution="") -> None:
        super().__init__(problem, method, path="stack", chunk_size=chunk_size)
        self.stack = Stack(problem, method, factors=factors, convolution=convolution)


def run(problem, plan, factors, *, chunk_size=64, convolution=""):
    engine = StackEngine(problem, plan.method, chunk_size=chunk_size, factors=factors, convolution=convolution)
    steps = list(run_rounds(problem, plan, engine, beginning(problem, plan)))
    return steps[-1][0], [record for _, record in steps]


def assert_close(got, want, tolerance):
    """Two (RunState, records): x, u, buffers, own momenta and every measure."""
    (state, records), (state_want, records_want) = got, want
    trees = [*zip(state.state, state_want.state, strict=True)]
    if state_want.own is not None:
        trees += zip(state.own, state_want.own, strict=True)
    for tree, other in trees:
        assert list(tree) == list(other)
        for name, value in other.items():
            torch.testing.assert_close(tree[name], value, rtol=tolerance, atol=tolerance, msg=name)
    for a, b in zip(records, records_want, strict=True):
        for key in ("train_loss", "test_loss", "consensus_distance", "momentum_spread"):
            assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-20), key


def tolerance_of(name):
    # BatchNorm and two rounds of resnet20 amplify the rounding of other orders of summation, as they do for vmap.
    return 1e-9 if name.startswith("resnet20") else 1e-11


# Every model by its rows; in factors those whose dense layers differ in kind. Either option with each form.
IN_FACTORS = ("logistic", "mlp", "small-cnn", "batch", "attention", "tied", "conv1d")


@pytest.mark.parametrize(
    ("name", "form", "nesterov"),
    [(name, "rows", i % 2 == 1) for i, name in enumerate(DATA_KINDS)]
    + [(name, "factors", i % 2 == 0) for i, name in enumerate(IN_FACTORS)],
)
def test_every_model_is_the_loops(name, form, nesterov):
    """Two rounds of three steps, weight decay included."""
    plan = simple_plan(3, num_rounds=2, nesterov=nesterov, weight_decay=1e-2)
    want = run_plan(DATA_KINDS[name](), plan, path="loop")
    assert_close(run(DATA_KINDS[name](), plan, FACTORS[form]), want, tolerance_of(name))


@pytest.mark.parametrize(  # pairwise
    ("name", "form", "policy", "chunk_size"),
    [
        ("mlp", "rows", "average", 1),
        ("mlp", "factors", "average", 2),
        ("mlp", "factors", "local", 5),
        ("mlp", "factors", "reset", 1),
        ("batch", "rows", "local", 2),
        ("batch", "rows", "reset", 5),
        ("batch", "factors", "average", 5),
    ],
)
def test_every_policy_and_chunk(name, chunk_size, policy, form):
    plan = simple_plan(5, num_rounds=3, momentum_policy=policy, cohort_size=4)
    want = run_plan(DATA_KINDS[name](5), plan, path="loop")
    assert_close(run(DATA_KINDS[name](5), plan, FACTORS[form], chunk_size=chunk_size), want, 1e-11)


@pytest.mark.parametrize(  # each tensor alone, some together, all clients in a chunk
    ("name", "small", "chunk_size"),
    [
        ("batch", 0, 2),
        ("batch", 20, 1),
        ("no-affine", 20, 3),
        ("conv1d", 20, 1),
        ("conv1d", 0, 3),
        ("resnet20", 20, 2),
    ],
)
def test_large_activations_and_large_tensors(name, chunk_size, small, monkeypatch):
    """The ways that sizes choose, on sizes that are small."""
    monkeypatch.setattr(layers, "_LARGE", 0)
    monkeypatch.setattr(means, "_SMALL", small)
    monkeypatch.setattr(means, "_HELD", 3)
    plan = simple_plan(3, num_rounds=2, client_weights="samples", weight_decay=1e-2)
    want = run_plan(DATA_KINDS[name](3), plan, path="loop")
    assert_close(run(DATA_KINDS[name](3), plan, False, chunk_size=chunk_size), want, tolerance_of(name))


@pytest.mark.parametrize(
    ("num_clients", "num_steps", "beta", "form"),
    [(1, 1, 0.5, "rows"), (1, 7, 0.0, "factors"), (2, 7, 0.0, "rows"), (1, 1, 0.5, "factors"), (2, 7, 0.5, "factors")],
)
def test_any_number_of_steps_and_clients(num_clients, num_steps, beta, form):
    plan = simple_plan(num_clients, num_rounds=2, beta=beta, num_local_steps=num_steps, nesterov=True)
    want = run_plan(image_problem(num_clients=num_clients), plan, path="loop")
    assert_close(run(image_problem(num_clients=num_clients), plan, FACTORS[form]), want, 1e-12)


@forms
@pytest.mark.parametrize("chunk_size", [2, 64])
def test_unequal_numbers_of_steps(chunk_size, form):
    """Local epochs over clients of different sizes: whoever is done stands still."""
    plan = simple_plan(5, num_rounds=2, local_epochs=1, batch_size=3, client_weights="samples")
    if form == "rows":  # whose own momentum must come back in the order of the clients
        plan = plan._replace(method=plan.method._replace(momentum_policy="local"))
    data = tiny_images(47)
    partition = make_partition("quantity", data.y_train.numpy(), 5, sigma=1.0, seed=2)
    assert list(partition.sizes) != sorted(partition.sizes, reverse=True)  # whoever goes on longest is not the first
    nets = [build_model("mlp", (1, 8, 8), 3, seed=3, hidden=8) for _ in range(2)]
    tasks = [Supervised(data, net, partition, batch_size=3, dtype=F64) for net in nets]
    want = run_plan(tasks[0], plan, path="loop")
    assert_close(run(tasks[1], plan, FACTORS[form], chunk_size=chunk_size), want, 1e-11)


@forms
def test_a_changing_lr_enters_the_numbers(form):
    plan = simple_plan(3, num_rounds=2, num_local_steps=4, weight_decay=0.1)
    plan = plan._replace(rate=plan.rate._replace(schedule="cosine"))
    want = run_plan(image_problem(num_clients=3), plan, path="loop")
    assert_close(run(image_problem(num_clients=3), plan, FACTORS[form]), want, 1e-12)


@pytest.mark.parametrize(
    ("name", "convolution"),
    [
        *(("small-cnn", way) for way in CONVOLUTIONS if way != "implicit"),
        pytest.param("small-cnn", "implicit", marks=pytest.mark.slow),  # Triton's interpreter is slow
        *((name, way) for name in ("batch", "conv1d") for way in ("grouped", "unfold")),
    ],
)
def test_every_way_to_convolve(name, convolution):
    plan = simple_plan(3, num_rounds=2)
    want = run_plan(DATA_KINDS[name](), plan, path="loop")
    assert_close(run(DATA_KINDS[name](), plan, False, convolution=convolution), want, 1e-11)


@pytest.mark.parametrize("name", ["mlp", "cnn", "batch"])
def test_rows_of_their_own(name):
    """Clients that start apart, as Algorithm 2's do, by gradients of each layer."""
    problem, plan = DATA_KINDS[name](3), simple_plan(3)
    begin = beginning(problem, plan)
    job = round_job(problem, plan, begin)
    rows = [{n: torch.stack([v * (1 + 0.1 * i) for i in range(3)]) for n, v in tree.items()} for tree in begin.state]
    rows = begin.state._replace(params=rows[0], momentum={n: v + 0.1 for n, v in rows[1].items()}, buffers=rows[2])
    before = [{n: v.clone() for n, v in tree.items()} for tree in rows]
    job = job._replace(rows=rows)
    want, losses, _ = Engine(problem, plan.method, path="loop", chunk_size=1).run_rows(rows, job)
    got, others, _ = Engine(problem, plan.method, path="factors", chunk_size=2).run_rows(rows, job)
    torch.testing.assert_close(others, losses, rtol=1e-11, atol=1e-11)
    for tree, other, old, kept in zip(got, want, rows, before, strict=True):
        for n, value in other.items():
            torch.testing.assert_close(tree[n], value, rtol=1e-11, atol=1e-11, msg=n)
            assert torch.equal(old[n], kept[n]), "the rows given were changed in place"


def test_float32_is_no_further_from_float64_than_the_loop():
    """Relative to how far the model went, over ten steps."""
    plan = simple_plan(3, num_rounds=1, num_local_steps=10)
    exact, _ = run_plan(image_problem("cnn"), plan, path="loop")
    start = image_problem("cnn").start()

    def error(state):
        return max(
            float(
                torch.linalg.vector_norm(v.double() - exact.state.params[n])
                / torch.linalg.vector_norm(v - start.params[n])
            )
            for n, v in state.state.params.items()
        )

    loop = error(run_plan(image_problem("cnn", dtype=torch.float32), plan, path="loop")[0])
    for factors in FACTORS.values():
        assert error(run(image_problem("cnn", dtype=torch.float32), plan, factors)[0]) < 2 * loop


def test_nothing_that_was_given_is_changed():
    problem, plan = DATA_KINDS["batch"](), simple_plan(3)
    begin = beginning(problem, plan)
    kept = [{n: v.clone() for n, v in tree.items()} for tree in begin.state]
    Engine(problem, plan.method, path="factors", chunk_size=2).run_round(begin.state, round_job(problem, plan, begin))
    for tree, before in zip(begin.state, kept, strict=True):
        assert all(torch.equal(v, before[n]) for n, v in tree.items())


# --- the numbers of the factor form ----------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_numbers_are_the_closed_forms(beta, nesterov):
    """u_s = β^s û + Σ β^{s−j} g_j and x_s = x̂ − γ(Σ β^r) û − γ Σ_j (Σ_{r≥j} β^{r−j}) g_j, option I."""
    lr, found = 0.1, numbers([0.1] * 6, beta=beta, nesterov=nesterov, weight_decay=0.0)
    for s in range(7):
        u = [0.0, beta**s] + [beta ** (s - j) if j <= s else 0.0 for j in range(1, 7)]
        assert found.momentum[s].tolist() == pytest.approx(u, abs=1e-15)
        if not nesterov:
            x = [1.0, -lr * sum(beta**r for r in range(1, s + 1))]
            x += [-lr * sum(beta ** (r - j) for r in range(j, s + 1)) for j in range(1, 7)]
            assert found.params[s].tolist() == pytest.approx(x, abs=1e-15)


def test_factors_are_chosen_where_a_layer_is_wide_and_rounds_are_short():
    assert pays(12544, 128, 10, 5)
    assert pays(784, 200, 10, 10)
    assert not pays(784, 10, 32, 10)
    problem = image_problem("mlp", hidden=64, data=tiny_images(side=16, num_classes=2))
    stack = Stack(problem, simple_plan(4).method, factors=True)
    plan = simple_plan(4, num_local_steps=8)
    job = round_job(problem, plan, beginning(problem, plan))
    assert stack.in_factors(problem.start(), job) == ["1.weight", "3.weight"]
    assert stack.sizes["5.weight"] == (64, 2, 5)


def test_a_weight_that_is_used_twice_has_rows():
    problem = DATA_KINDS["tied"]()
    stack = Stack(problem, simple_plan(3).method, factors=None)
    plan = simple_plan(3)
    assert stack.in_factors(problem.start(), round_job(problem, plan, beginning(problem, plan))) == [
        "first.weight",
        "head.weight",
    ]


# --- what cannot be folded -------------------------------------------------------------------------------


class Mixes(nn.Module):
    """Subtracts the mean over the batch: the clients' examples must not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head((x - x.mean(0)).flatten(1))


class Branches(nn.Module):
    """Asks for a value, which all clients together would answer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(x.flatten(1) * (2 if x.sum() > -1e9 else 1))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.scale = nn.Linear(64, 3), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.head(x.flatten(1)) * self.scale


@pytest.mark.parametrize(
    ("build", "why"),
    [(Mixes, "differ"), (Branches, "asks for values"), (Scaled, "Scaled holds scale itself")],
    ids=["mixes examples", "branches", "own parameter"],
)
def test_a_model_that_cannot_be_folded_is_stacked_by_vmap_and_says_why(build, why):
    problem, plan = made(build)(), simple_plan(3)
    begin = beginning(problem, plan)
    job = round_job(problem, plan, begin)
    choice = choose(problem, plan.method, begin.state, job, path="auto", chunk_size=0)
    assert choice.path in ("vmap", "loop")
    assert why in choice.trouble or (choice.path == "loop" and "cannot be stacked" in choice.trouble)
    with pytest.raises(Exception, match=why):
        choose(problem, plan.method, begin.state, job, path="stack", chunk_size=2)


def test_layers_with_options_that_are_not_known_are_refused():
    for layer in (
        nn.Conv2d(1, 1, 3, padding_mode="circular"),
        nn.BatchNorm2d(1, momentum=None),
        nn.PReLU(),
        nn.LSTM(1, 1),
    ):
        with pytest.raises(FoldError):
            fold(nn.Sequential(layer))


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_auto_times_the_stack(model):
    problem, plan = image_problem(model), simple_plan(4)
    begin = beginning(problem, plan)
    job = round_job(problem, plan, begin)
    choice = choose(problem, plan.method, begin.state, job, path="auto", chunk_size=0)
    assert choice.path in ("loop", "vmap", "stack", "factors")
    assert {"loop × 1", "stack × 1"} <= choice.measured.keys()
    assert choice.measured[f"{choice.path} × {choice.chunk_size}"] == max(choice.measured.values())
    assert choice.trouble == ""


# Every way of torch's to read or write by an index, of a row [5] and an index that is one of 0 … 4 or out of range.
BY_INDEX = {
    "index": lambda row, i: row[i],
    "two indexes": lambda row, i: row.view(1, 5)[torch.zeros_like(i), i],
    "gather": lambda row, i: row.gather(0, i),
    "index_select": lambda row, i: row.index_select(0, i),
    "take": lambda row, i: row.take(i),
    "put": lambda row, i: row.put(i, torch.ones(1)),
    "index_put": lambda row, i: row.index_put((i,), torch.ones(1)),
    "index_fill": lambda row, i: row.index_fill(0, i, 1.0),
    "index_fill of a tensor": lambda row, i: torch.index_fill(row, 0, i, torch.tensor(1.0)),
    "index_fill_": lambda row, i: row.clone().view(1, 5).index_fill_(1, i, 1.0),
    "index_add": lambda row, i: row.index_add(0, i, torch.ones(1)),
    "index_copy": lambda row, i: row.index_copy(0, i, torch.ones(1)),
    "index_reduce": lambda row, i: row.index_reduce(0, i, torch.ones(1), "amax"),
    "scatter": lambda row, i: row.scatter(0, i, torch.ones(1)),
    "scatter_add": lambda row, i: row.scatter_add(0, i, torch.ones(1)),
    "scatter_reduce": lambda row, i: row.scatter_reduce(0, i, torch.ones(1), "amax"),
    "embedding": lambda row, i: nn.functional.embedding(i, row[:, None]),
    "torch.embedding": lambda row, i: torch.embedding(row[:, None], i),
    "embedding_bag": lambda row, i: nn.functional.embedding_bag(i[None], row[:, None]),
    "one_hot": lambda row, i: nn.functional.one_hot(i, 5),
    "cross_entropy": lambda row, i: nn.functional.cross_entropy(row[None], i),
    "nll_loss": lambda row, i: nn.functional.nll_loss(row[None], i),
    "multi_margin_loss": lambda row, i: nn.functional.multi_margin_loss(row[None], i),
}


@pytest.mark.filterwarnings("ignore:.*performance drop", "ignore:index_reduce")
def test_no_client_reads_or_writes_another_ones_row_by_an_index():
    """Of torch's own: what torch.vmap gives for an index that is out of range must be an error, as it is alone."""
    rows, right = torch.arange(15.0).view(3, 5), torch.tensor([[1], [4], [2]])
    wrong = []
    for name, by in BY_INDEX.items():
        with BoundedGathers():
            found = torch.vmap(by)(rows, right)
            if not torch.equal(found, torch.stack([by(rows[k], right[k]) for k in range(3)])):
                wrong.append(f"{name}: differs")
            for outside in (5, 7, 14):
                with contextlib.suppress(IndexError, RuntimeError):
                    torch.vmap(by)(rows, right.index_put((torch.tensor(1),), torch.tensor(outside)))
                    wrong.append(f"{name}: {outside} is taken")
    assert not wrong
