"""What a sweep on a cluster asks of its machines and of Ray; tests/cluster has it on real ones."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from fedmom.actors.nodes import RayNode
from fedmom.backends.premises import Premises, trouble_with
from fedmom.errors import InputError
from fedmom.experiments import ray_crew
from fedmom.experiments.crew import Cell, SweepWork
from fedmom.experiments.ray_crew import premises_of, runs_at_a_time, wait_until_left
from fedmom.records.status import Heart
from laws import table


@pytest.fixture
def premises(tmp_path, monkeypatch):
    return of_a_sweep(tmp_path, monkeypatch)


def of_a_sweep(tmp_path, monkeypatch):
    """Of a sweep into out/, started in a folder with a module and data; the note is there."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("mine.toml").write_text('[data]\ndata-dir = "images"\n')
    Path("model.py").write_text("one = 1\n")
    Path("images").mkdir()
    work = SweepWork(str(tmp_path / "mine.toml"), str(tmp_path / "out"), (), ())
    found = premises_of(work, [Cell("a", {"algorithm.topology": "links.csv"}, "a")])
    Path(found.note).write_text(found.token)
    return found


def test_every_file_that_a_key_names_is_among_the_premises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.npz", "train.bin", "start.safetensors", "w.csv"):
        Path(name).touch()
    Path("table").mkdir()
    Path("mine.toml").write_text('[model]\nstart = "start.safetensors"\n')
    work = SweepWork(str(tmp_path / "mine.toml"), str(tmp_path), (), ())
    for dataset, place in (("a.npz", "a.npz"), ("train.bin", "train.bin"), ("hf:table/", "table/"), ("hf:mnist", "")):
        sets = {"data.dataset": dataset, "algorithm.topology": "w.csv"}
        found = {*premises_of(work, [Cell("a", sets, "a")]).data.values()}
        assert found == {"start.safetensors", "w.csv"} | ({place} if place else set()), dataset


def test_a_machine_that_sees_everything_has_no_trouble(premises):
    assert trouble_with(premises) == ""
    assert [*premises.data] == ["data.data-dir = 'images'"]  # what is not here either is another check's
    assert len(premises.files) == 2


@table(
    "spoil, why",
    [
        (lambda one: os.remove(one.note), "does not see the sweep's folder .*/out; name an --out on a disk that all"),
        (lambda one: Path(one.note).write_text("another"), "does not see the sweep's folder"),
        (lambda one: one._replace(here="/nowhere"), "has no folder /nowhere; start the sweep in a folder on a disk"),
        (lambda one: Path("model.py").write_text("one = 2\n"), r"has another .*/model\.py; keep it on a disk"),
        (lambda one: os.remove("mine.toml"), r"does not see .*/mine\.toml"),
        (lambda one: os.rmdir("images"), r"does not see data\.data-dir = 'images'; put the data there"),
    ],
)
def test_what_a_machine_lacks_is_named(tmp_path, monkeypatch, spoil, why):
    premises = of_a_sweep(tmp_path, monkeypatch)
    spoiled = spoil(premises)
    assert re.match(why, trouble_with(spoiled if isinstance(spoiled, Premises) else premises))


def test_the_file_that_all_see_tells_them_to_end(premises):
    assert not premises.asked_to_end()
    premises.ask_to_end()
    assert premises.asked_to_end()
    assert trouble_with(premises) == ""
    os.remove(premises.note)  # a disk that does not answer ends no run
    assert not premises.asked_to_end()


def test_whoever_takes_a_cell_over_asks_the_one_before_to_end(premises):
    first, other = premises.take_over("a"), premises.take_over("b")
    assert not first()
    second = premises.take_over("a")
    assert [first(), second(), other()] == [True, False, False]
    premises.ask_to_end()
    assert [first(), second(), other()] == [True] * 3
    premises.remove()
    assert not [*Path("out").iterdir()]
    assert not second()


def asked(workers, cpus, sets=(), address="10.0.0.1:6379", cells=9):
    nodes = [RayNode(str(i), f"node-{i} (10.0.0.{i})", {"CPU": float(count)}, count) for i, count in enumerate(cpus)]
    runs = [Cell(f"lr={i}", {"algorithm.lr": i / 10}, f"lr={i}") for i in range(1, cells + 1)]
    options, each = ray_crew.asked_of_ray(SweepWork("quadratic", "", tuple(sets), ()), runs, workers, nodes, address)
    return options.num_workers, options.num_cpus, each


@table(
    "given, options",
    [
        ({"workers": None, "cpus": [8, 8]}, (2, 8, 1)),
        ({"workers": None, "cpus": [8, 8], "cells": 1}, (1, 8, 1)),
        ({"workers": 4, "cpus": [8, 8]}, (4, 4, 2)),
        ({"workers": 3, "cpus": [8, 8]}, (3, 4, 2)),
        ({"workers": 6, "cpus": [8, 8]}, (6, 2, 3)),
        ({"workers": 6, "cpus": [2, 2]}, (6, 0.6666, 3)),  # three times 0.6667 would not fit
        ({"workers": None, "cpus": [2, 64, 64]}, (3, 2, 1)),
        ({"workers": None, "cpus": [8, 8], "sets": ["engine.workers=2"]}, (1, 1, 1)),
        ({"workers": None, "cpus": [8], "address": "local"}, (1, 1, 1)),
        ({"workers": 4, "cpus": [8], "address": "local"}, (4, 1, 4)),
    ],
)
def test_an_actor_asks_for_its_share_of_a_node(given, options):
    assert asked(**given) == options


def test_without_a_cluster_one_run_at_a_time_is_meant():
    assert [runs_at_a_time(*given) for given in ((None, ""), (3, ""), (None, "local"), (3, "10.0.0.1:6379"))] == [
        1,
        3,
        1,
        3,
    ]


def test_a_cluster_that_nobody_answers_for_is_named_by_the_option(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever other tests of this process have started
    with pytest.raises(InputError, match=r"^--ray 127\.0\.0\.1:1: nobody answers there"):
        runs_at_a_time(None, "127.0.0.1:1")


def test_a_run_of_another_machine_is_waited_for_until_it_is_silent(tmp_path, monkeypatch):
    """One that died says "running" for ever; one that was cut off changes what it says, and must not be joined."""
    monkeypatch.setattr(ray_crew, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(ray_crew, "_SECONDS_OF_SILENCE", 0.05)
    assert wait_until_left(tmp_path, bool) == ""  # not begun
    heart = Heart(tmp_path, 3)
    status = tmp_path / "status.json"
    running = {**json.loads(status.read_text()), "host": "far"}
    heart.end("interrupted")
    assert wait_until_left(tmp_path, bool) == ""
    status.write_text(json.dumps(running))
    before = time.monotonic()
    assert wait_until_left(tmp_path, bool) == ""
    assert time.monotonic() - before >= 0.05
    asked, rounds = [], iter(range(4, 1000))

    def beats():
        status.write_text(json.dumps({**running, "round": next(rounds)}))
        return bool(asked)

    monkeypatch.setattr(ray_crew, "_SECONDS_OF_SILENCE", 1e9)
    monkeypatch.setattr(ray_crew, "_SECONDS_TO_LEAVE", 0.1)
    assert wait_until_left(tmp_path, beats) == f"{tmp_path}: far is running it; end that run first"
    asked.append(True)
    assert wait_until_left(tmp_path, beats) == ""
