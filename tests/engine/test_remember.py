"""What `auto` found is remembered for runs that are like this one in all that decides, and compared all the same."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_stacked import made
from torch import nn

import fedmom
from fedmom.backends.local import make_local
from fedmom.backends.peer import Peer
from fedmom.backends.trainer import Node
from fedmom.config.build import make_plan, make_problem
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.engine import auto
from fedmom.engine.auto import Choice, choose
from fedmom.engine.paths import PATHS
from fedmom.engine.plain.yardstick import Yardstick
from fedmom.engine.stacked import timings
from fedmom.engine.stacked.timings import KnownWays
from fedmom.machine.cache import Kept
from fedmom.machine.precision import allow_tf32
from fedmom.records.identity import identity_of
from fedmom.rounds.plan import beginning, round_job
from fedmom.tasks.quadratic import Quadratic
from laws import table
from pretend_cuda import pretend
from runs import image_problem, simple_plan, tiny_images

QUICK = {"loop": 10.0, "stack": 20.0, "factors": 15.0, "vmap": 5.0}


@pytest.fixture
def ways(tmp_path, monkeypatch):
    """The file of this test alone."""
    monkeypatch.setenv("FEDMOM_CACHE", str(tmp_path))
    return tmp_path / "ways.json"


@pytest.fixture
def timed(monkeypatch):
    """[(way, chunk size)] of all that is timed from now on, and how fast each way is found to be."""
    seen, speeds = [], dict(QUICK)

    def rate(problem, method, start, job, path, num_rows, *, most=4, replays=True):
        seen.append((path, num_rows))
        return speeds[path] * num_rows

    monkeypatch.setattr(auto, "rate", rate)
    return seen, speeds


def chosen(problem=None, plan=None, *, path="auto", chunk_size=0, remember=True, **options):
    problem, plan = problem or image_problem("mlp"), plan or simple_plan(4)
    begin = beginning(problem, plan)
    job = round_job(problem, plan, begin)
    return choose(
        problem, plan.method, begin.state, job, path=path, chunk_size=chunk_size, remember=remember, **options
    )


@pytest.mark.parametrize("best", ["loop", "factors"])
def test_a_remembered_choice_is_the_measured_one(best, ways, timed):
    seen, speeds = timed
    speeds[best] = 1000.0
    problem = image_problem("mlp", hidden=64, batch_size=1)
    first, tried = chosen(problem), len(seen)
    assert (first.path, first.kept, tried > 0) == (best, "now", True)
    speeds.update(dict.fromkeys(PATHS, 1.0))  # what is measured now would be something else
    second = chosen(problem)
    assert len(seen) == tried
    assert second[:5] == first[:5]
    assert second.seconds == 0
    assert second.kept[:2] == "20"
    assert "and remembered" in first.said.short
    assert f"remembered, timed on {second.kept}" in second.said.short
    for choice in (first, second):
        assert choice.said.short.startswith(f"{best} × {first.chunk_size} (the fastest of ")
        assert all(way in choice.said.details for way in first.measured)


def test_without_remember_nothing_is_read_or_written(ways, timed):
    seen, _ = timed
    assert chosen(remember=False).kept == ""
    assert not ways.parent.exists() or not list(ways.parent.iterdir())
    chosen()
    before, tried = ways.read_bytes(), len(seen)
    assert chosen(remember=False).kept == ""
    assert len(seen) == 2 * tried - tried // 2
    assert ways.read_bytes() == before


ASKED = {
    "the path": {"path": "stack"},
    "the chunk size": {"chunk_size": 2},
    "rows of their own": {"own_rows": True},
}


def test_what_is_asked_for_alone_measures_again(ways, timed):
    seen, _ = timed
    for number, options in enumerate(({}, *ASKED.values())):
        before = len(seen)
        assert chosen(**options).kept == "now"
        assert len(seen) > before
        assert len(json.loads(ways.read_text())) == 1 + number


# --- the situation ---------------------------------------------------------------------------------------------


def name_of(problem=None, plan=None, asked=("auto", 0)):
    problem, plan = problem or image_problem("mlp"), plan or simple_plan(4)
    begin = beginning(problem, plan)
    return KnownWays(problem, plan.method, begin.state, round_job(problem, plan, begin), asked, on=True).name


class Twice(nn.Module):
    """Layers that are used once or twice."""

    def __init__(self, times):
        super().__init__()
        self.times, self.first, self.last = times, nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x):
        x = x.flatten(1)
        for _ in range(self.times):
            x = self.first(x).relu()
        return self.last(x)


def frozen(*layers):
    model = nn.Sequential(*layers)
    model[-1].bias.requires_grad_(False)
    return model


MODELS = {
    "tanh": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)),
    "relu": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)),
    "wider": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3)),
    "no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)),
    "frozen bias": lambda: frozen(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)),
    "norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "group norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)),
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
    "stride 1": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "stride 2": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "used once": lambda: Twice(1),
    "used twice": lambda: Twice(2),
}


def test_each_part_of_the_situation_alone_makes_another(ways, monkeypatch):
    allow_tf32(False)
    mlp, plan = image_problem("mlp"), simple_plan(4)
    names = {
        "": name_of(),
        "clients": name_of(image_problem("mlp", 5)),
        "cohort": name_of(plan=simple_plan(4, cohort_size=3)),
        "I": name_of(plan=simple_plan(4, num_local_steps=2)),
        "unequal steps": name_of(plan=simple_plan(4, local_epochs=1, batch_size=4)),
        "B": name_of(image_problem("mlp", batch_size=4), simple_plan(4, batch_size=4)),
        "dtype": name_of(image_problem("mlp", dtype=torch.float32)),
        "sampling": name_of(image_problem("mlp", sampling="replacement")),
        "augment": name_of(image_problem("mlp", augment="crop-flip")),
        "examples": name_of(image_problem("mlp", data=tiny_images(63))),
        "images": name_of(image_problem("mlp", data=tiny_images(side=6))),
        "nesterov": name_of(plan=simple_plan(4, nesterov=True)),
        "no momentum": name_of(plan=simple_plan(4, beta=0.0)),
        "decay": name_of(plan=simple_plan(4, weight_decay=0.1)),
        "policy": name_of(plan=simple_plan(4, momentum_policy="local")),
        "variances": name_of(plan=simple_plan(4, running_var="mean")),
        "another task": name_of(Quadratic([[1.0]] * 4, [[0.0]] * 4, [0.0])),
        "noise": name_of(Quadratic([[1.0]] * 4, [[0.0]] * 4, [0.0], noise_sigma=1.0)),
        **{f"asked {n}": name_of(asked=asked) for n, asked in enumerate((("stack", 0), ("auto", 2), ("auto", False)))},
        **{name: name_of(made(build)(4)) for name, build in MODELS.items()},
    }
    for what, value in {
        "processor": lambda: "x",
        "usable_cores": lambda: 99,
        "_FORMAT": 99,
        "_versions": list,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(timings, what, value)
            names[what] = name_of(mlp, plan)
    for where, what, value in (
        (torch, "__version__", "9"),
        (torch, "get_num_threads", lambda: 77),
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "deterministic", True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, value)
            names[what] = name_of(mlp, plan)
    allow_tf32(True)
    names["tf32"] = name_of(mlp, plan)
    allow_tf32(False)
    for what, free in (("card", 8 << 30), ("larger card", 80 << 30)):
        with pretend(free):
            names[what] = name_of(image_problem("mlp", device="cuda"))
    assert all(names.values())
    same = {name: [what for what in names if names[what] == name] for name in names.values()}
    assert [whats for whats in same.values() if len(whats) > 1] == []
    assert name_of() == names[""]


def test_what_does_not_decide_is_left_out(ways):
    assert name_of(plan=simple_plan(4, lr=0.1, num_rounds=9, seed=4)) == name_of()
    assert name_of(image_problem("mlp", seed=4)) == name_of()


class Branches(nn.Module):
    """Whose forward pass nobody sees without values."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(64, 3)

    def forward(self, x):
        y = self.last(x.flatten(1))
        return y if float(y.detach().sum()) < 1e9 else 2 * y


def shrinking(grads, params, start):
    return {name: 0.5 * g for name, g in grads.items()}


def growing(grads, params, start):
    return {name: 2.0 * g for name, g in grads.items()}


def corrected(by):
    plan = simple_plan(4)
    return plan._replace(method=plan.method._replace(correction=by))


def test_what_its_text_alone_tells_apart_is_remembered_by_it(ways, timed):
    names = [
        name_of(),
        name_of(plan=corrected(shrinking)),
        name_of(plan=corrected(growing)),
        name_of(made(Branches)(4)),
    ]
    assert all(names)
    assert len(set(names)) == len(names)
    assert chosen(plan=corrected(shrinking)).kept == "now"
    assert chosen(plan=corrected(shrinking)).kept != "now"
    assert len(json.loads(ways.read_text())) == 1


def test_what_has_no_text_is_measured_every_time(ways, timed):
    seen, _ = timed
    typed = {}
    exec("def by(grads, params, start):\n    return grads", typed)  # as into a console
    assert name_of(plan=corrected(typed["by"])) == ""
    assert chosen(plan=corrected(typed["by"])).kept == ""
    assert seen
    assert not ways.exists()


# --- what is not taken -----------------------------------------------------------------------------------------


def test_a_remembered_way_that_is_not_right_is_not_taken(ways, timed, monkeypatch):
    seen, speeds = timed
    speeds["factors"] = 1000.0
    problem = image_problem("mlp", hidden=64, batch_size=1)
    assert chosen(problem).path == "factors"
    really = Yardstick.differs
    for wrong, instead in (("factors", "stack"), ("stack", "vmap")):
        monkeypatch.setattr(
            Yardstick, "differs", lambda self, path, wrong=wrong: "it is wrong" if path == wrong else really(self, path)
        )
        before = len(seen)
        assert chosen(problem).path == instead
        assert len(seen) > before
        assert (wrong, 4) not in seen[before:]


def test_a_remembered_way_that_does_not_run_any_more_is_not_taken(ways, timed, monkeypatch):
    seen, _ = timed
    assert chosen()[:2] == ("stack", 4)
    before = len(seen)

    def full(*_, **__):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("fedmom.engine.rates.Engine.run_round", full)
        patch.setattr(auto, "_look", lambda *_: None)
        patch.setattr(auto, "_way_to_stack", lambda *_: ("stack", ""))
        patch.setattr(auto, "_rivals", lambda *_: [])
        assert chosen().kept == "now"
    assert len(seen) > before
    monkeypatch.setattr(auto, "_chunk_sizes", lambda *_: [1, 2])  # memory for two
    assert chosen()[:2] == ("stack", 2)


ENTRIES = [
    1,
    [],
    {},
    "path",
    ["stack", 4, {}, "2026-01-01"],
    ["stack", 4, {"loop × 1": 1.0}, "2026-01-01"],
    ["stack", 4, {"stack × 4": 1.0, "loop × 1": 2.0}, "2026-01-01"],
    ["stack", 4, {"stack × 4": "fast"}, "2026-01-01"],
    ["stack", 4, {"stack × 4": 1.0}, 2026],
    ["stack", 4, {"stack × 4": float("nan")}, "2026-01-01"],
    ["stack", True, {"stack × True": 1.0}, "2026-01-01"],
    ["stack", -1, {"stack × -1": 1.0}, "2026-01-01"],
    ["auto", 4, {"auto × 4": 1.0}, "2026-01-01"],
    [["stack"], 4, {"stack × 4": 1.0}, "2026-01-01"],
]


def test_what_is_damaged_is_measured_anew(ways, timed):
    seen, _ = timed
    assert chosen().kept == "now"
    (name,), right = json.loads(ways.read_text()), ways.read_text()
    for entry in ENTRIES:
        ways.write_text(json.dumps({name: entry}))
        assert Kept(ways, timings._remembered, 9).read() == {}, entry
    for text in ("{", json.dumps({name: 1}), json.dumps({name: ["stack", 400, {"stack × 400": 1.0}, ""]})):
        ways.write_text(text)
        before = len(seen)
        assert chosen().kept == "now"
        assert len(seen) > before
        assert ways.read_text() == right


def test_a_way_that_was_not_asked_for_is_not_taken(ways, timed):
    """However it came to be in the file."""
    chosen(path="stack")
    (name,) = json.loads(ways.read_text())
    for entry in (["loop", 1, {"loop × 1": 1.0}, ""], ["vmap", 4, {"vmap × 4": 1.0}, ""]):
        ways.write_text(json.dumps({name: entry}))
        assert chosen(path="stack").path == "stack"


def test_what_failed_is_tried_again(ways, timed, monkeypatch):
    def rate(problem, method, start, job, path, num_rows, **_):
        if path == "stack":
            raise RuntimeError("not today")
        return 1.0

    monkeypatch.setattr(auto, "rate", rate)
    first = chosen()
    assert (first.path, first.kept) == ("loop", "")
    assert "not today" in first.trouble
    assert not ways.exists()


def test_what_cannot_be_written_is_done_without(tmp_path, timed, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDMOM_CACHE", str(tmp_path / "file"))
    choice = chosen()
    assert (choice.path, choice.kept) == ("stack", "")
    assert "remembered" not in choice.said.short


# --- whole runs ------------------------------------------------------------------------------------------------

TINY = {
    "data.num-clients": 3,
    "data.batch-size": 2,
    "model.name": "logistic",
    "algorithm.num-local-steps": 2,
    "run.num-rounds": 1,
    "engine.threads": 1,
}


def notes_of(out, **changes):
    notes = []

    class Seen(fedmom.Callback):
        def on_start(self, run):
            notes.extend(run.notes)

    result = fedmom.run({**TINY, **changes}, out=out, callbacks=[Seen()])
    return result.config, " ".join(notes)


def test_the_same_command_twice_gives_the_same_bytes(ways, in_tmp, timed):
    """And takes no time to choose: which way is the fastest may look otherwise by then, and changes the last digits."""
    seen, speeds = timed
    run = {"model.name": "mlp", "model.hidden": 8, "run.num-rounds": 2, "algorithm.num-local-steps": 3}
    first, said = notes_of("first", **run)
    assert "and remembered" in said
    tried = len(seen)
    speeds.update(loop=100.0, stack=1.0)
    second, said = notes_of("second", **run)
    assert "(the fastest of 4 ways, remembered, timed on 20" in said
    assert len(seen) == tried
    assert (
        (first.engine.path, first.engine.chunk_size) == (second.engine.path, second.engine.chunk_size) == ("stack", 3)
    )
    for name in ("final.safetensors", "checkpoint.safetensors"):
        assert (in_tmp / "first" / name).read_bytes() == (in_tmp / "second" / name).read_bytes()


def test_what_is_remembered_is_no_part_of_a_runs_identity(in_tmp):
    run = {**TINY, "engine.path": "loop"}
    ids = [identity_of(resolve(load({**run, "engine.remember": on})).config).ids for on in (True, False)]
    assert ids[0] == ids[1]


QUADRATIC = {"data.dataset": "quadratic", "algorithm.num-local-steps": 2, "engine.device": "cpu", "engine.threads": 1}
CALLERS = {
    "fedmom.backends.local": lambda config: make_local(config, make_problem(config, "cpu"), make_plan(config)),
    "fedmom.backends.trainer": lambda config: Node(config).choose(np.arange(2)),
    "fedmom.backends.peer": lambda config: begun(Peer(config, 0, [np.arange(2)])).choose(),
}


def begun(peer):
    peer.begin()
    return peer


@table("module", CALLERS)
def test_whoever_chooses_remembers_as_the_configuration_says(module, monkeypatch):
    asked = []

    def choose(*_, remember, **__):
        asked.append(remember)
        return Choice("loop", 1, {})

    monkeypatch.setattr(f"{module}.choose", choose)
    for on in (True, False):
        CALLERS[module](resolve(load({**QUADRATIC, "engine.remember": on})).config)
    assert asked == [True, False]


@pytest.mark.slow
def test_a_card_remembers_too(ways, timed):
    seen, _ = timed
    for kept in (True, False):
        with pretend() as card:
            choice = chosen(image_problem("mlp", device="cuda"))
        assert (choice[:2], choice.kept == "now", bool(seen)) == (("stack", 4), kept, kept)
        assert card.troubles() == {}
        seen.clear()


@pytest.mark.slow
def test_another_process_takes_what_one_has_measured(ways):
    code = f"import fedmom; fedmom.run({TINY!r})"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ways.parent, timeout=300)
    assert len(json.loads(ways.read_text())) == 1
