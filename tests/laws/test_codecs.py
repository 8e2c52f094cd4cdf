"""Codecs in the rounds of Algorithm 1: laws of whole runs by the engine's every way, and what a run refuses."""

import numpy as np
import pytest
import torch

import fedmom
from fedmom.config.load import load
from fedmom.config.method.codecs import parse_codecs
from fedmom.config.resolve import resolve
from fedmom.data.partition import make_partition
from fedmom.engine.engine import Engine
from fedmom.errors import InputError
from fedmom.method.named.fedcm import FedCM
from fedmom.method.outer import OuterNumbers, OuterRule
from fedmom.records import folder
from fedmom.records.files import read_tensors
from fedmom.records.history import read_rounds
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import RunState, beginning
from fedmom.tasks.models import build_model
from fedmom.tasks.quadratic import Quadratic
from fedmom.tasks.supervised import Supervised
from laws import table
from runs import F64, image_problem, run_plan, simple_plan, tiny_images

WAYS = [("loop", 1), ("vmap", 2), ("stack", 64)]


def coded(plan, text):
    return plan._replace(method=plan.method._replace(codecs=parse_codecs("algorithm.codecs", text)))


def same(one, other):
    assert [[*tree] for tree in one] == [[*tree] for tree in other]
    return all(torch.equal(a[n], b[n]) for a, b in zip(one, other, strict=True) for n in a)


def top(v, k):
    """The k largest numbers of v, of equal ones the first, by hand."""
    out = np.zeros_like(v)
    for j in sorted(range(len(v)), key=lambda j: (-abs(v[j]), j))[:k]:
        out[j] = v[j]
    return out


def by_hand(h, c, cohorts, weights, *, k, lr, beta, interval, down=0):
    """Algorithm 1 with top-k of the change of x and of u, by loops over clients and steps -> (x, u, e, bytes).

    down: of the change of x that goes down; 0: x itself. bytes: sent, received.
    """
    N, d = h.shape
    x, u, e, sent, received, ref = np.zeros(d), np.zeros(d), np.zeros((2, N, d)), 0, 0, np.zeros(d)
    for number, cohort in enumerate(cohorts):
        if number:
            ref = ref + top(x - ref, down) if down else x
        knows = cohorts[number - 1] if number else []
        received += sum(8 * d + (down * 12 if i in knows else 8 * d) for i in cohort)
        messages, p = np.zeros((2, d)), weights[cohort] / weights[cohort].sum()
        for i, share in zip(cohort, p, strict=True):
            y, w = ref.copy(), u.copy()
            for _ in range(interval):
                w = beta * w + h[i] * (y - c[i])
                y = y - lr * w
            for s, (end, begin) in enumerate(((y, ref), (w, u))):
                wanted = e[s, i] + end - begin
                message = top(wanted, k)
                e[s, i] = wanted - message
                messages[s] += share * message
                sent += k * (8 + 4)  # float64, and the place
        x, u = x + messages[0], u + messages[1]
    return x, u, e, (sent, received)


@table("path, chunk, cohort_size, down", [("loop", 1, 4, 0), ("vmap", 64, 4, 1), ("vmap", 2, 3, 0), ("vmap", 1, 2, 3)])
def test_a_run_with_top_k_is_the_one_by_hand(path, chunk, cohort_size, down):
    """Clients that are not drawn keep e as it is, and who missed what went down gets it whole."""
    rng = np.random.default_rng(0)
    h, c = rng.uniform(0.2, 2, (4, 5)), rng.normal(0, 3, (4, 5))
    problem = Quadratic(h.tolist(), c.tolist(), [0.0] * 5)
    plan = coded(simple_plan(4, num_rounds=6, cohort_size=cohort_size, seed=3), "x: topk 0.4; u: topk 0.4")
    rules = parse_codecs("algorithm.codecs-down", f"x: topk {down / 5}" if down else "")
    plan = plan._replace(codecs_down=rules)
    engine, cohorts = Engine(problem, plan.method, path=path, chunk_size=chunk), list[np.ndarray]()
    begin_round = engine.begin_round

    def watched(start, job, progress=None):
        cohorts.append(job.clients.numpy())
        return begin_round(start, job, progress)

    engine.begin_round = watched
    *_, (done, record) = run_rounds(problem, plan, engine, beginning(problem, plan))
    x, u, e, sent = by_hand(h, c, cohorts, np.ones(4), k=2, lr=0.05, beta=0.9, interval=3, down=down)
    for got, want in ((done.state.params, x), (done.state.momentum, u)):
        np.testing.assert_allclose(got["x"].numpy(), want, rtol=1e-10)
    for got, want in zip(("e/params/x", "e/momentum/x"), e, strict=True):
        np.testing.assert_allclose(done.own.momentum[got].numpy(), want, rtol=1e-10, atol=1e-12)
    assert (record["bytes_sent"], record.get("bytes_received", sent[1])) == sent
    assert ("bytes_received" in record) == bool(down)
    assert len(cohorts[0]) == cohort_size


TEXTS = ("x: int8; u: randomk 0.3", "x: topk 0.1; u: int4 plain")


@table("text", TEXTS)
def test_what_is_common_and_what_is_kept_move_by_the_mean_change(text):
    """ŝ + Σ p_i e_i moves in every round by what a round without codecs moves ŝ from the same start; all ways agree."""
    problem = image_problem("mlp", 3, hidden=4)
    plain = simple_plan(3, num_rounds=2, client_weights="samples")
    plan = coded(plain, text)
    p = torch.from_numpy(problem.sizes / problem.sizes.sum())
    ends = []
    for path, chunk in WAYS[1:]:
        engine, uncoded = (Engine(problem, m.method, path=path, chunk_size=chunk) for m in (plan, plain))
        done = beginning(problem, plan)
        for new, _ in run_rounds(problem, plan, engine, done):
            *_, (free, _) = run_rounds(problem, plain._replace(num_rounds=new.round), uncoded, done._replace(own=None))
            for part in ("params", "momentum"):
                for name, after in getattr(new.state, part).items():
                    before = getattr(done.state, part)[name]
                    e = [torch.zeros(())] * 2
                    if f"e/{part}/{name}" in new.own.momentum:
                        e = [torch.tensordot(p, s.own.momentum[f"e/{part}/{name}"], 1) for s in (done, new)]
                    elif "plain" in text and part == "momentum":
                        continue
                    change = getattr(free.state, part)[name] - before
                    torch.testing.assert_close(after + e[1] - before - e[0], change, rtol=1e-10, atol=1e-12)
            done = new
        ends.append(done)
    for end in ends[1:]:
        for a, b in zip([*ends[0].state, ends[0].own.momentum], [*end.state, end.own.momentum], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_float32_is_no_codec_at_all():
    problem, plan = image_problem("mlp", 3), simple_plan(3)
    (one, records), (other, again) = (run_plan(problem, p) for p in (plan, coded(plan, "x: float32; u: float32 plain")))
    assert same(one.state, other.state)
    assert one.own is other.own is None
    assert records[-1]["bytes_sent"] == again[-1]["bytes_sent"]


def test_without_feedback_nobody_keeps_anything():
    """Every way comes to the same, that without rows too, which must have some for a codec."""
    problem = image_problem("mlp", 3, hidden=4)
    plan = coded(simple_plan(3, num_rounds=2), "x: int8 plain; u: bfloat16 plain")
    ends = [run_plan(problem, plan, path=path, chunk_size=chunk)[0] for path, chunk in [*WAYS, ("factors", 64)]]
    for end in ends:
        assert end.own is None
        for a, b in zip(ends[0].state, end.state, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_steps_that_are_not_equally_many_and_other_states_are_encoded_too():
    """local-epochs, AdamW's m and v, personal tensors: every way comes to the same, and what is personal has no e."""
    data = tiny_images()
    partition = make_partition("dirichlet-class", data.y_train.numpy(), 3, alpha=0.5, min_size=2, seed=1)
    net = build_model("mlp", (1, 8, 8), 3, seed=3, hidden=4)
    problem = Supervised(data, net, partition, dtype=F64, batch_size=5, personal="head")
    head = sorted(problem.personal)
    plan = simple_plan(3, num_rounds=2, local_epochs=1)
    plan = plan._replace(method=plan.method._replace(optimizer="adamw", beta2=0.99))
    plan = coded(plan, "x: int8 16; m: topk 0.2; v: bfloat16")
    ends = [run_plan(problem, plan, path=path, chunk_size=chunk) for path, chunk in WAYS]
    done, records = ends[0]
    assert len(set(plan.steps_of(problem.sizes).tolist())) > 1
    shared = [n for n in done.state.params if n not in head]
    kept = {f"e/{at}{n}" for at in ("params/", "momentum/m/", "momentum/v/") for n in shared}
    assert {n for n in done.own.momentum if n.startswith("e/")} == kept
    assert {*head} <= {*done.own.params}
    for other, _ in ends[1:]:
        for a, b in zip([*done.state, done.own.momentum], [*other.state, other.own.momentum], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    numbers = [done.state.params[n].numel() for n in shared]
    each = sum(d + 4 * -(-d // 16) + 12 * int(np.ceil(0.2 * d - 1e-9)) + 2 * d + 2 * 8 for d in numbers)  # two clocks
    assert records[-1]["bytes_sent"] == 2 * 3 * each


def test_int4_alone_ends_where_algorithm_1_does_in_the_mean_and_nearest_would_not():
    """Of f_i = h_i/2 (x − c_i)², I = 2, the mean over rounds is the fixed point of Algorithm 1 without a codec."""
    rng = np.random.default_rng(2)
    h, c, lr = rng.uniform(0.5, 2, (3, 6)), rng.normal(0, 1, (3, 6)), 0.1
    c[:, 0] *= 30  # sets the step of the block, in which the others are small
    keep = (1 - lr * h) ** 2
    fixed = ((1 - keep) * c).mean(0) / (1 - keep).mean(0)
    problem = Quadratic(h.tolist(), c.tolist(), [0.0] * 6)
    plan = coded(simple_plan(3, num_rounds=200, lr=lr, beta=0.0, num_local_steps=2), "x: int4 8 plain")
    path = [record["x"] for _, record in run_rounds(problem, plan, engine(problem, plan), beginning(problem, plan))]
    x, nearest = np.zeros(6), []
    for _ in range(200):
        moved = (keep - 1) * (x - c)
        step = abs(moved).max(1, keepdims=True) / 7
        x = x + (step * np.round(moved / step)).mean(0)
        nearest.append(x)
    away = [abs(np.mean(rows[50:], 0) - fixed)[1:] for rows in (path, nearest)]
    assert np.std(path, 0).min() > 0
    assert away[0].max() < 0.25 * away[1].max()


def engine(problem, plan):
    return Engine(problem, plan.method, path="vmap", chunk_size=64)


CONFIG = {
    "data.dataset": "quadratic",
    "data.curvatures": "1,2,1;3,1,1;1,1,2",
    "data.centers": "4,0,1;-2,1,0;1,1,1",
    "data.start": "0,1,2",
    "algorithm.num-local-steps": 2,
    "algorithm.cohort-size": 2,
    "algorithm.codecs": "x: int8 2; u: topk 0.34",
    "algorithm.codecs-down": "x: int4 2; u: lowrank 1",
    "algorithm.outer": "nesterov",
    "run.num-rounds": 6,
    "run.checkpoint-every": 2,
    "engine.path": "vmap",
}


class _StopAfter(fedmom.Callback):
    def __init__(self, number):
        self.number = number

    def on_round(self, record, state):
        if record["round"] == self.number:
            raise KeyboardInterrupt


DIGITS = {
    "data.num-clients": 4,
    "data.batch-size": 4,
    "model.name": "mlp",
    "model.hidden": 4,
    "algorithm.num-local-steps": 1,
    "algorithm.cohort-size": 2,
    "algorithm.codecs": "x: lowrank 1; u: int4",
    "algorithm.codecs-down": "x: lowrank 1",
    "run.num-rounds": 6,
    "run.eval-every": 6,
    "run.checkpoint-every": 2,
    "engine.path": "vmap",
}


@table("config", [CONFIG, DIGITS])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, config):
    fedmom.run({}, sets=config, out=tmp_path / "whole", callbacks=[fedmom.Callback()])
    fedmom.run({}, sets=config, out=tmp_path / "parts", callbacks=[_StopAfter(3)])
    fedmom.run(resume=tmp_path / "parts", callbacks=[fedmom.Callback()])
    for name in (folder.FINAL, folder.CHECKPOINT, folder.CLIENTS):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    sent = [[r["bytes_sent"] for r in read_rounds(tmp_path / name)] for name in ("whole", "parts")]
    assert sent[0] == sent[1]
    if config is CONFIG:
        assert sent[0][0] == 2 * ((3 + 8) + 2 * 12)


@pytest.mark.slow
def test_workers_come_to_the_same(tmp_path):
    """Blocks of clients in other processes: the messages, and what clients keep of them, are those of one process."""
    sets = DIGITS | {"algorithm.codecs": "x: int8; u: topk 0.2", "run.dtype": "float64", "engine.chunk-size": 2}
    sets |= {"algorithm.cohort-size": 3, "algorithm.codecs-down": "x: topk 0.5"}
    runs = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        result = fedmom.run({}, sets=sets | {"engine.workers": workers}, out=out, callbacks=[fedmom.Callback()])
        tensors = [read_tensors(out / name)[0] for name in (folder.CHECKPOINT, folder.CLIENTS)]
        runs.append(([(r["bytes_sent"], r["bytes_received"]) for r in result.rounds], tensors))
    assert runs[0][0] == runs[1][0]
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@table(
    "sets, words",
    [
        ({"codecs": "x int8"}, "'x int8' must be"),
        ({"codecs": "x: int9"}, "int9"),
        ({"codecs": "x: int8; x: int4"}, "twice"),
        ({"codecs": "x: topk 2"}, r"k/d in \(0, 1\]"),
        ({"codecs": "x: int8 0"}, "whole number B"),
        ({"codecs": "x: lowrank 1.5"}, "whole number r"),
        ({"codecs": "x: int8 many"}, "'many' must be a number"),
        ({"codecs": "x: int8 2 3"}, "must be"),
        ({"codecs": "x: bfloat16 4"}, "has no number"),
        ({"codecs": "x: topk 0.1 plain"}, "the wrong way"),
        ({"codecs": "x: randomk 0.1 plain"}, "scaled beside it"),
        ({"codecs": "x: randomk 0.1 scaled"}, "explodes"),
        ({"codecs": "x: topk 0.1 scaled plain"}, "nothing to scale"),
        ({"codecs": "x: int4 196"}, "less than 196"),
        ({"codecs": "v: bfloat16"}, "has no state 'v'"),
        ({"codecs": "v: int8", "optimizer": "adamw"}, "take float32 or bfloat16"),
        ({"codecs": "v: float16", "optimizer": "adamw"}, "take float32 or bfloat16"),
        ({"codecs": "m: lowrank", "optimizer": "adamw"}, "divides them by ε"),
        ({"codecs": "u: int8", "momentum-policy": "local"}, "u is local and does not travel"),
        ({"codecs": "u: int8", "momentum-policy": "reset"}, "u is reset and does not travel"),
        ({"codecs": "u: int8", "states": "u: average every 2"}, "every 2 rounds"),
        ({"codecs": "u: int8", "beta": 0.0}, "beta = 0"),
        ({"codecs": "x: int8", "name": "d-sgd-m"}, "Algorithm 2"),
        ({"codecs": "x: int8", "run.backend": "simulation", "server.strategy": "fedavg"}, "pr-sgd-m alone"),
        ({"codecs-down": "x: int8 plain"}, "leave plain out"),
        ({"codecs-down": "v: bfloat16", "optimizer": "adamw"}, "would not stay positive"),
        ({"codecs-down": "x: int8", "states": "u: average every 2"}, "u is not"),
        ({"codecs-down": "x: int8", "name": "d-sgd-m"}, "Algorithm 2"),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_one_line(sets, words):
    named = {key if "." in key else f"algorithm.{key}": value for key, value in sets.items()}
    with pytest.raises(InputError, match=words) as said:
        resolve(load(named))
    assert "\n" not in str(said.value)
    assert "algorithm.codecs" in str(said.value)


def test_what_can_be_encoded_is_taken():
    for text in ("x: int4 195; u: int8 100000 plain", "x: randomk 0.1 scaled plain", " x : topk 1 ;u:float16 plain;"):
        resolve(load({"algorithm.codecs": text}))


def test_a_state_without_rows_of_its_own_begins_with_none():
    """Whoever hands clients to an engine without what they keep, as a check does, begins at e = 0."""
    problem, plan = image_problem("mlp", 2, hidden=4), coded(simple_plan(2, num_rounds=1), "x: lowrank 1; u: topk 0.1")
    full = beginning(problem, plan)
    ends = [run_plan(problem, plan, done=done)[0] for done in (full, full._replace(own=None))]
    assert isinstance(ends[0], RunState)
    assert same(ends[0].state, ends[1].state)
    assert all(v.dtype == F64 for v in ends[0].own.momentum.values())


def test_what_goes_down_exactly_changes_nothing():
    """k = d both ways, with an outer step and personal tensors: the run without codecs."""
    problem = image_problem("mlp", 3, hidden=4, personal="head")
    plan = simple_plan(3, outer=OuterRule("fedavgm", OuterNumbers(0.7, 0.5)))
    one, _ = run_plan(problem, plan, path="vmap")
    down = parse_codecs("algorithm.codecs-down", "x: topk 1; u: topk 1")
    other, records = run_plan(problem, coded(plan, "x: topk 1; u: topk 1")._replace(codecs_down=down), path="vmap")
    for a, b in zip(one.gathered().state, other.gathered().state, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert {name.partition("/")[2] for name in other.reference} == {*one.state.params} - problem.personal
    assert records[-1]["bytes_sent"] == 1.5 * one.bytes_sent  # 12 bytes a number for 8


def test_the_server_keeps_what_its_message_leaves_behind():
    """x + Σ p_i e_i moves by Σ p_i (s_i − ref), and the reference comes as near to x as its codec does."""
    rng = np.random.default_rng(1)
    h, c = rng.uniform(0.2, 2, (3, 12)), rng.normal(0, 3, (3, 12))
    problem = Quadratic(h.tolist(), c.tolist(), [0.0] * 12)
    plan = coded(simple_plan(3, num_rounds=100, lr=0.1, beta=0.0, num_local_steps=1), "x: int8 12")
    plan = plan._replace(codecs_down=parse_codecs("algorithm.codecs-down", "x: int4 12"))
    done = beginning(problem, plan)
    for new, _ in run_rounds(problem, plan, engine(problem, plan), done):
        ref = done.reference["params/x"].numpy()
        moved = [s.state.params["x"].numpy() + s.own.momentum["e/params/x"].numpy().mean(0) for s in (done, new)]
        np.testing.assert_allclose(moved[1] - moved[0], (-0.1 * h * (ref - c)).mean(0), rtol=1e-10, atol=1e-12)
        done = new
    assert not np.array_equal(done.reference["params/x"].numpy(), done.state.params["x"].numpy())
    np.testing.assert_allclose(done.state.params["x"].numpy(), (h * c).sum(0) / h.sum(0), atol=0.05)


@table("interval", ["fixed", "adaptive"])
def test_where_a_round_began_is_where_its_clients_did(interval):
    """FedCM's D with α = 1 and I = 1 is the mean gradient at the reference; ρ is of the way from there."""
    rng = np.random.default_rng(2)
    h, c = rng.uniform(0.2, 2, (3, 4)), rng.normal(0, 3, (3, 4))
    problem = Quadratic(h.tolist(), c.tolist(), [0.0] * 4)
    steps = 1 if interval == "fixed" else 16
    plan = simple_plan(3, num_rounds=8, lr=0.05, beta=0.0, num_local_steps=steps, interval=interval)
    plan = plan._replace(codecs_down=parse_codecs("algorithm.codecs-down", "x: topk 0.25"))
    if interval == "fixed":
        plan = plan._replace(method=plan.method._replace(correction=FedCM(1.0)))
    done, taken = beginning(problem, plan), steps
    for new, record in run_rounds(problem, plan, engine(problem, plan), done):
        ref = done.reference["params/x"].numpy()
        if interval == "fixed":
            np.testing.assert_allclose(new.state.correction["x"].numpy(), (h * (ref - c)).mean(0), rtol=1e-12)
        else:
            ends = c + (1 - 0.05 * h) ** taken * (ref - c)
            away = ((ends.mean(0) - ref) ** 2).sum()
            assert record["interval"] == taken
            taken = max(1, taken // 2) if ((ends - ends.mean(0)) ** 2).sum(1).mean() > 4 * 2 * away else taken
        done = new
    assert interval == "fixed" or taken < 16
