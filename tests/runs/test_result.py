"""What Python gets of a run, and of a folder: equal values, a line, a table, a figure, HTML."""

import sys

import pytest

import fedmom
from fedmom.runs import bars
from fedmom.runs.bars import NotebookBar, python_bar
from fedmom.runs.progress import Bar, Lines, Quiet

QUADRATIC = {
    "data.dataset": "quadratic",
    "algorithm.num-local-steps": 2,
    "run.num-rounds": 3,
    "engine.path": "loop",
    "engine.threads": 1,
}
SILENT = {"callbacks": [fedmom.Callback()]}


class CutOff(fedmom.Callback):
    def on_round(self, record, state):
        if record["round"] == 2:
            raise KeyboardInterrupt


def equal(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def test_a_folder_gives_what_the_run_gave(in_tmp):
    for name, callback in {"whole": fedmom.Callback(), "cut": CutOff()}.items():
        result = fedmom.run({**QUADRATIC, "run.keep-best": True}, out=name, callbacks=[callback])
        found = fedmom.load(name)
        assert (found.status, found.message, found.rounds) == (result.status, result.message, result.rounds)
        assert (found.config, found.folder) == (result.config, result.folder)
        assert equal(found.state_dict, result.state_dict)
        assert equal(found.momentum, result.momentum)
    longer = fedmom.run(resume="whole", sets={"run.num-rounds": 6}, callbacks=[fedmom.Callback()])
    assert equal(fedmom.load("whole").state_dict, longer.state_dict)
    best = min(longer.rounds, key=lambda record: record["loss"])
    assert fedmom.load("whole", best=True).rounds[best["round"] - 1] == best
    for wrong, words in {
        "mine.toml": "fedmom.load_config",
        ".": "fedmom.compare takes",
        "nothing": "no config.toml",
    }.items():
        with pytest.raises(fedmom.InputError, match=words):
            fedmom.load(wrong)
    with pytest.raises(fedmom.InputError, match=r"fedmom\.load_config"):
        fedmom.load(QUADRATIC)


ODD = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self, size, classes):
        super().__init__()
        self.frozen = nn.Linear(size, 4).requires_grad_(False)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.turn = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.last = nn.Linear(4, classes)
        self.also = self.last
        self.register_buffer("hidden", torch.ones(1), persistent=False)

    def forward(self, x):
        x = self.second(torch.tanh(self.first(self.frozen(x.flatten(1)))))
        return self.last((x * self.turn).real * self.hidden)


def odd(shape, classes):
    return Odd(torch.Size(shape).numel(), classes)
"""


def test_a_folder_gives_the_whole_model(in_tmp, monkeypatch):
    """With what is frozen, tied, complex, or hidden from its state_dict."""
    (in_tmp / "odd_model.py").write_text(ODD)
    monkeypatch.syspath_prepend(in_tmp)
    keys = {"model.name": "odd_model:odd", "data.num-clients": 2, "run.num-rounds": 2, "run.keep-best": True}
    result = fedmom.run({**keys, "engine.path": "loop"}, out="run", **SILENT)
    found = fedmom.load("run")
    assert equal(found.state_dict, result.state_dict)
    assert {"frozen.weight", "second.weight"} <= {*found.state_dict}
    assert fedmom.load("run", best=True).state_dict.keys() == result.state_dict.keys()
    import odd_model

    odd_model.Odd(64, 10).load_state_dict(found.state_dict)


def test_what_is_no_grid_and_nothing_to_compare_is_one_line(in_tmp):
    for wrong in ({"grid": ["x"]}, {"grid": {"algorithm.lr": 0.1}}, {"grid": {"algorithm.lr": []}}):
        with pytest.raises(fedmom.InputError, match="grid"):
            fedmom.sweep(QUADRATIC, **wrong, out="sweep", progress=False)
    for wrong in ({"seeds": 0}, {"seeds": [1, 2], "optuna": 2, "grid": {"algorithm.lr": "0.1..1"}}):
        with pytest.raises(fedmom.InputError, match="seeds"):
            fedmom.sweep(QUADRATIC, **wrong, out="sweep", progress=False)
    with pytest.raises(fedmom.InputError, match="nothing to compare"):
        fedmom.compare(3)


def test_a_result_shows_itself(in_tmp):
    result = fedmom.run(QUADRATIC, out="run", **SILENT)
    assert repr(result).startswith("<Result: done, 3 of 3 rounds, loss ")
    assert repr(result).endswith(", run>")
    assert "\n" not in repr(result)
    table = result.table()
    assert "joint epochs" in table
    assert repr(table) == str(table)
    page = result._repr_html_()
    assert table._repr_html_() in page
    assert "data:image/png;base64," in page
    assert [axes.get_xlabel() for axes in result.plot().axes][-1] == "Rounds"
    assert result.plot()._repr_png_().startswith(b"\x89PNG")
    status, *_ = result
    assert status == "done"
    nothing = result._replace(rounds=[], status="failed", message="a < b")
    assert "a &lt; b" in nothing._repr_html_()
    with pytest.raises(fedmom.InputError, match="no round to show"):
        nothing.table()


@pytest.mark.slow
def test_a_sweep_and_a_comparison_from_python(in_tmp):
    grid = {"algorithm.momentum-policy": ["average", "reset"]}
    found = fedmom.sweep(QUADRATIC, grid=grid, seeds=2, out="sweep", progress=False)
    assert [r.config.algorithm.momentum_policy for r in found] == ["average", "average", "reset", "reset"]
    assert [r.config.run.seed for r in found] == [0, 1, 0, 1]
    before = (in_tmp / "sweep" / found[0].folder.name / "rounds.jsonl").stat().st_mtime_ns
    again = fedmom.sweep(QUADRATIC, grid=grid, seeds=[0, 1], out="sweep", progress=False)
    assert [one.rounds for one in again] == [one.rounds for one in found]
    assert (in_tmp / "sweep" / found[0].folder.name / "rounds.jsonl").stat().st_mtime_ns == before
    by_folder, by_result = fedmom.compare("sweep"), fedmom.compare(found)
    assert by_folder.table() == by_result.table()
    assert "momentum average" in by_folder.table("at-the-end")
    assert r"\toprule" in by_folder.latex()
    assert "<img" in by_folder._repr_html_()
    assert "2 groups of 4 runs" in repr(by_folder)
    alone = [fedmom.run({**QUADRATIC, "algorithm.lr": lr}, **SILENT) for lr in (0.01, 0.02)]
    assert "2 groups of 2 runs" in repr(fedmom.compare(*alone))
    for wrong in ((), ("nothing",)):
        with pytest.raises(fedmom.InputError):
            fedmom.compare(*wrong)
    with pytest.raises(fedmom.InputError, match="table 'x' is not known"):
        by_folder.table("x")


def test_a_bar_is_where_somebody_sees_it_and_never_twice(monkeypatch):
    shown = []

    class Console:
        def __init__(self, **_):
            self.is_terminal, self.is_jupyter = self.now
            self.file = type("Terminal", (), {"isatty": lambda _: True})()

    monkeypatch.setattr(bars, "Console", Console)
    monkeypatch.setattr(bars, "Bar", type("Bar", (Bar,), {"__init__": lambda self, console: None}))
    display = type(sys)("IPython.display")
    display.display = lambda *content, **how: shown.append(content)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    for now, kind in (((True, False), bars.Bar), ((False, True), NotebookBar), ((False, False), type(None))):
        Console.now = now
        found = python_bar(None, [fedmom.Callback()])
        assert isinstance(found[0] if found else None, kind)
        assert python_bar(False, []) == []
        assert len(python_bar(True, [])) == 1
        for own in (Lines(None), Quiet(), NotebookBar(None)):
            assert python_bar(None, [own]) == []


def test_a_notebooks_bar_is_one_line_that_is_written_over():
    class Handle:
        texts: list[str] = []  # noqa: RUF012 - of one test

        def update(self, content, raw):
            self.texts.append(content["text/plain"])

    def display(content, *, raw, display_id):
        Handle.texts.append(content["text/plain"])
        return Handle()

    fedmom.run(QUADRATIC, callbacks=[NotebookBar(display)])
    assert Handle.texts[0] == "reading the data …"
    assert Handle.texts[-1].startswith("done · round 3/3 · train loss ")
