"""A run that may stop early does so at the same round, with the same bytes, however often it was cut off before."""

import json
import shutil

import pytest

import fedmom
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.engine.engine import Engine
from fedmom.records.files import BEST, CHECKPOINT, FINAL, ROUNDS, read_about, read_tensors
from fedmom.records.history import read_rounds
from fedmom.records.identity import identity_of
from fedmom.results.reading import collect
from fedmom.runs.stopping import Watcher
from laws import table

# The losses of these rounds fall, and rise again from the overshooting momentum.
QUADRATIC = {
    "data.dataset": "quadratic",
    "algorithm.num-local-steps": 2,
    "algorithm.lr": 0.05,
    "run.num-rounds": 16,
    "run.checkpoint-every": 4,
    "engine.path": "loop",
    "engine.threads": 1,
}


class CutOff(fedmom.Callback):
    """Ctrl-C after a round."""

    def __init__(self, after):
        self.after = after

    def on_round(self, record, state):
        if record["round"] == self.after:
            raise KeyboardInterrupt


def started(out, cut=0, **keys):
    return fedmom.run({**QUADRATIC, **keys}, out=out, callbacks=[CutOff(cut)])


def same(a, b, names=(FINAL, CHECKPOINT)):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


KEYS = {
    "a target": {"run.stop-at": "loss=6.7502", "run.keep-best": True},
    "patience": {"run.patience": 2, "run.monitor": "distance", "run.keep-best": True},
}


@table("keys", KEYS.values())
def test_a_run_that_was_cut_off_stops_where_it_would_have(keys, in_tmp):
    whole = started("whole", **keys)
    last = len(whole.rounds)
    assert whole.status == "done"
    assert whole.message.startswith(f"stopped after round {last}: ")
    assert 2 < last < 16
    for cut in (last - 1, last):
        assert started(f"cut-{cut}", cut, **keys).status == "interrupted"
        shutil.copytree(f"cut-{cut}", f"old-{cut}")  # as if a kill had lost its checkpoint
        (in_tmp / f"old-{cut}" / CHECKPOINT).unlink()
        for folder in (f"cut-{cut}", *[f"old-{cut}"] * (cut == last)):
            result = fedmom.run(resume=folder, callbacks=[fedmom.Callback()])
            assert result.message == whole.message, folder
            assert same(in_tmp / "whole", in_tmp / folder, (FINAL, CHECKPOINT, BEST))


def test_what_was_stopped_ends_at_once_and_goes_on_without_the_key(in_tmp):
    whole = started("whole", **KEYS["a target"])
    before = (in_tmp / "whole" / ROUNDS).read_bytes()
    again = fedmom.run(resume="whole", callbacks=[fedmom.Callback()])
    assert (again.status, again.message) == ("done", whole.message)
    assert (in_tmp / "whole" / ROUNDS).read_bytes() == before
    (run,), _ = collect([in_tmp / "whole"])
    assert run.is_finished
    on = fedmom.run(resume="whole", sets={"run.stop-at": "", "run.keep-best": False}, callbacks=[fedmom.Callback()])
    assert (on.status, on.message, len(on.rounds)) == ("done", "", 16)
    started("plain")
    assert same(in_tmp / "plain", in_tmp / "whole")


def test_the_best_is_the_model_of_the_best_evaluation(in_tmp):
    """And of the first where two are equal."""
    started("whole", **{"run.keep-best": True, "run.num-rounds": 6})
    losses = [record["loss"] for record in read_rounds(in_tmp / "whole")]
    number = 1 + losses.index(min(losses))
    assert 1 < number < 6
    assert read_about(in_tmp / "whole" / BEST)["round"] == number
    assert read_about(in_tmp / "whole" / BEST)["loss"] == min(losses)
    started("short", **{"run.num-rounds": number})
    best, short = (read_tensors(path)[0] for path in (in_tmp / "whole" / BEST, in_tmp / "short" / FINAL))
    assert all((best[name] == short[name]).all() for name in short)
    assert not (in_tmp / "short" / BEST).exists()


def test_a_best_by_another_measure_is_not_taken_for_this_ones(in_tmp):
    started("run", 9, **{"run.keep-best": True, "run.num-rounds": 12})
    assert read_about(in_tmp / "run" / BEST)["round"] == 7
    on = fedmom.run(resume="run", sets={"run.monitor": "consensus_distance"}, callbacks=[fedmom.Callback()])
    spreads = {record["round"]: record["consensus_distance"] for record in on.rounds[9:]}
    best = read_about(in_tmp / "run" / BEST)
    assert best["consensus_distance"] == min(spreads.values()) == spreads[best["round"]]


def test_a_callback_stops_a_run_too(in_tmp):
    class Third(fedmom.Callback):
        def on_round(self, record, state):
            return "that is enough" if record["round"] == 3 else None

    result = fedmom.run(QUADRATIC, out="third", callbacks=[Third()])
    assert (result.status, result.message) == ("done", "stopped after round 3: that is enough")
    assert json.loads((in_tmp / "third" / "status.json").read_text())["reason"] == result.message
    assert read_about(in_tmp / "third" / FINAL)["round"] == 3
    by_key = started("key", **KEYS["a target"])
    stopping = fedmom.EarlyStopping("loss", target=6.7502)
    by_callback = fedmom.run(QUADRATIC, callbacks=[stopping])
    assert by_callback.message == by_key.message


def test_no_progress_is_counted_in_evaluations():
    watcher = Watcher("test_accuracy", patience=2, min_delta=0.1)
    found = []
    for number, value in enumerate((0.5, None, 0.55, 0.7, 0.79, float("nan"), 0.75), 1):
        watcher.add({"round": number, **({} if value is None else {"test_accuracy": value})})
        found.append(watcher.reason)
    assert found[:-1] == [""] * 6
    assert found[-1] == "test_accuracy did not improve on 0.7 of round 4 in 2 evaluations"
    assert watcher.best == (5, 0.79)


WRONG = {
    "run.stop-at": ("loss", "loss=", "=3", "loss=nan", "accuracy=1.5", "accuracy=0", "nothing=1"),
    "run.monitor": ("nothing", "test_accuracy"),
}


def test_what_no_run_can_reach_is_refused_by_name():
    for key, values in WRONG.items():
        for value in values:
            with pytest.raises(fedmom.InputError, match=f"{key} = "):
                resolve(load({**QUADRATIC, key: value}))
    assert resolve(load({"run.stop-at": "accuracy=90%"})).config.run.stop_at == "accuracy=90%"
    for given in ({}, {"patience": -1, "target": 1.0}):
        with pytest.raises(fedmom.InputError, match="EarlyStopping"):
            fedmom.EarlyStopping(**given)


def test_when_it_stops_is_no_part_of_a_runs_identity():
    ids = [identity_of(resolve(load({**QUADRATIC, **keys})).config).ids for keys in ({}, *KEYS.values())]
    assert ids[0] == ids[1]


def test_a_round_that_was_begun_before_the_stop_leaves_nothing(in_tmp, monkeypatch):
    """As on a GPU, where the next round is under way while this one's numbers are read."""
    really, begun = Engine.begin_round, []

    def early(self, start, job, progress=None):
        outcome = really(self, start, job, progress)
        begun.append(job.round_index)
        return outcome._replace(settle=lambda: outcome)

    monkeypatch.setattr(Engine, "begin_round", early)
    keys = {**QUADRATIC, "run.eval-every": 5, "run.num-rounds": 8}

    class Third(fedmom.Callback):
        def on_round(self, record, state):
            return "enough" if record["round"] == 3 and not resumed else None

    for resumed in (False, True):
        where = {"resume": "cut"} if resumed else {"out": "cut"}
        result = fedmom.run(None if resumed else keys, **where, callbacks=[Third()])
        if not resumed:
            assert result.message == "stopped after round 3: enough"
            assert begun[-1] == 3  # round 4
            assert read_about(in_tmp / "cut" / FINAL)["round"] == len(read_rounds(in_tmp / "cut")) == 3
    fedmom.run(keys, out="whole", callbacks=[fedmom.Callback()])
    assert same(in_tmp / "whole", in_tmp / "cut")
