"""The programs that measure: one system's failure costs its row alone, and what was finished is not lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from laws import table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def raising(error):
    def way(load, rounds):
        raise error

    return way


def test_a_peer_that_fails_is_a_marked_row_and_the_others_stay(monkeypatch, tmp_path):
    import peers

    monkeypatch.setattr(peers, "doubts", lambda load, row: "")
    load = {"name": "cnn", "source": "random", "cohort": 2, "steps": 5}
    good = {"seconds": [9.0, 9.0, 1.0, 1.0], "losses": [2.0, 1.0], "parameters": 3}
    bad = {
        "no losses": lambda load, rounds: {**good, "losses": []},
        "no rounds": lambda load, rounds: {**good, "seconds": [1.0]},
        "no keys": lambda load, rounds: {},
        "raises": raising(ValueError("so")),
        "exits": raising(SystemExit("so")),
        "has no time": lambda load, rounds: {**good, "seconds": [0.0] * 4},
    }
    rows = [peers.measured(load, name, way, 4) for name, way in {"good": lambda *_: good, **bad}.items()]
    text = peers.table(rows)
    assert "| good | 10 |" in text
    for name in bad:
        assert f"| {name} | failed |" in text
        assert f"\n{name}, cnn: " in text
    peers.draw(rows[1:], tmp_path / "peers.png")  # nothing was measured


def test_a_seed_that_diverged_is_no_zero_in_a_mean():
    import decentralized
    import momentum_policies

    accuracies = [decentralized.accuracy(record, "a") for record in ({"a": 0.5}, {}, {"a": 0.7})]
    assert decentralized.shown(accuracies) == "60.0 ± 14.1 [2 of 3]"
    assert momentum_policies.cell({0.1: [{5: 50.0}, {}, {5: 70.0}]}, 5) == "60.0 ± 14.1 [2 of 3] (0.1*)"


def travels_line(cell, lr, seed, loss, values, sent=2.0):
    """A run of 4 evaluations, each after `sent` MB more; loss None: it diverged."""
    done = seed > 0 or loss is not None
    curve = [[64 * (k + 1), sent * (k + 1), value] for k, value in enumerate(values)] if done else []
    return {**cell._asdict(), "lr": lr, "seed": seed, "status": "done" if done else "diverged", "loss": loss} | {
        "cpu": 2.0,
        "curve": curve,
    }


def test_a_row_has_the_lr_of_the_least_loss_and_then_its_other_seeds():
    import what_travels as travels

    cell = travels.Cell("fashion", 16, "skewed", "u local")
    done = {}
    for place, run in enumerate(travels.trials(cell)):
        assert travels.chosen(cell, done) is None
        assert [*travels.missing([cell], done, 3)] == travels.trials(cell)[place:]
        done[run] = travels_line(cell, run.lr, 0, {0.01: 0.5, 0.03: 0.4, 0.1: None}[run.lr], [1.0, 2.0, 3.0, 4.0])
    assert travels.chosen(cell, done) == 0.03
    assert [*travels.missing([cell], done, 3)] == [travels.Run(cell, 0.03, 1), travels.Run(cell, 0.03, 2)]
    assert travels.budget([cell], done, 3, 2).startswith("2 runs, 4 CPU-seconds: 2 s of 2 cores")
    assert travels.budget([cell], {run: line for run, line in done.items() if run.lr < 0.1}, 3, 1).startswith("3 runs")
    gone = {run: {**line, "status": "diverged"} for run, line in done.items()}
    assert travels.chosen(cell, gone) is None
    assert [*travels.missing([cell], gone, 3)] == []
    # Smaller rates where I is large, larger ones where u is reset every 4 steps.
    assert [run.lr for run in travels.trials(cell._replace(interval=64))] == [0.003, 0.01, 0.03]
    assert [run.lr for run in travels.trials(cell._replace(interval=4, row="u reset"))] == [0.03, 0.1, 0.3]


def test_a_run_is_a_line_and_a_line_that_was_cut_is_none(tmp_path):
    import what_travels as travels

    cell = travels.Cell("toy", 4, "noise", "x, m, v every 4 steps")
    run = travels.trials(cell)[0]
    line = travels_line(cell, run.lr, 0, 0.1, [1.0])
    assert travels.read(tmp_path) == {}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "seed": 1})[:-9])
    assert travels.read(tmp_path) == {run: line}


def test_a_table_has_what_was_reached_by_equal_steps_and_by_equal_bytes():
    import what_travels as travels
    import what_travels_tables

    cells = {row: travels.Cell("fashion", 16, "skewed", row) for row in ("u average", "u local", "u reset")}
    found = {
        cells["u average"]: [
            travels_line(cells["u average"], 0.03, k, 1.0, [10.0, 20, 30, 40 + k], 4) for k in range(3)
        ],
        cells["u local"]: [travels_line(cells["u local"], 0.1, k, 1.0, [12.0, 13, 14, 15]) for k in range(2)],
        cells["u reset"]: [],
    }
    found[cells["u local"]].append({**found[cells["u local"]][0], "status": "diverged", "curve": []})
    text = what_travels_tables.table(travels.PARTS, found, "fashion", 16)
    assert "| skewed (lr) | skewed, 8 MB |" in text
    # Of four evaluations the last; of the two until 8 MB were sent the second.
    assert "| u average | sgd | 16 | 41.0 ± 1.0 (0.03) | 20.0 ± 0.0 | – | – |" in text
    assert "| u local | sgd | 8 | 15.0 ± 0.0 [2 of 3] (0.1*) | 15.0 ± 0.0 [2 of 3] | – | – |" in text
    long = travels_line(cells["u local"], 0.1, 1, None, range(12))
    assert what_travels_tables.value(long) == 10.0  # of 9, 10 and 11
    assert "| u reset | sgd | – | – | – | – | – |" in text


def test_the_page_on_what_travels_has_the_tables_of_the_committed_runs():
    import what_travels as travels
    from what_travels_tables import tables, with_tables

    done = travels.read(BENCHMARKS / "results" / "what-travels")
    assert len(done) > 100
    cells = travels.cells_of([*travels.PARTS], [])
    texts = tables(travels.PARTS, {cell: travels.found_of(cell, done) for cell in cells})
    page = (BENCHMARKS.parent / "docs" / "what-travels.md").read_text(encoding="utf-8")
    assert with_tables(page, texts) == page
    assert page.count("± 0.") > 20


def test_an_optimizer_stands_beside_sgd_in_its_fastest_chunks():
    import optimizers

    runs = {name: iter(range(9)) for name in ("sgd × 4", "sgd × 16")}
    found = optimizers.measure(runs, 0.0, clock=iter(range(100)).__next__)
    assert found == {"sgd × 4": [1], "sgd × 16": [1]}  # after the first two turns
    found = {
        f"{name} × {size}": [2.0 * k, k, 3.0 * k] for k, name in enumerate(optimizers.OPTIMIZERS, 1) for size in (4,)
    }
    found |= {"sgd × 16": [4.0, 0.5, 9.0], "adamw × 16": [4.0, 1.0, 9.0]}
    text = optimizers.table({"mlp": found})
    assert "| sgd | 300 (1.00, × 4) |" in text
    assert "| adamw | 150 (0.50, × 4) |" in text
    assert "| adagrad | 60 (0.20, × 4) |" in text


def test_what_a_run_does_not_say_of_the_wire_is_no_zero():
    import wire

    row = {"what": "x", "said up": 4e6, "for the checkpoint": 0, "seen up": 4.01e6, "said down": None, "seen down": 5e6}
    assert wire.table([row]).splitlines()[-1] == "| x | 4.00 | 0.00 | 4.01 | – | 5.00 |"


# --- the paper's experiment -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """48 + 20 images of CIFAR-10's shape, whose brightness says their class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", 48), ("test", 20)):
        y = np.arange(count) % 10
        x = 20 * y[:, None, None, None] + rng.integers(20, size=(count, 3, 32, 32))
        arrays |= {f"x_{name}": x.astype(np.uint8), f"y_{name}": y}
    path = tmp_path_factory.mktemp("photos") / "cifar10.npz"
    np.savez(path, **arrays)
    return path


SMALLEST = (
    *("--device", "cpu", "--quick", "--images", "48", "--test-images", "20", "--batch", "2", "--clients", "2", "4"),
    *("--intervals", "1", "2", "--seeds", "1", "--epochs", "1", "--lrs", "0.005", "0.01", "--path", "stack"),
    *("--points", "4"),
)


def run_paper(out, photos, *more):
    import paper

    threads = torch.get_num_threads()
    try:
        return paper.main(["--out", str(out), "--data", str(photos), *SMALLEST, *more])
    finally:
        torch.set_num_threads(threads)


def lines(out):
    return (out / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)


def curves(out):
    """{run: its curve without the seconds}; of a run that stands there twice the later."""
    rows = [row for row in map(json.loads, lines(out)) if row["kind"] == "run"]
    found = {(r["seed"], r["interval"], r["clients"], r["schedule"]): r["curve"] for r in rows}
    return {key: [[*point[:2], *point[3:]] for point in curve] for key, curve in found.items()}


@pytest.mark.slow
def test_the_papers_runs_go_on_where_they_were_cut(photos, tmp_path):
    out = tmp_path / "out"
    assert run_paper(out, photos, "--budget", "0") == 0
    assert len(lines(out)) == 1  # the protocol: no run was begun
    assert run_paper(out, photos) == 0
    whole, done = lines(out), curves(out)
    assert {*done} == {(0, i, n, s) for i in (1, 2) for n in (2, 4) for s in ("constant", "decayed")}
    assert {path.name for path in out.iterdir()} == {"rows.jsonl", "paper.md", "curves.png", "speedup.png"}
    for (_, i, n, schedule), curve in done.items():
        steps, epochs = [point[0] for point in curve], [point[1] for point in curve]
        assert steps[-1] == 64 // (n * 2)  # E n / (N B), n rounded up to whole rounds for every N and I
        assert epochs == pytest.approx([step * n * 2 / 48 for step in steps])
        assert all(step % i == 0 for step in steps)
        half = len(curve) // 2
        assert curve[:half] == done[0, i, n, "constant"][:half]
        assert curve[half - 1][0] == steps[-1] // 2
        assert schedule == "constant" or curve[-1] != done[0, i, n, "constant"][-1]
    # Killed between the two schedules of a run, and while the last line was written; of the middle nothing is there.
    kept = [*whole[:4], *whole[6:-1]]
    (out / "rows.jsonl").write_text("".join(kept) + whole[-1][:60], encoding="utf-8")
    assert run_paper(out, photos) == 0
    assert curves(out) == done
    assert lines(out)[: len(kept)] == kept  # what was finished was not run again
    assert len(lines(out)) == len(whole)


@pytest.mark.slow
def test_a_speedups_runs_are_those_of_the_whole_experiment_and_go_on_where_they_were_cut(photos, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_paper(whole, photos) == 0
    assert run_paper(out, photos, "--speedup", "2", "--commit", "abc") == 0
    done = curves(out)
    wanted = [(1, 4, "decayed"), (2, 4, "decayed"), (2, 4, "constant"), (2, 2, "constant")]  # first things first
    assert [*done] == [(0, *run) for run in wanted]
    assert done == {key: curves(whole)[key] for key in done}
    assert {path.name for path in out.iterdir()} == {"rows.jsonl", "paper.md", "curves.png", "speedup.png"}
    assert all(row["commit"] == "abc" for row in map(json.loads, lines(out)) if row["kind"] != "lr")
    kept = lines(out)[:-2]  # killed between the two schedules of the largest N
    (out / "rows.jsonl").write_text("".join(kept), encoding="utf-8")
    assert run_paper(out, photos, "--speedup", "2") == 0
    assert lines(out)[: len(kept)] == kept
    assert curves(out) == done
    assert run_paper(out, photos) == 2  # which asks for all of them


def a_protocol(speedup, lrs=(0.1,)):
    """ResNet-56's of a second a local step and nothing else."""
    from paper_runs import Protocol

    ways = {str(n): ["stack", n, 0.0, 1.0, 0.0, 0.0, 0.0] for n in (2, 4, 8)}
    names = {"scale": "linear", "augment": "none", "matmul": "float32", "path": "stack", "convolution": ""}
    sizes = {"images": 4096, "test_images": 1, "batch": 1, "clients": [2, 4, 8], "intervals": [1, 4, 8, 16]}
    rest = {"units": 8, "points": 8, "ways": ways, "speedup": speedup}
    return Protocol(model="resnet56", data="CIFAR-10", lrs=[*lrs], **names, **sizes, **rest)


def test_a_speedups_runs_come_by_importance_and_cost_what_they_are():
    import paper
    from paper_runs import cells_of

    def runs(protocol, seeds=1):
        return [(*cell, name) for cell in cells_of(protocol, seeds) for name in protocol.schedules(cell)]

    decayed = [(0, i, 8, "decayed") for i in (1, 8, 16, 4)]
    constant = [(0, 4, n, "constant") for n in (8, 2, 4)]
    some, both = a_protocol([4]), a_protocol([])
    assert runs(some) == decayed + constant
    assert runs(some, 2) == [(seed, *run) for seed in (0, 1) for _, *run in decayed + constant]
    assert {*runs(a_protocol([4, 1]))} == {*decayed, *constant} | {(0, 1, n, "constant") for n in (2, 4, 8)}
    grid = [(i, n) for i in (1, 8, 16, 4) for n in (8, 2, 4)]
    assert runs(both) == [(0, *each, name) for each in grid for name in ("constant", "decayed")]
    # Local steps of a client are 4,096 / N; of the largest N the half that both schedules share counts once.
    options = SimpleNamespace(seeds=1, workers=1)
    assert paper.total_cost(some, 8, 8, options) == 4.5 * 512 + 2048 + 1024
    assert paper.total_cost(both, 8, 8, options) == 1.5 * 4 * (512 + 2048 + 1024)
    # Measured are the ends of what is run, and what the trials of lr need.
    assert [some.ends(n) for n in (2, 4, 8)] == [(4, 4), (4, 4), (1, 16)]
    assert [a_protocol([4], (0.1, 0.2)).ends(n) for n in (2, 4)] == [(1, 4), (4, 4)]
    assert [both.ends(n) for n in (2, 4, 8)] == [(1, 16)] * 3


def test_a_folder_of_runs_keeps_to_what_it_was_begun_with(photos, tmp_path, capsys):
    run_paper(tmp_path, photos, "--budget", "0")
    assert run_paper(tmp_path, photos, "--budget", "0", "--batch", "4") == 2
    assert "was begun with batch = 2" in capsys.readouterr().err


def paper_rows(protocol, runs):
    """Runs of (seed, I, N), constant lr, or (seed, I, N, schedule): accuracies at evaluations a joint epoch apart."""
    rows = [{"kind": "protocol", **protocol}]
    for (seed, i, n, *schedule), accuracies in runs.items():
        run = {"kind": "run", "seed": seed, "interval": i, "clients": n, "lr": 0.1}
        run["schedule"] = "".join(schedule) or "constant"
        run |= {"device": "cpu", "torch": "2", "commit": "abc", "status": "done"}
        points = [[16 * (k + 1) // n, k + 1, 1.0, 2.0, 2.0, a] for k, a in enumerate(accuracies or [])]
        rows.append(run | ({"curve": points} if accuracies else {"status": "diverged"}))
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_the_papers_table_says_which_seeds_are_missing_and_how_linear_the_speedup_is(tmp_path):
    import paper_pictures

    protocol = {"model": "resnet56", "data": "CIFAR-10", "images": 128, "batch": 2, "clients": [2, 4, 8], "seeds": 3}
    protocol |= {"intervals": [1, 4], "lrs": [0.1], "scale": "linear", "units": 4}
    runs = {(seed, 1, n): [0.2, 0.4, 0.6] for seed in range(3) for n in (2, 4, 8)}
    runs |= {(2, 1, 4): None, (0, 4, 2): [0.2, 0.4, 0.6]}
    (tmp_path / "rows.jsonl").write_text(paper_rows(protocol, runs))
    text = paper_pictures.table(tmp_path)
    assert "E = 8 joint epochs, lr ÷ 10 at 4 and 6" in text
    assert "to 60.0 % test accuracy" in text
    assert "| 2 | 1 | 3 | 60.00 ± 0.00 |" in text
    assert "| 4 | 1 | 2 of 3 (1 diverged) |" in text
    assert "| 2 | 4 | 1 of 3 |" in text
    assert "| 8 | 4 | 0 of 3 | – |" in text
    assert "lr decayed: no run is finished." in text
    groups = [group for group in paper_pictures.groups_of(tmp_path) if group.schedule == "constant"]
    # As many joint epochs for every N are a speedup that is linear in N.
    for target in (0.1, 0.2, 0.3, 0.6):
        found = paper_pictures.speedups(groups, target)
        assert {key: values for key, values in found.items() if values and key[1] == 1} == {
            (2, 1): [1.0] * 3,
            (4, 1): [2.0] * 2,
            (8, 1): [4.0] * 3,
        }
    assert paper_pictures.reached(groups[0].curves[0], 0.3, paper_pictures.EPOCHS) == pytest.approx(1.5)
    assert paper_pictures.reached(groups[0].curves[0], 0.61, paper_pictures.EPOCHS) is None
    paper_pictures.draw_speedup(tmp_path)
    assert (tmp_path / "speedup.png").stat().st_size < 200_000


@pytest.mark.slow
def test_a_speedups_table_and_pictures_have_nothing_that_was_not_asked_for(tmp_path):
    import paper_pictures

    protocol = {"model": "resnet56", "data": "CIFAR-10", "images": 128, "batch": 2, "clients": [2, 4, 8], "seeds": 1}
    protocol |= {"intervals": [1, 4], "lrs": [0.1], "scale": "linear", "units": 4, "speedup": [4]}
    runs = {(0, 1, 8, "decayed"): [0.2, 0.6], **{(0, 4, n): [0.2, 0.6] for n in (2, 8)}}
    (tmp_path / "rows.jsonl").write_text(paper_rows(protocol, runs))
    constant, decayed = paper_pictures.table(tmp_path).split("lr decayed: ")
    rows = [
        [line.split(" | ")[:3] for line in part.splitlines() if line[:3].strip("| ").isdigit()]
        for part in (constant, decayed)
    ]
    assert rows == [
        [["| 2", "4", "1"], ["| 4", "4", "0 of 1"], ["| 8", "4", "1"]],
        [["| 8", "1", "1"], ["| 8", "4", "0 of 1"]],
    ]
    assert "speedup" in constant
    assert "speedup" not in decayed
    columns = paper_pictures.columns_of(paper_pictures.groups_of(tmp_path), speedup=True)
    assert {title: [*lines] for title, lines in columns.items()} == {
        "I = 4, lr constant": ["N = 2", "N = 4", "N = 8"],
        "N = 8, lr decayed": ["I = 1", "I = 4"],
    }
    for kept in (runs, dict.fromkeys(runs)):  # as they are, and all diverged
        (tmp_path / "rows.jsonl").write_text(paper_rows(protocol, kept))
        paper_pictures.draw_all(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "paper.md", "curves.png", "speedup.png"}


@table("counts", [(1, 0), (3, 1), (65, 64)])
def test_images_come_out_of_atlases_in_their_labels_order(counts, tmp_path):
    from paper_data import read_images
    from PIL import Image

    rng = np.random.default_rng(1)
    labels, images = {}, {}
    for name in ("train", "test"):
        y = labels[name] = rng.permutation(np.repeat([0, 1], counts))
        x = images[name] = rng.integers(256, size=(len(y), 3, 32, 32), dtype=np.uint8)
        for label in np.unique(y):
            own = x[y == label]
            pixels = np.zeros((-(-len(own) // 64) * 32, 64 * 32, 3), np.uint8)
            for place, image in enumerate(own):
                row, column = 32 * (place // 64), 32 * (place % 64)
                pixels[row : row + 32, column : column + 32] = image.transpose(1, 2, 0)
            Image.fromarray(pixels).save(tmp_path / f"{name}_{label}.webp", lossless=True, exact=True)
    np.savez(tmp_path / "labels.npz", **labels)
    data = read_images(tmp_path)
    for found, wanted in zip(data[:4], (images["train"], labels["train"], images["test"], labels["test"]), strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.slow
def test_the_paper_survives_kills_at_any_moment(photos, tmp_path):
    whole = tmp_path / "whole"
    run_paper(whole, photos)
    out = tmp_path / "killed"
    command = [sys.executable, str(BENCHMARKS / "paper.py"), "--out", str(out), "--data", str(photos), *SMALLEST]
    quiet = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = 0
    for rows in range(1, len(lines(whole)), 2):  # each time a process begins anew, which takes seconds
        process = subprocess.Popen(command, **quiet)
        while process.poll() is None and (not (out / "rows.jsonl").exists() or len(lines(out)) < rows):
            time.sleep(0.001)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        for line in (line for line in lines(out) if line.endswith("\n")):
            json.loads(line)
    assert killed >= 5
    assert subprocess.run([*command, "--workers", "2"], **quiet).returncode == 0
    assert curves(out) == curves(whole)
    assert len(list(out.iterdir())) <= 8


# --- the engine on a GPU --------------------------------------------------------------------------------------


def test_the_gpu_table_compares_like_with_like_and_counts_what_is_wrong(tmp_path):
    from gpu_table import best_of, table

    card = {"device": "card", "torch": "2", "commit": "abc", "model": "cnn"}
    speed = card | {"section": "speed"}
    rates = [("resident model, plain PyTorch", "float32", 100.0), ("resident model, plain PyTorch", "tf32", 200.0)]
    rows = [{**speed, "way": way, "form": form, "rate": rate} for way, form, rate in rates]
    rates = [("stack loop", "float32", 50, 300.0), ("stack loop", "float32", 10, 350.0), ("stack", "tf32", 50, 500.0)]
    rates += [("factors", "float32", 50, 320.0), ("factors, no graph", "float32", 50, 900.0)]
    rows += [{**speed, "way": way, "form": form, "chunk": k, "rate": rate} for way, form, k, rate in rates]
    rows.append({**speed, "way": "vmap", "form": "float32", "chunk": 50, "failed": "no memory"})
    measures = ("params", "momentum", "buffers", "train_loss", "consensus_distance", "momentum_spread")
    check = card | {"section": "check", "way": "stack", "form": "float64"} | dict.fromkeys(measures, 0.5)
    rows += [check | {"wrong": True}, check | {"way": "loop", "wrong": False}, check | {"way": "vmap", "failed": "so"}]
    assert [(way.name, way.chunk) for way in best_of(rows, "float32")] == [("stack loop", 10), ("factors", 50)]
    assert [way.name for way in best_of(rows)] == ["stack", "stack loop", "factors"]
    text = table(rows)
    assert "| cnn | stack loop | float32 | 10 | 350 | 3.50 |" in text
    assert "| cnn | stack | tf32 | 50 | 500 | 2.50 |" in text
    assert "| cnn | vmap | float32 | 50 | no memory | – |" in text
    assert "Checks: 3, of which 1 WRONG and 1 could not run." in text


@pytest.mark.slow
def test_the_gpu_check_finds_a_way_that_is_wrong(monkeypatch):
    import gpu_ways

    from fedmom.engine.stacked.convolutions import CONVOLUTIONS

    right = CONVOLUTIONS["loop"]
    monkeypatch.setitem(CONVOLUTIONS, "grouped", lambda *given: 1.00001 * right(*given))
    load = gpu_ways.Load("cnn", 3, 10, 3, 4, 2, shape=(3, 8, 8))
    data = gpu_ways.images(30, (3, 8, 8))
    wanted = gpu_ways.exact(load, data)
    ways = [gpu_ways.Way("stack", name, "float64", 2) for name in ("loop", "grouped", "unfold")]
    rows = [gpu_ways.check(load, data, way, wanted, "cpu") for way in ways]
    assert [row.get("wrong") for row in rows] == [False, True, False], rows


@pytest.mark.slow
def test_the_gpu_script_ends_in_its_budget_with_what_it_had(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path), "--device", "cpu", "--quick"]
    done = subprocess.run([*command, "--section", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = lines(tmp_path)
    assert all(json.loads(line)["section"] == "check" for line in whole)
    begin = time.monotonic()
    done = subprocess.run(
        [*command, "--section", "speed", "resnet", "--seconds", "9", "--budget", "0.5"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 60
    assert "speed: " in done.stderr
    assert lines(tmp_path)[: len(whole)] == whole
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a card, the kernels are not interpreted")
def test_every_choice_of_tiles_gives_the_same_sums(monkeypatch):
    pytest.importorskip("triton")
    import gpu_tiles

    monkeypatch.setattr(gpu_tiles, "DEVICE", "cpu")
    shapes = {
        "cnn, first": (2, 2, 3, 32, 1, 0, 8),
        "16 to 16": (2, 2, 16, 16, 1, 1, 6),
        "wide": (1, 1, 64, 64, 2, 1, 6),
    }
    monkeypatch.setattr(gpu_tiles, "SHAPES", shapes)
    wanted = {}
    for case in gpu_tiles.cases():
        found = gpu_tiles.runner(case)().double()
        right = wanted.setdefault(case[:2], found)
        assert float((found - right).norm()) <= 1e-5 * float(right.norm()), case
    assert len(wanted) == 3 * 3 - 1  # no gradient of the images
