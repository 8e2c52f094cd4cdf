"""What ways of running clients are held to is plain torch itself, and it tells a wrong way from rounding."""

import copy
import itertools

import pytest
import torch
from test_stacked import made
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from fedmom.engine.auto import choose
from fedmom.engine.engine import Engine
from fedmom.engine.paths import PATHS
from fedmom.engine.plain import yardstick
from fedmom.engine.plain.yardstick import Yardstick
from fedmom.errors import InputError
from fedmom.method.state import row_of
from fedmom.method.states import policies
from fedmom.rounds.plan import beginning, round_job
from fedmom.tasks.supervised import Batch, Supervised
from laws import table
from runs import image_problem, run_plan, simple_plan


def yardstick_of(problem, plan, *, own_rows=False):
    return Yardstick(problem, plan.method, round_job(problem, plan, beginning(problem, plan)), own_rows=own_rows)


def choice_of(problem, plan, path="auto", **options):
    begin = beginning(problem, plan)
    options = {"path": path, "chunk_size": 0, **options}
    return choose(problem, plan.method, begin.state, round_job(problem, plan, begin), **options)


@table("nesterov, beta", [(False, 0.9), (True, 0.9), (True, 0.0)])
def test_it_is_torch_optim_sgd_on_a_deep_copy(nesterov, beta):
    problem, plan = image_problem("mlp", 3), simple_plan(3, nesterov=nesterov, beta=beta, weight_decay=0.01)
    found = yardstick_of(problem, plan, own_rows=True)
    for i, want in enumerate(found.want.states):
        model, start = copy.deepcopy(problem.model), row_of(found.rows, i)
        params = dict(model.named_parameters())
        with torch.no_grad():
            for name, x in start.params.items():
                params[name].copy_(x)
        optimizer = torch.optim.SGD(params.values(), 1.0, beta, nesterov=nesterov and beta > 0, weight_decay=0.01)
        for name, u in start.momentum.items():
            optimizer.state[params[name]]["momentum_buffer"] = u.clone()
        job = found.job
        for lr, batch in zip(job.lrs, problem.round_batches(job.clients, job.first_steps, 2), strict=True):
            own = Batch(*(field[i] for field in batch))
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            cross_entropy(model(own.x), own.y).backward()
            optimizer.step()
        for name, x in want.params.items():
            torch.testing.assert_close(x, params[name].detach(), rtol=1e-12, atol=1e-14)
            if beta:
                buffer = optimizer.state[params[name]]["momentum_buffer"]
                torch.testing.assert_close(want.momentum[name], buffer, rtol=1e-12, atol=1e-14)


@table(
    "num_clients, policy, dtype",
    [(1, "average", torch.float32), (2, "local", torch.bfloat16), (3, "reset", torch.float32)],
)
@pytest.mark.slow
def test_right_ways_pass_in_every_dtype(num_clients, policy, dtype):
    """BatchNorm behind a bias has a gradient of 0, which rounding is not mistaken for; clients of unequal steps too."""
    problem = image_problem("cnn", num_clients, dtype=dtype)
    norm = made(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)))
    for one in (problem, norm(num_clients, dtype=dtype)):
        for options in ({}, {"local_epochs": 1, "batch_size": 3}):
            found = yardstick_of(one, simple_plan(num_clients, momentum_policy=policy, **options))
            assert [found.differs(path) for path in ("loop", "stack", "factors")] == ["", "", ""]
    assert yardstick_of(problem, simple_plan(num_clients), own_rows=True).differs("stack") == ""


def test_a_policy_of_a_new_row_is_compared_by_its_own_start(monkeypatch):
    half = policies.MOMENTUM_POLICIES["average"]._replace(start=lambda mean: {n: 0.5 * u for n, u in mean.items()})
    monkeypatch.setitem(policies.MOMENTUM_POLICIES, "half", half)
    problem, plan = image_problem("mlp", 3), simple_plan(3, momentum_policy="half")
    assert [yardstick_of(problem, plan).differs(path) for path in PATHS] == [""] * len(PATHS)
    found = yardstick_of(problem, plan)
    monkeypatch.setitem(policies.MOMENTUM_POLICIES, "half", policies.MOMENTUM_POLICIES["average"])
    assert all(found.differs(path) for path in PATHS)


class MixesALittle(nn.Module):
    """One hundredth of a per cent of the batch's mean: examples of other clients where they are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def forward(self, x):
        logits = self.body(x)
        return logits - 1e-4 * logits.mean(0)


def test_a_model_that_mixes_examples_a_little_is_not_stacked():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = yardstick_of(made(MixesALittle)(dtype=dtype), simple_plan(3))
        assert "differs from plain torch's" in found.differs("stack")
        assert found.differs("vmap") == ""


class Inside32(MixesALittle):
    """Rounds to float32 in its middle, whatever the run's dtype."""

    def forward(self, x):
        return self.body[1](self.body[0](x).float().to(x.dtype) * 1.1)


def test_what_computes_in_fewer_digits_is_measured_in_its_own():
    found = yardstick_of(made(Inside32)(), simple_plan(3))
    assert found.tolerance > 1e-6
    assert found.differs("stack") == found.differs("loop") == ""


@table("path", PATHS)
def test_a_wrong_way_is_never_chosen(path, monkeypatch):
    """Every path, one after the other made wrong by a part in a million of its gradients."""
    right = Engine.run_round

    def wrong(self, start, job, progress=None):
        outcome = right(self, start, job, progress)
        name = "stack" if self.stack is not None else "vmap" if self.chunk_size > 1 else "loop"
        name = "factors" if self.stack is not None and self.stack.factors else name
        if name != path:
            return outcome
        moved = {n: x + 1e-6 * (x - start.params[n]) for n, x in outcome.mean.params.items()}
        return outcome._replace(mean=outcome.mean._replace(params=moved))

    monkeypatch.setattr(Engine, "run_round", wrong)
    problem, plan = image_problem("mlp", 4, hidden=64), simple_plan(4)
    if path == "loop":
        with pytest.raises(InputError, match=r"model\.name = 'Sequential': .* x of .* differs from plain torch's"):
            choice_of(problem, plan)
        return
    assert choice_of(problem, plan).path != path
    with pytest.raises(InputError, match=rf"engine\.path = '{path}': .*differs from plain torch's"):
        choice_of(problem, plan, path)
    assert (
        choice_of(problem, plan, path, chunk_size=2, compared=True).path == path
    )  # a run that goes on was compared before


def test_a_dear_comparison_is_made_smaller_and_says_so(monkeypatch):
    monkeypatch.setattr(yardstick, "_SECONDS", 0.0)
    found = yardstick_of(image_problem("mlp", 4, batch_size=20), simple_plan(4))
    assert found.note == "compared with plain torch on 2 clients' two steps of 8 examples"
    assert found.differs("stack") == ""


# --- the client's tensors are the model's, for as long as a step lasts ------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, dense: bool, reentrant: bool) -> None:
        super().__init__()
        inner = nn.Linear(36, 36) if dense else nn.Conv2d(1, 1, 3, padding=1)
        self.first, self.inner = nn.Conv2d(1, 1, 3), nn.Sequential(inner, nn.Tanh())
        self.head, self.flat, self.reentrant = nn.Linear(36, 3), nn.Flatten() if dense else nn.Identity(), reentrant

    def forward(self, x):
        h = checkpoint(self.inner, self.flat(self.first(x)), use_reentrant=self.reentrant)
        return self.head(h.flatten(1))


@table("dense, reentrant", itertools.product([False, True], [False, True]))
def test_a_checkpointed_layer_runs_again_with_the_clients_own_weights(reentrant, dense):
    """Set-up compares; what is left to see is that it finds them right, and that factors leave such a layer alone."""
    found = yardstick_of(made(lambda: Checkpointed(dense, reentrant))(), simple_plan(3))
    assert found.differs("loop") == ""
    if not reentrant:
        assert found.differs("stack") == found.differs("factors") == ""


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.side, self.out = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x):
        h = x.flatten(1)
        return self.out(h + torch.tanh(self.side(h)).detach())


def test_a_dense_layer_whose_backward_pass_is_never_run_has_no_gradient():
    """No memory that nobody wrote is read, whether the layer was kept out of factors or not."""
    problem, plan = made(Detached)(4), simple_plan(4)
    found = yardstick_of(problem, plan)
    assert found.differs("factors") == ""
    begin = beginning(problem, plan)
    job = round_job(problem, plan, begin)
    engine = Engine(problem, plan.method, path="factors", chunk_size=4)
    assert "side.weight" not in engine.stack.in_factors(begin.state, job)
    engine.stack.factors, engine.stack.sizes = None, {"side.weight": (64, 64, 5), "out.weight": (64, 3, 5)}
    torch.full((1 << 20,), torch.nan)  # so that memory made next may hold anything
    got = engine.run_round(begin.state, job).mean
    assert torch.equal(got.params["side.weight"], begin.state.params["side.weight"])


class OneModuleTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = nn.Linear(64, 64), nn.Linear(64, 3)
        self.again = self.enc

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.enc(x.flatten(1))))))


def test_a_module_under_two_names_leaves_nothing_of_a_client_in_the_model():
    problem, plan = made(OneModuleTwoNames)(), simple_plan(3)
    before = {n: x.clone() for n, x in problem.start().params.items()}
    assert list(before) == ["enc.weight", "enc.bias", "head.weight", "head.bias"]
    found = yardstick_of(problem, plan)
    assert [found.differs(path) for path in ("loop", "vmap", "stack")] == ["", "", ""]
    choice_of(problem, plan)
    assert all(torch.equal(x, before[n]) for n, x in problem.start().params.items())


class ComplexFilter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(1, 8, 5, dtype=torch.cfloat)), nn.Linear(64, 3)
        self.register_buffer("phases", torch.exp(1j * torch.arange(5.0)))

    def forward(self, x):
        h = torch.fft.irfft2(torch.fft.rfft2(x) * self.filter * self.phases, s=(8, 8))
        return self.head(h.flatten(1))


def test_a_complex_parameter_is_trained_in_both_its_parts():
    problem, plan = made(ComplexFilter)(), simple_plan(3)
    start = problem.start()
    assert start.params["filter"].shape == (1, 8, 5, 2)
    assert "phases" not in start.buffers
    found = yardstick_of(problem, plan)
    assert found.differs("loop") == found.differs("vmap") == ""
    assert problem.state_dict(start)["filter"].dtype == torch.complex128


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 3)
        self.out.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        self.out.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", torch.zeros_like(p)))

    def forward(self, x):
        return self.out(x.flatten(1))


def test_hooks_of_parameters_are_called_on_the_clients_gradients():
    problem, plan = made(Clamped)(), simple_plan(3, beta=0.0)
    begin = beginning(problem, plan)
    mean = (
        Engine(problem, plan.method, path="loop", chunk_size=1)
        .run_round(begin.state, round_job(problem, plan, begin))
        .mean
    )
    assert 0 < float(mean.momentum["out.weight"].abs().max()) <= 1e-3
    assert not mean.momentum["out.bias"].any()
    choice = choice_of(problem, plan)
    assert choice.path == "loop"
    for path in ("vmap", "stack"):
        with pytest.raises(InputError, match=rf"engine\.path = '{path}'"):
            choice_of(problem, plan, path)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.table(x.flatten(1).long()[:, :5]).mean(1))


@table("path", ["loop", "vmap", "stack"])
def test_an_index_out_of_a_table_never_reads_another_clients_row(path):
    problem, plan = made(Tokens)(), simple_plan(3)
    few = {part: getattr(problem.dataset, part) % 7 for part in ("x_train", "x_test")}
    problem.dataset = problem.dataset._replace(**few, mean=(0.0,), std=(1 / 255,))
    begin = beginning(problem, plan)
    job = round_job(problem, plan, begin)
    engine = Engine(problem, plan.method, path=path, chunk_size=3)
    engine.run_round(begin.state, job)
    for bad in (7, 8):  # one above the table; for the last client that is out of every table
        x = problem.dataset.x_train.clone()
        x[problem.sampler.indices[: problem.sizes[0]], 0, 0, 0] = bad  # the first client's
        problem.dataset = problem.dataset._replace(x_train=x)
        with pytest.raises(IndexError):
            engine.run_round(begin.state, job)
    with pytest.raises(InputError, match=r"in evaluation the model fails on training examples \[.*IndexError"):
        problem.check_evaluation(begin.state)


def test_what_only_evaluation_shows_is_found_before_the_first_round():
    class Two(MixesALittle):
        def forward(self, x):
            logits = self.body(x)
            return logits if self.training else (logits, x)

    class Squeezes(MixesALittle):
        def forward(self, x):
            return self.body(x).squeeze()

    with pytest.raises(InputError, match=r"in evaluation the model must return logits \[\d, 3\], it returned tuple"):
        made(Two)().check_evaluation(made(Two)().start())
    problem = made(Squeezes)()
    both, alone = (
        problem.dataset,
        problem.dataset._replace(x_test=problem.dataset.x_test[:1], y_test=problem.dataset.y_test[:1]),
    )
    problem.check_evaluation(problem.start())
    for data in (both, alone):
        problem.dataset = data
        assert problem.evaluate(problem.start())["test_loss"] > 0
    assert isinstance(problem, Supervised)


def test_pieces_of_an_evaluation_fit_into_the_memory(monkeypatch):
    problem = image_problem("cnn", 2)
    want = problem.evaluate(problem.start())
    whole = problem.evaluation._piece(problem.start(), problem.dataset.x_test)
    monkeypatch.setattr("fedmom.tasks.evaluation.free_bytes", lambda device: 100_000)
    assert 2 <= problem.evaluation._piece(problem.start(), problem.dataset.x_test) < len(problem.dataset.x_test) < whole
    assert problem.evaluate(problem.start()) == pytest.approx(want, rel=1e-12)


@table("path", PATHS)
def test_rows_beyond_the_squares_of_float32_are_numbers_on_every_path(path):
    """‖x‖² of 1e28 does not fit into float32; no path takes that for divergence."""
    problem, plan = image_problem("logistic", 3, dtype=torch.float32), simple_plan(3, num_rounds=1, lr=1e28, beta=0.0)
    plan = plan._replace(num_local_steps=1)
    _, (record,) = run_plan(problem, plan, path=path, chunk_size=3)
    assert 1e45 < record["consensus_distance"] < float("inf")


def test_a_way_that_comes_to_no_number_is_wrong_and_what_cannot_be_compared_is_not_chosen(monkeypatch):
    problem, plan = image_problem("mlp", 3), simple_plan(3)
    found, right = yardstick_of(problem, plan), Engine.run_round

    def nothing(self, start, job, progress=None):
        outcome = right(self, start, job, progress)
        gone = {n: u * torch.nan for n, u in outcome.mean.momentum.items()}
        return outcome._replace(mean=outcome.mean._replace(momentum=gone))

    monkeypatch.setattr(Engine, "run_round", nothing)
    assert "differs from plain torch's" in found.differs("stack")
    monkeypatch.setattr(Engine, "run_round", right)
    steep = made(Steep)(3)
    found = yardstick_of(steep, plan)
    assert found.lrs[0] < 1e-5  # at larger ones plain torch leaves the numbers at once
    assert found.differs("loop") == found.differs("vmap") == ""
    problem.dataset = problem.dataset._replace(mean=(torch.nan,))
    found = yardstick_of(problem, plan)
    assert found.differs("loop") == ""
    assert "nothing can be compared" in found.differs("stack")


class Steep(MixesALittle):
    def forward(self, x):
        return self.body(x) * 1e4 + torch.exp(self.body[1].weight.square().sum())


class Float32Inside(MixesALittle):
    """Of one dtype, whatever the run's: as people write for torch's default."""

    def forward(self, x):
        return self.body(x.float()) @ torch.eye(3)


class Autocast(MixesALittle):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(x).float()


class StrayBFloat16(MixesALittle):
    """Mixes its batch, and makes one rounder number that means nothing."""

    def forward(self, x):
        logits = self.body(x)
        return logits + 1e-2 * logits.mean(0) + 0 * x.bfloat16().mean()


class SparseGraph(MixesALittle):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(64).to_sparse())

    def forward(self, x):
        return self.body((self.graph.to(x.dtype) @ x.flatten(1).T).T)


def test_models_of_a_dtype_of_their_own_are_compared_in_it():
    plan = simple_plan(3)
    with torch.no_grad():  # whoever calls
        assert choice_of(made(Float32Inside)(dtype=torch.float32), plan, "loop").path == "loop"
        assert choice_of(made(Autocast)(dtype=torch.float32), plan).path in PATHS
        found = yardstick_of(made(StrayBFloat16)(), plan)
        assert found.tolerance < 1e-3
        assert found.differs("loop") == ""
        assert "differs from plain torch's" in found.differs("stack")
        problem = made(SparseGraph)()
        assert "graph" not in problem.start().buffers
        assert choice_of(problem, plan).path in PATHS
