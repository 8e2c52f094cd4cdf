"""A search by Optuna is its run folders: cut off anywhere, the same call goes on to the same trials."""

import shutil
import sys

import pytest

import fedmom
from fedmom.experiments.search import study as studies
from fedmom.experiments.search.study import Span, parse_search, search_of

QUADRATIC = {
    "data.dataset": "quadratic",
    "algorithm.num-local-steps": 2,
    "run.num-rounds": 2,
    "engine.path": "loop",
    "engine.threads": 1,
}


def test_ranges_and_lists_are_read_alike_from_the_command_line_and_from_python():
    words = ["algorithm.lr=0.01..1", "algorithm.beta=0,0.9", "algorithm.num-local-steps=2..8", "data.noise-sigma=0..1"]
    found = parse_search(words)
    assert found == {
        "algorithm.lr": Span(0.01, 1, False),
        "algorithm.beta": [0.0, 0.9],
        "algorithm.num-local-steps": Span(2, 8, True),
        "data.noise-sigma": Span(0, 1, False),
    }
    assert [span.log for span in found.values() if isinstance(span, Span)] == [True, False, False]
    assert search_of({"algorithm.lr": "0.01..1", "algorithm.beta": [0, 0.9]}) == parse_search(words[:2])
    for wrong in ("algorithm.lr=1..0", "algorithm.lr=..1", "model.name=a..b", "algorithm.beta=0.5..2", "lr=0..1"):
        with pytest.raises(fedmom.InputError, match=wrong.partition("=")[0]):
            parse_search([wrong])


def test_without_optuna_one_line_says_how_to_get_it(in_tmp, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(fedmom.InputError, match=r"--optuna needs optuna.*pip install 'fedmom\[optuna\]'"):
        fedmom.sweep(QUADRATIC, grid={"algorithm.lr": "0.01..1"}, optuna=2, out="s", progress=False)


class Stub:
    """Optuna for a test of what is asked of it: a trial tries what the seed and the earlier trials say."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(studies, "_optuna", lambda: None)
        monkeypatch.setattr(studies, "_ask", self.ask)
        monkeypatch.setattr(studies, "_trial", lambda search, values, value: (dict(values), value))
        self.asked = []

    def ask(self, search, seed, metric, told, beside):
        self.asked.append((seed, [value for _, value in told]))
        return {"algorithm.lr": round(0.01 * (1 + seed + sum(value or 9 for _, value in told)), 4)}


def searched(out, number, **options):
    found = fedmom.sweep(
        QUADRATIC, grid={"algorithm.lr": "0.001..9"}, optuna=number, out=out, progress=False, **options
    )
    return [(result.folder.name, result.rounds[-1]["loss"]) for result in found]


def test_a_search_that_was_cut_off_goes_on_to_the_same_trials(in_tmp, monkeypatch):
    stub = Stub(monkeypatch)
    whole = searched("whole", 3)
    assert [seed for seed, _ in stub.asked] == [0, 1, 2]
    assert [len(told) for _, told in stub.asked] == [0, 1, 2]
    assert stub.asked[2][1] == [loss for _, loss in whole[:2]]
    searched("cut", 2)
    stub.asked.clear()
    assert searched("cut", 3) == whole
    assert stub.asked == [(2, [loss for _, loss in whole[:2]])]
    assert {path.name for path in (in_tmp / "cut").iterdir()} == {path.name for path in (in_tmp / "whole").iterdir()}


def test_a_folder_of_another_search_is_refused(in_tmp, monkeypatch):
    Stub(monkeypatch)
    searched("one", 1)
    with pytest.raises(fedmom.InputError, match="take another --out"):
        fedmom.sweep(QUADRATIC, grid={"algorithm.lr": "5..9"}, optuna=1, out="one", progress=False)


@pytest.mark.slow
def test_optuna_itself_is_deterministic_and_goes_on(in_tmp):
    pytest.importorskip("optuna")
    grid = {"algorithm.lr": "0.001..0.5", "algorithm.beta": [0, 0.9]}
    names = [
        [one.folder.name for one in fedmom.sweep(QUADRATIC, grid=grid, optuna=13, out=out, progress=False)]
        for out in ("a", "b")
    ]
    assert names[0] == names[1]
    for folder in sorted((in_tmp / "b").glob("00*"))[8:]:
        shutil.rmtree(folder)
    again = fedmom.sweep(QUADRATIC, grid=grid, optuna=13, out="b", progress=False)
    assert [one.folder.name for one in again] == names[0]
