"""A resume goes on only with what began: the configuration, and what it names; and with runs of older versions."""

import contextlib
import itertools
import json
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmom
from fedmom.config.keys import KEYS
from fedmom.config.load import flat, load
from fedmom.config.resolve import resolve
from fedmom.errors import InputError
from fedmom.records import identity
from fedmom.records.files import CHECKPOINT, FINAL, RESULTS, read_about, read_tensors
from fedmom.records.history import read_rounds
from fedmom.records.identity import identity_of
from fedmom.user_code import load_object
from laws import table

STORED = Path(__file__).parents[1] / "stored"
QUIET = [fedmom.Callback()]
TINY = {
    "data.num-clients": 3,
    "data.batch-size": 2,
    "data.partition": "iid",
    "model.name": "logistic",
    "algorithm.num-local-steps": 2,
    "run.num-rounds": 2,
    "engine.path": "loop",
    "engine.threads": 1,
}
CODE = {
    "parts": """
        WIDTHS = {"hidden": 4}
        class Block:
            '''Not a module itself.'''
            slope = 0.5
            def act(self, x):
                return x.tanh()  # here
        def unused():
            return 1
        """,
    "own_model": """
        import torch
        import parts
        class Base(torch.nn.Module):
            def last(self, x):
                return x * 2
        class Net(Base, parts.Block):
            def __init__(self, n, classes):
                super().__init__()
                self.a = torch.nn.Linear(n, parts.WIDTHS["hidden"])
                self.b = torch.nn.Linear(parts.WIDTHS["hidden"], classes)
            def forward(self, x):
                return self.last(self.b(self.act(self.a(x))))
        def build(*args, net=Net):
            from parts import Block
            return net(*args)
        def model(shape, classes):
            return build(shape[0], classes)
        def correction(grads, params, start):
            return {name: g * SCALE for name, g in grads.items()}
        SCALE = 1.0
        """,
    "own_data": """
        import numpy as np
        def data():
            x = np.arange(24, dtype=np.float32).reshape(8, 3) / 24
            y = np.arange(8) % 2
            return x, y, x[:4], y[:4]
        """,
}


def write_code(**changes):
    """The user's modules as above, with some text replaced: {"module": ("old", "new")}."""
    for name, text in CODE.items():
        sys.modules.pop(name, None)
        old, new = changes.get(name, ("", ""))
        assert old in text
        Path(f"{name}.py").write_text(textwrap.dedent(text.replace(old, new, 1)))


@pytest.fixture
def workplace(in_tmp, monkeypatch):
    with furnished(in_tmp, monkeypatch):
        yield in_tmp


@contextlib.contextmanager
def furnished(in_tmp, monkeypatch):
    """The user's modules, data and W in the working directory."""
    monkeypatch.syspath_prepend(in_tmp)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file changed twice in a second would be taken from it
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)).astype(np.float32), np.arange(12) % 3
    np.savez("tiny.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    np.savetxt("w.csv", np.full((3, 3), 1 / 3), delimiter=",")
    write_code()
    yield
    for name in CODE:
        sys.modules.pop(name, None)


def swap_labels():
    with np.load("tiny.npz") as file:
        arrays = dict(file)
    arrays["y_train"] = arrays["y_train"][::-1]
    np.savez("tiny.npz", **arrays)


OWN = {"data.dataset": "own_data:data", "model.name": "own_model:model", "algorithm.correction": "own_model:correction"}
GOSSIP = {"data.dataset": "tiny.npz", "algorithm.name": "d-sgd-m", "algorithm.topology": "w.csv"}
OTHERS = {
    "an .npz file": ({"data.dataset": "tiny.npz"}, swap_labels, "data.dataset"),
    "W": (GOSSIP, lambda: np.savetxt("w.csv", np.eye(3) / 2 + 1 / 6, delimiter=","), "algorithm.topology"),
    "a data function": (OWN, lambda: write_code(own_data=("% 2", "// 4")), "data.dataset"),
    "a method": (OWN, lambda: write_code(own_model=("x * 2", "x * 3")), "model.name"),
    "a method of another module": (OWN, lambda: write_code(parts=("tanh", "relu")), "model.name"),
    "a number of another module": (OWN, lambda: write_code(parts=('": 4', '": 5')), "model.name"),
    "a correction's number": (
        OWN,
        lambda: write_code(own_model=("SCALE = 1.0", "SCALE = 0.5")),
        "algorithm.correction",
    ),
}
SAME = {
    "nothing": lambda: None,
    "a comment": lambda: write_code(parts=("# here", "# there")),
    "what nobody calls": lambda: write_code(parts=("return 1", "return 2")),
    "what another key calls": lambda: write_code(
        own_model=("import torch", "import torch\n\n\n        def other(): ...")
    ),
}


@table("what", OTHERS)
def test_other_content_of_what_the_configuration_names_is_refused_by_key(in_tmp, monkeypatch, what):
    sets, change, key = OTHERS[what]
    with furnished(in_tmp, monkeypatch):
        fedmom.run({}, sets={**TINY, **sets}, out="run", callbacks=QUIET)
        longer = {"run.num-rounds": 3}
        change()
        before = {path: path.read_bytes() for path in Path("run").iterdir()}
        with pytest.raises(InputError, match=rf"^{key} = .*(code|data).* was changed since the run in run began"):
            fedmom.run(resume="run", sets=longer, callbacks=QUIET)
        assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


@table("what", SAME)
def test_what_decides_no_number_may_change(in_tmp, monkeypatch, what):
    with furnished(in_tmp, monkeypatch):
        fedmom.run({}, sets={**TINY, **OWN}, out="run", callbacks=QUIET)
        SAME[what]()
        assert fedmom.run(resume="run", sets={"run.num-rounds": 3}, callbacks=QUIET).status == "done"


def test_a_package_that_was_installed_is_still_the_users(in_tmp, monkeypatch):
    folder = in_tmp / "site-packages/installed"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = set()
    for scale in (1, 1, 2):
        (folder / "__init__.py").touch()
        (folder / "inner.py").write_text(f"import torch\nclass Net(torch.nn.Module):\n    scale = {scale}\n")
        (folder / "models.py").write_text("from installed.inner import Net\ndef net(*a):\n    return Net()\n")
        for name in [name for name in sys.modules if name.partition(".")[0] == "installed"]:
            del sys.modules[name]
        found.add(identity.of_code(load_object("model.name", "installed.models:net")))
    assert len(found) == 2


def test_a_runs_identity_is_every_key_but_its_length_and_place():
    def ids(**sets):
        return identity_of(
            resolve(load({}, {k.replace("__", ".").replace("_", "-"): v for k, v in sets.items()})).config
        ).ids

    base = ids()
    assert ids(run__num_rounds=999) == ids(server__retries=7) == base
    for sets in ({"algorithm__lr": 0.051}, {"run__seed": 1}, {"engine__path": "loop"}, {"data__alpha": 0.31}):
        for formula, run_id in ids(**sets).items():
            assert run_id != base[formula]


def test_a_key_that_did_not_exist_then_does_not_hinder_a_resume(workplace, monkeypatch):
    """A newer version knows one key more, of which the recorded configuration says nothing."""
    sets = {**TINY, "data.dataset": "tiny.npz"}
    before = identity_of(resolve(load({}, sets)).config)
    wider = {**KEYS, "model.new-key": KEYS["model.hidden"]._replace(default=7)}
    settings = {**dict.fromkeys(wider, None), **flat(resolve(load({}, sets)).config), "model.new-key": 7}
    monkeypatch.setattr(identity, "KEYS", wider)
    monkeypatch.setattr(identity, "flat", lambda _: settings)
    after = identity_of(resolve(load({}, sets)).config)
    assert after.ids == before.ids
    settings["model.new-key"] = 8
    assert identity_of(resolve(load({}, sets)).config).ids[2] != before.ids[2]


@table("name", sorted(path.name for path in STORED.iterdir() if path.is_dir()))
def test_a_run_of_an_older_version_goes_on_to_the_same_bytes(in_tmp, monkeypatch, name):
    """Stopped after round 3 of 6 by the version before identities had numbers, which also ran it to its end.

    `personal` is by the first version that looks at every client: what each of them got goes on too.
    `periods` and `d-sgd-m-periods` are by the first whose states have a period each, stopped between two exchanges.
    """
    shutil.copytree(STORED, in_tmp, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(in_tmp)
    monkeypatch.delitem(sys.modules, "normed", raising=False)
    fedmom.run(resume=name, callbacks=QUIET)
    assert [record["round"] for record in read_rounds(Path(name))] == list(range(1, 7))
    if name not in ("images", "personal"):  # sums of a few exact numbers; a matrix product rounds as the machine likes
        assert Path(name, FINAL).read_bytes() == Path(name, "expected.safetensors").read_bytes()
    found, about = read_tensors(Path(name, FINAL))
    expected, then = read_tensors(Path(name, "expected.safetensors"))
    assert about == then
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14)
    looked = [path for path in (Path(name, RESULTS), Path(name, "expected.jsonl")) if path.exists()]
    assert len(looked) == (2 if name == "personal" else 0)
    for got, want in itertools.zip_longest(*(path.read_text().splitlines() for path in looked)):
        mine, right = json.loads(got), json.loads(want)
        assert mine.keys() == right.keys()
        for key, value in right.items():
            np.testing.assert_allclose(mine[key], value, rtol=1e-12, err_msg=key)
    longer = fedmom.run(resume=name, sets={"run.num-rounds": 7}, callbacks=QUIET)  # and once more
    assert longer.status == "done"


def test_a_checkpoint_of_a_newer_formula_says_so(workplace):
    fedmom.run({}, sets={**TINY, "data.dataset": "tiny.npz"}, out="run", callbacks=QUIET)
    about = {**read_about(Path("run", CHECKPOINT)), "run_id": "3:0123456789abcdef"}
    with pytest.raises(InputError, match="newer fedmom"):
        identity_of(resolve(load({})).config).agreed(about, Path("run", CHECKPOINT))
