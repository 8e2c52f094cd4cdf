"""The other optimizers on the folded model are the plain loop's, in few passes too; where they are not it is told."""

import copy

import pytest
import torch
from test_stacked import DATA_KINDS, made
from torch import nn
from torch.nn.functional import cross_entropy

from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data.partition import make_partition
from fedmom.engine.auto import bytes_per_client, choose
from fedmom.engine.engine import Engine
from fedmom.engine.plain.yardstick import Yardstick
from fedmom.engine.stacked import means
from fedmom.engine.stacked.timings import _situation
from fedmom.engine.stacked.updates import fused, others
from fedmom.errors import InputError
from fedmom.experiments.bench import _bytes
from fedmom.method.algorithms import Method
from fedmom.method.schedules import LearningRate
from fedmom.method.state import CLOCK, ClientState, full_name, num_bytes
from fedmom.method.states.rules import StateRule
from fedmom.rounds.correction import start_of
from fedmom.rounds.plan import Plan, beginning, cohort, round_job
from fedmom.runs.cautions import cautions
from fedmom.tasks.models.adapters import lora
from fedmom.tasks.supervised import Supervised
from laws import table
from pretend_cuda import pretend
from runs import F64, image_problem, run_plan, tiny_images
from test_cuda_graphs import replayed

NAMES = ("adamw", "adam", "lion", "adagrad")


def planned(optimizer, num_clients=3, *, policy="average", states=None, decay=0.01, eps=1e-8, **options):
    """A few rounds of three steps, γ another in each step."""
    beta2 = 0.99 if optimizer == "lion" else 0.999
    method = Method(
        0.9,
        optimizer=optimizer,
        beta2=beta2,
        eps=eps,
        weight_decay=decay,
        momentum_policy=policy,
        states={name: StateRule("average", period) for name, period in (states or {}).items()},
    )
    options = {"cohort_size": num_clients, "num_local_steps": 3, "batch_size": 5} | options
    rounds = options.pop("num_rounds", 2)
    return Plan(method, LearningRate(0.01, "cosine"), rounds, **options)


def assert_same(got, want, tolerance=1e-10):
    """Two (RunState, records): all that is common, all that clients have of their own, and every measure."""
    (state, records), (right, wanted) = got, want
    trees = [*zip(state.state, right.state, strict=True)]
    assert (state.own is None) == (right.own is None)
    if state.own is not None and right.own is not None:
        trees += zip(state.own, right.own, strict=True)
    for tree, other in trees:
        assert {*tree} == {*other}
        for name, value in other.items():
            torch.testing.assert_close(tree[name], value, rtol=tolerance, atol=tolerance, msg=name)
    for a, b in zip(records, wanted, strict=True):
        for key in ("train_loss", "test_loss", "consensus_distance", "momentum_spread", "bytes_sent"):
            assert a[key] == pytest.approx(b[key], rel=1e-8, abs=1e-18), key


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3))


def frozen():
    net = small()
    net[1].weight.requires_grad_(False)
    return net


KINDS = {**DATA_KINDS, "adapters": made(lambda: lora(small(), rank=2)), "frozen": made(frozen)}


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [("mlp", "adamw"), ("batch", "adam"), ("attention", "lion"), ("tied", "adagrad"), ("conv1d", "adamw"),
     ("group", "adagrad"), ("adapters", "adamw"), ("frozen", "adam")],
)  # fmt: skip
def test_every_layer_is_the_loops(model, optimizer):
    plan = planned(optimizer)
    want = run_plan(KINDS[model](), plan, path="loop")
    assert_same(run_plan(KINDS[model](), plan, path="stack", chunk_size=2), want)


@table(
    "optimizer, num_clients, chunk_size, options",
    [
        ("adamw", 1, 64, {"policy": "local"}),
        ("adamw", 5, 1, {"policy": "local", "cohort_size": 3, "num_rounds": 3}),
        ("adamw", 5, 2, {"states": {"m": 2, "v": 3}, "cohort_size": 4, "num_rounds": 3, "client_weights": "samples"}),
        ("adam", 5, 3, {"policy": "reset", "cohort_size": 4, "client_weights": "samples", "local_epochs": 1}),
        ("adam", 5, 64, {"states": {"x": 2, "v": 2}, "cohort_size": 3, "num_rounds": 3, "decay": 0.0}),
        ("adagrad", 5, 2, {"policy": "local", "local_epochs": 1, "cohort_size": 4, "num_rounds": 3}),
        ("lion", 5, 2, {"policy": "local", "cohort_size": 3, "num_rounds": 3}),
        ("lion", 2, 1, {"states": {"m": 2}, "local_epochs": 1, "decay": 0.0}),
    ],
)
def test_every_policy_period_cohort_and_chunk(optimizer, num_clients, chunk_size, options):
    """Clients' clocks differ where they took part in other rounds, or took other numbers of steps."""

    def problem():
        data = tiny_images(47)
        partition = make_partition("quantity", data.y_train.numpy(), num_clients, sigma=1.0, seed=2)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        return Supervised(data, net, partition, batch_size=5, dtype=F64)

    plan = planned(optimizer, num_clients, **options)
    want = run_plan(problem(), plan, path="loop")
    for path in ("stack", "vmap") if chunk_size == 3 else ("stack",):
        assert_same(run_plan(problem(), plan, path=path, chunk_size=chunk_size), want)


@table("optimizer", NAMES)
def test_rows_of_their_own(optimizer):
    """Clients that start apart, as Algorithm 2's do: each with other states, and clocks of its own."""
    problem, plan = DATA_KINDS["mlp"](3), planned(optimizer)
    begin = beginning(problem, plan)
    rows = {n: torch.stack([v * (1 + 0.1 * i) for i in range(3)]) for n, v in begin.state.params.items()}
    momentum = {
        n: torch.stack([v + 0.1 * (i + 1) for i in range(3)]) if n.startswith("m.") else torch.stack([v + 0.2] * 3)
        for n, v in begin.state.momentum.items()
    }
    rows = begin.state._replace(params=rows, momentum=momentum, buffers={})
    kept = copy.deepcopy(rows)
    job = round_job(problem, plan, begin)._replace(rows=rows)
    want, losses, _ = Engine(problem, plan.method, path="loop", chunk_size=1).run_rows(rows, job)
    got, other_losses, _ = Engine(problem, plan.method, path="stack", chunk_size=2).run_rows(rows, job)
    torch.testing.assert_close(other_losses, losses, rtol=1e-11, atol=1e-11)
    for tree, other, old, before in zip(got, want, rows, kept, strict=True):
        for n, value in other.items():
            torch.testing.assert_close(tree[n], value, rtol=1e-11, atol=1e-11, msg=n)
            assert torch.equal(old[n], before[n]), "the rows given were changed in place"


# --- few passes ---------------------------------------------------------------------------------------------------

SHAPES = {"a": (3, 4), "b": (), "c": (7,)}


def tensors(method, dtype, clocks, K=5):
    """(x, states, g) of K clients, whose clocks are the same, other ones per tensor or other ones per client."""
    draw = torch.Generator().manual_seed(0)
    x, g = ({n: torch.randn(K, *s, generator=draw, dtype=F64).to(dtype) for n, s in SHAPES.items()} for _ in range(2))
    momentum = {}
    for state in method.by.kept():
        for place, (name, shape) in enumerate(SHAPES.items()):
            if state.endswith(CLOCK):
                apart = {"same": 0.0, "tensors": place, "clients": torch.arange(K) // 2}[clocks]
                value = torch.full((K,), 0.3, dtype=F64) + 0.1 * apart
            else:
                value = torch.randn(K, *shape, generator=draw, dtype=F64)
                value = value.square() if state == "v" else value
            momentum[full_name(state, name)] = value.to(dtype)
    return x, momentum, g


@table("optimizer, decay, dtype", [(o, d, t) for o in NAMES for d, t in ((0.0, F64), (0.1, F64), (0.1, torch.float32))])
def test_few_passes_are_the_plain_step(optimizer, decay, dtype, monkeypatch):
    """From a common start and from rows, where clocks agree and where not; blocks of any number of rows."""
    method = planned(optimizer, decay=decay).method
    near = {"rtol": 1e-13, "atol": 1e-13} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-5}
    for block, clocks in ((1, "same"), (24, "tensors"), (1 << 18, "clients"), (1, "clients")):
        x, momentum, g = tensors(method, dtype, clocks)
        own = {n: v for n, v in momentum.items() if n.endswith("/a") and clocks == "clients"}
        common = {n: v[0] for n, v in momentum.items()}
        start, found = {n: v[0] for n, v in x.items()}, []
        for fast in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(fused, "_BLOCK", block)
                if not fast:
                    patch.setattr(others, "is_fast", lambda *given: False)
                assert others.is_fast(method, g, 0.1) == fast
                given = copy.deepcopy((start, common, own))
                first = others.first_step(method, *given, copy.deepcopy(g), 0.1)
                torch.testing.assert_close(given, (start, common, own), rtol=0, atol=0)
                rows = copy.deepcopy((x, momentum))
                others.step(method, *rows, copy.deepcopy(g), 0.1)
                found.append((first, rows))
        for got, want in zip(*found, strict=True):
            for tree, right in zip(got, want, strict=True):
                assert {*tree} == {*right}
                for name, value in right.items():
                    torch.testing.assert_close(tree[name], value, **near, msg=f"{clocks} {name}")


@table("optimizer", NAMES)
def test_sixteen_bits_are_as_near_as_the_loop_is(optimizer):
    """Three digits: one round in bfloat16 beside float64."""
    plan = planned(optimizer, num_rounds=1, eps=1e-3)
    right = run_plan(image_problem("mlp", 3), plan, path="loop")[0].state
    begun = image_problem("mlp", 3).start().params
    away = {}
    for path in ("loop", "stack"):
        found = run_plan(image_problem("mlp", 3, dtype=torch.bfloat16), plan, path=path, chunk_size=2)[0].state
        assert all(v.dtype == torch.bfloat16 for v in found.params.values())
        assert not fused.is_fast(plan.method, found.params, 0.1)
        squares = [((found.params[n].double() - x).square().sum(), (x - begun[n]).square().sum()) for n, x in
                   right.params.items()]  # fmt: skip
        away[path] = float(sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5
    assert away["stack"] < 1.3 * away["loop"] + 0.01


@pytest.mark.parametrize("optimizer", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_replayed_rounds_are_the_stacks(optimizer):
    """On a card γ and clocks are tensors: nothing waits for them, and a replay reads the next round's."""
    plan = planned(optimizer, 3, num_rounds=4, num_local_steps=2, cohort_size=2, client_weights="samples", eval_every=9)
    with pretend() as card:
        problem = image_problem("logistic", 3, device="cuda")
        done, records, replays = replayed(problem, plan, path="stack", chunk_size=2)
    assert (replays.trouble, card.troubles(), replays.num_replayed) == ("", {}, 1)
    state, wanted = run_plan(image_problem("logistic", 3), plan, path="loop")
    for tree, right in zip(done.state, state.state, strict=True):
        for name in right:
            torch.testing.assert_close(tree[name], right[name], rtol=1e-10, atol=1e-10, msg=name)
    assert [r["train_loss"] for r in records] == pytest.approx([r["train_loss"] for r in wanted], rel=1e-9)


# --- what stays with a client -------------------------------------------------------------------------------------


def test_a_personal_head_keeps_its_states_and_clocks():
    """Beside torch.optim.AdamW: what is shared goes on from the server's, the head of each client from its own."""
    plan = planned("adamw", 3, cohort_size=2, num_rounds=4)
    head = ("3.weight", "3.bias")

    def problem(**options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 3))
        data = tiny_images(40)
        partition = make_partition("dirichlet-class", data.y_train.numpy(), 3, alpha=0.5, min_size=2, seed=1)
        return Supervised(data, net, partition, dtype=F64, batch_size=5, personal=", ".join(head), **options)

    here = problem()
    start = {n: p.detach().clone() for n, p in here.model.named_parameters()}
    zero = {n: (torch.zeros(()), torch.zeros_like(x), torch.zeros_like(x)) for n, x in start.items()}
    common, own = (dict(start), dict(zero)), [(dict(start), dict(zero)) for _ in range(3)]
    for r in range(4):
        ids = cohort(3, 2, plan.seed, r)
        job = round_job(here, plan, beginning(here, plan)._replace(round=r))
        batches, ends = list(here.round_batches(job.clients, job.first_steps, 3)), []
        for place, i in enumerate(ids):
            model = copy.deepcopy(here.model)
            params = dict(model.named_parameters())
            by = torch.optim.AdamW(params.values(), weight_decay=0.01)
            for n, p in params.items():
                x, (step, m, v) = (own[i] if n in head else common)[0][n], (own[i] if n in head else common)[1][n]
                p.data.copy_(x)
                by.state[p] = {"step": step.clone(), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
            for lr, batch in zip(job.lrs, batches, strict=True):
                by.param_groups[0]["lr"] = lr
                by.zero_grad()
                cross_entropy(model(batch.x[place]), batch.y[place]).backward()
                by.step()
            ends.append({n: (p.detach(), *(by.state[p][k] for k in ("step", "exp_avg", "exp_avg_sq"))) for n, p in
                         params.items()})  # fmt: skip
            own[i] = {n: e[0] for n, e in ends[-1].items()}, {n: e[1:] for n, e in ends[-1].items()}
        mean = {n: [sum(e[n][k] for e in ends) / 2 for k in range(4)] for n in start}
        common = {n: e[0] for n, e in mean.items()}, {n: tuple(e[1:]) for n, e in mean.items()}
    for path in ("loop", "vmap", "stack"):
        done, _ = run_plan(problem(), plan, path=path, chunk_size=1)
        assert done.own is not None
        for n in start:
            rows = range(3) if n in head else [0]
            for i in rows:
                x, (step, m, v) = (own[i] if n in head else common)[0][n], (own[i] if n in head else common)[1][n]
                want = {"m": m, "v": v, "m.clock": 1 - 0.9 ** step.double(), "v.clock": 1 - 0.999 ** step.double()}
                state = done.own if n in head else done.state
                got = {s: state.momentum[f"{s}/{n}"] for s in want} | {"x": state.params[n]}
                for s, value in {**want, "x": x}.items():
                    mine = got[s][i] if n in head else got[s]
                    torch.testing.assert_close(mine, value, rtol=1e-11, atol=1e-12, msg=f"{path} {s} of {n}")


# --- what chooses, compares and counts ------------------------------------------------------------------------------


def yardstick_of(problem, plan, **options):
    job = round_job(problem, plan, beginning(problem, plan))
    return Yardstick(problem, plan.method, job, **{"own_rows": False} | options)


def test_a_wrong_step_is_told():
    """Each mistake in the stack's own step alone, a small one in v too; the other ways stay right."""
    broken = {
        "adamw": ("_adam", lambda right: lambda m, *rest: right(m._replace(eps=2 * m.eps + 1e-4), *rest), "differs"),
        "adam": ("_adam", lambda right: lambda m, *rest: right(m._replace(beta2=m.beta2 - 1e-6), *rest), "v of"),
        "lion": ("_lion", lambda right: lambda m, *rest: right(m._replace(beta2=m.beta), *rest), "differs"),
        "adagrad": ("_adagrad", lambda right: lambda m, lr, *rest: right(m, lr * (1 + 1e-6), *rest), "x of"),
    }
    for number, (optimizer, (name, wrong, says)) in enumerate(broken.items()):
        problem, plan = image_problem("logistic", 3, dtype=torch.float32), planned(optimizer)
        found = yardstick_of(problem, plan, own_rows=number % 2 == 1)
        assert [found.differs(path) for path in ("stack", "vmap", "loop")] == ["", "", ""]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(fused.MOVES, optimizer, wrong(getattr(fused, name)))
            found = yardstick_of(problem, plan, own_rows=number % 2 == 1)
            assert says in found.differs("stack"), optimizer
            assert found.differs("vmap") == ""


def test_factors_are_of_sgd_alone():
    wide, plan = image_problem("mlp", 4, hidden=64), planned("adamw", 4)
    begin = beginning(wide, plan)
    job = round_job(wide, plan, begin)
    taken = choose(wide, plan.method, begin.state, job, path="auto", chunk_size=0)
    assert not any("factors" in way for way in taken.measured)
    assert taken.path in ("stack", "vmap", "loop")
    with pytest.raises(InputError, match=r"engine\.path = 'factors': .*algorithm\.optimizer = 'sgd', not 'adamw'"):
        choose(wide, plan.method, begin.state, job, path="factors", chunk_size=0)
    for name in NAMES:
        with pytest.raises(InputError, match=rf"engine\.path = 'factors': .*'sgd', not '{name}'; take auto or stack"):
            resolve(load({"engine.path": "factors", "algorithm.optimizer": name}))
    resolve(load({"engine.path": "factors"}))


def test_memory_and_traffic_count_every_state():
    problem = image_problem("mlp", 3)
    size = num_bytes(problem.start().params)

    def counted(optimizer):
        plan = planned(optimizer)
        begin = beginning(problem, plan)
        engine = Engine(problem, plan.method, path="stack", chunk_size=2)
        job = round_job(problem, plan, begin)
        return bytes_per_client(problem, begin.state), _bytes(problem, engine, begin.state, job)

    (memory, traffic), clocks = counted("sgd"), 8 * 2 * len(problem.start().params)  # two in float64 of each tensor
    assert memory == 6 * size + 2 * problem.activation_bytes(problem.start())
    for name in ("lion", "adagrad"):
        assert counted(name) == (memory, traffic)
    for name in ("adamw", "adam"):
        assert counted(name) == (memory + 2 * size + 2 * clocks, traffic + 2 * size + 2 * clocks)


def test_who_trains_v_in_too_few_digits_is_told():
    plan = planned("adamw")
    config = resolve(load({"algorithm.optimizer": "adamw"})).config

    def notes(dtype, plan):
        problem = image_problem("mlp", 3, dtype=dtype)
        assert {*start_of(problem, plan.method)[0].params} == {*problem.start().params}
        return [note for note in cautions(config, problem, plan) if "last digit" in note]

    (note,) = notes(torch.bfloat16, plan)
    assert note.startswith("run.dtype = 'bfloat16': β₂ = 0.999 moves v by 0.001 of itself in a step")
    assert notes(torch.float32, plan) == []
    assert notes(torch.bfloat16, plan._replace(method=plan.method._replace(beta2=0.9))) == []
    for other in ("sgd", "lion", "adagrad"):
        assert notes(torch.bfloat16, planned(other)) == []


def test_the_mean_of_small_v_is_none_below_zero():
    """In float32: what v was at the start of the round says nothing about its last digits at the end."""
    start = {"v/x": torch.rand(64, generator=torch.Generator().manual_seed(0)) + 1, "v.clock/x": torch.ones(())}
    rows = {"v/x": torch.full((3, 64), 1e-9), "v.clock/x": torch.full((3,), 0.5)}
    weights = torch.tensor([60.0, 7.0, 11.0], dtype=F64)
    begun = ClientState({}, start, {})
    sums = means.RoundSums(begun, "pooled")
    for some in (slice(0, 2), slice(2, 3)):
        own = {n: v[some].clone() for n, v in rows.items()}
        ended = means.RowsEnded({}, own, {}, {}, torch.zeros(len(weights[some])), weights[some])
        sums.add(means.distances(begun, ended), weights[some])
    mean, end = sums.finish(torch.zeros(3, dtype=F64))
    torch.testing.assert_close(mean.momentum["v/x"], rows["v/x"][0], rtol=1e-6, atol=0)
    assert float(mean.momentum["v.clock/x"]) == pytest.approx(0.5)
    assert end().momentum_spread == 0


def test_what_is_remembered_is_of_one_optimizer():
    problem, names = image_problem("mlp", 3), set()
    for optimizer in ("sgd", *NAMES):
        plan = planned(optimizer)
        begin = beginning(problem, plan)
        names.add(_situation(problem, plan.method, begin.state, round_job(problem, plan, begin), ["auto", 0]))
    assert len(names) == 1 + len(NAMES)
    assert "" not in names
