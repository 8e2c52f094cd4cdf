"""Data set "local": every client trains on what it holds, and the result is that of one machine which holds it all."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import nn

import fedmom
from both_sides import assert_same, by_engine, by_flower
from clients.client_app import app as client_app
from fedmom.backends.trainer import warm_node
from fedmom.data.given.own_files import client_source, read_server, read_source
from fedmom.data.local import agreed, as_record, everything, facts_of, from_record, none_of, one_of
from fedmom.errors import InputError
from grids import LocalGrid, run_config
from laws import table
from runs import LOCAL, give_digits


@table("num_clients, where", [(1, "server"), (3, "server"), (3, "clients")])
def test_rounds_are_those_of_one_machine_that_holds_it_all(tmp_path, num_clients, where):
    give_digits(tmp_path, num_clients, server=where == "server", clients=where == "clients")
    changes = {**LOCAL, "data.num-clients": num_clients, "data.data-dir": str(tmp_path)}
    result, _ = by_flower(changes, num_clients)
    assert_same(result, by_engine(changes))


class Above(fedmom.Task):
    """A task of somebody's own, whose measure is no mean over examples."""

    targets, metrics = "numbers", ("above",)

    def loss(self, outputs, targets):
        return (outputs - targets).abs().sqrt().mean()

    def measure(self, outputs, targets):
        return {"above": ((outputs > targets).sum(), (targets > 0).sum())}


def words(shape, vocabulary):
    return nn.Sequential(nn.Embedding(vocabulary, 4), nn.Linear(4, vocabulary))


@pytest.mark.slow
def test_every_task_of_clients_own_data_is_one_machines(tmp_path):
    """Each client has test examples of its own: the measures are those of all together, and no means of means."""
    rng, own = np.random.default_rng(0), f"{__name__}:"
    x = rng.normal(size=(40, 3))
    tasks = {
        "regression": (x, rng.normal(size=(40, 2)), {"run.metrics": "mae,rmse,r2"}),
        "multi-label": (x, rng.integers(0, 2, (40, 2)), {"run.metrics": "accuracy,f1,auc"}),
        "classification": (x, np.arange(40) % 3, {"run.metrics": "accuracy,f1,auc", "model.class-weights": "1,2,3"}),
        "per-token": (
            rng.integers(0, 5, (40, 4)),
            np.where(rng.random((40, 4)) < 0.3, -100, rng.integers(0, 5, (40, 4))),
            {"model.name": f"{own}words"},
        ),
        f"{own}Above": (x, rng.normal(size=40), {}),
    }
    for task, (inputs, y, changes) in tasks.items():
        folder = tmp_path / task.replace(":", "-")
        folder.mkdir()
        for client, (train, test) in enumerate([((0, 5), (30, 33)), ((5, 20), (33, 39)), ((20, 30), (39, 40))]):
            parts = {"train": slice(*train), "test": slice(*test)}
            arrays = {
                f"{n}_{part}": value[rows] for part, rows in parts.items() for n, value in (("x", inputs), ("y", y))
            }
            np.savez(folder / f"client-{client}.npz", **arrays)
        keys = {**LOCAL, "data.data-dir": str(folder), "data.task": task, "data.batch-size": 4, **changes}
        result, _ = by_flower(keys, 3)
        assert_same(result, by_engine(keys))
        assert len([name for name in result.rounds[-1] if name.startswith("test_")]) > 1, task


@table(
    "changes",
    [
        {
            "algorithm.num-local-steps": 0,
            "algorithm.local-epochs": 1,
            "algorithm.client-weights": "samples",
            "algorithm.slow-momentum": 0.5,
            "algorithm.slow-lr": 0.7,
        },
        {
            "algorithm.momentum-policy": "local",
            "algorithm.cohort-size": 2,
            "algorithm.lr-schedule": "step",
            "algorithm.lr-unit": "joint-epochs",
            "algorithm.lr-milestones": "0.01",
        },
        {"algorithm.name": "d-sgd-m", "algorithm.num-local-steps": 2},
        {"engine.path": "auto"},
    ],
)
def test_every_option_means_the_same(tmp_path, changes):
    give_digits(tmp_path, 3, server=False, clients=True)
    changes = {**LOCAL, "data.data-dir": str(tmp_path), **changes}
    if changes["algorithm.num-local-steps"] == 2:  # its own models are measured one by one, at a test set
        give_digits(tmp_path, 3)
    result, _ = by_flower(changes, 3)
    assert_same(result, by_engine(changes), 1e-9)


def test_the_engine_sees_the_clients_one_after_another(tmp_path):
    data, split = give_digits(tmp_path, 3)
    dataset, partition, _ = everything(str(tmp_path), 3)
    assert partition.sizes.tolist() == split.sizes.tolist()
    for c in range(3):
        assert torch.equal(dataset.x_train[partition.of(c)], data.x_train[split.of(c)])
    images = data.x_train.double() / 255
    assert dataset.mean == pytest.approx((float(images.mean()),), rel=1e-12)
    assert dataset.std == pytest.approx((float(images.std(correction=0)),), rel=1e-12)


def test_a_run_resumes_to_the_same_bytes(tmp_path):
    give_digits(tmp_path, 3)
    changes = {**LOCAL, "data.data-dir": str(tmp_path), "run.checkpoint-every": 1}
    whole, _ = by_flower({**changes, "run.num-rounds": 3}, 3, out=tmp_path / "whole")
    by_flower({**changes, "run.num-rounds": 1}, 3, out=tmp_path / "parts")
    parts, _ = by_flower({**changes, "run.num-rounds": 3}, 3, resume=tmp_path / "parts")
    for name, value in whole.state_dict.items():
        assert torch.equal(value, parts.state_dict[name])


def test_all_that_a_node_answers_first_are_its_facts(tmp_path):
    give_digits(tmp_path, 2)
    changes = {**LOCAL, "data.num-clients": 2, "data.data-dir": str(tmp_path)}
    _, grid = by_flower({**changes, "run.num-rounds": 1}, 2)
    facts = facts_of(read_source(tmp_path / "client-0.npz"))
    assert facts.pixels == 64 * facts.size
    assert len(facts.sums) == len(facts.squares) == 1
    assert grid is not None
    common = agreed([facts, facts_of(read_source(tmp_path / "client-1.npz"))], read_server(str(tmp_path)))
    assert from_record(ConfigRecord(as_record(common))) == common


def test_the_server_holds_no_training_example(tmp_path):
    give_digits(tmp_path, 2)
    held = [read_source(client_source(str(tmp_path), c)) for c in range(2)]
    common = agreed([facts_of(one) for one in held], read_server(str(tmp_path)))
    dataset, partition = none_of(common, read_server(str(tmp_path)))
    assert len(dataset.x_train) == 0
    assert partition.sizes.tolist() == [len(one.y_train) for one in held]
    own, _, _ = one_of(common, 1, held[1])
    assert torch.equal(own.x_train, held[1].x_train)


def test_a_node_reads_its_own_folder_first(tmp_path):
    """What --node-config says wins over the run's data.data-dir, which is the server's to choose."""
    give_digits(tmp_path, 2)
    elsewhere = {"data.data-dir": "/nowhere"}
    keys = {"partition-id": 0, "num-partitions": 1, "data-dir": str(tmp_path / "client-1.npz")}
    config = run_config({**LOCAL, "data.num-clients": 1, **elsewhere})
    grid = LocalGrid(client_app, 1, config)
    question = RecordDict({"config": ConfigRecord({"facts": True})})
    node = next(iter(grid.get_node_ids()))
    message = Message(question, message_type="query", dst_node_id=node)
    reply = client_app(message, Context(1, node, keys, RecordDict(), config))
    assert reply.content.config_records["config"]["size"] == len(read_source(tmp_path / "client-1.npz").y_train)


# Images


def give_images(folder, *, labels=("0", "2"), size=(6, 5), mode="L", num=3, split="train"):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for label in labels:
        (folder / split / label).mkdir(parents=True)
        for k in range(num):
            shape = size if mode == "L" else (*size, 3)
            image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / split / label / f"{k}.png")


@table("mode, channels", [("L", 1), ("RGB", 3)])
def test_a_folder_of_images(tmp_path, mode, channels):
    give_images(tmp_path / "client-0" / "data", mode=mode)
    give_images(tmp_path / "client-0" / "data", mode=mode, split="test", num=1)
    held = read_source(client_source(str(tmp_path), 0))
    assert held.x_train.shape == (6, channels, 6, 5)
    assert held.y_train.tolist() == [0, 0, 0, 2, 2, 2]
    assert held.y_test.tolist() == [0, 2]
    changes = {**LOCAL, "data.num-clients": 1, "data.data-dir": str(tmp_path), "data.batch-size": 2}
    assert_same(by_flower(changes, 1)[0], by_engine(changes))


def test_labels_by_name_do_not_depend_on_which_a_client_has(tmp_path):
    give_images(tmp_path, labels=("cat", "dog"))
    assert read_source(tmp_path, "ant,cat,dog").y_train.tolist() == [1, 1, 1, 2, 2, 2]


# What is wrong is named


UNFIT = [
    (lambda root: (root / "client-1.npz").unlink(), "client 1 has nothing"),
    (lambda root: (root / "client-1.npz").write_bytes(b"PK\x03\x04broken"), "client-1.npz is not an .npz file"),
    (lambda root: np.savez(root / "client-1.npz", x_train=np.zeros((2, 8, 8), np.uint8)), "has no y_train"),
    (
        lambda root: np.savez(root / "client-1.npz", x_train=np.zeros((2, 9, 9), np.uint8), y_train=np.arange(2)),
        "client 1 are uint8 [1, 9, 9], those of client 0 uint8 [1, 8, 8]",
    ),
    (lambda root: (root / "test.npz").unlink(), "nobody has test examples"),
]


@table("break_it, message, run", [(*row, run) for row in UNFIT for run in ("engine", "flower")])
def test_what_does_not_fit_is_named(tmp_path, break_it, message, run):
    give_digits(tmp_path, 2)
    break_it(tmp_path)
    changes = {**LOCAL, "data.num-clients": 2, "data.data-dir": str(tmp_path)}
    with pytest.raises(InputError) as error:
        by_engine(changes) if run == "engine" else by_flower(changes, 2)
    assert message in str(error.value)


@table(
    "files, classes, message",
    [
        ({"x.txt": b""}, "", "neither an .npz file nor a folder train"),
        ({"a.npz": b"", "b.npz": b""}, "", "has 2 .npz files"),
        ({"train/cow/1.png": b""}, "cat,dog", "must be one of data.classes = 'cat,dog'"),
        ({"train/0/.hidden": b""}, "", "has no images"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named(tmp_path, files, classes, message):
    pytest.importorskip("PIL")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"data\.dataset = 'local'") as error:
        read_source(tmp_path, classes)
    assert message in str(error.value)


def test_data_that_changed_under_way_stop_the_run_by_name(tmp_path):
    give_digits(tmp_path, 2)
    changes = {**LOCAL, "data.num-clients": 2, "data.data-dir": str(tmp_path), "run.num-rounds": 2}

    def cut(message, node_config):
        if message.metadata.message_type == "train" and node_config["partition-id"] == 1:
            held = dict(np.load(tmp_path / "client-1.npz"))
            np.savez(tmp_path / "client-1.npz", **{name: value[:5] for name, value in held.items()})

    warm_node.__globals__["_node"].cache_clear()  # each message of a deployment finds a new process
    result, _ = by_flower(changes, 2, {"fault": cut})
    assert result.status == "failed"
    assert "round 1: client 1, node" in result.message
    assert "client 1 holds 5 examples" in result.message


def test_a_resumed_run_notices_that_a_clients_data_changed(tmp_path):
    give_digits(tmp_path, 2)
    changes = {**LOCAL, "data.num-clients": 2, "data.data-dir": str(tmp_path), "run.num-rounds": 1}
    fedmom.run({}, sets=changes, out=tmp_path / "run")
    longer = {"run.num-rounds": 2}
    again = fedmom.run(resume=tmp_path / "run", sets=longer)
    assert (again.status, len(again.rounds)) == ("done", 2)
    held = dict(np.load(tmp_path / "client-1.npz"))
    np.savez(tmp_path / "client-1.npz", **{name: value[:-1] for name, value in held.items()})
    with pytest.raises(InputError, match="what the clients hold was changed since"):
        fedmom.run(resume=tmp_path / "run", sets={"run.num-rounds": 3})


def test_a_block_of_clients_cannot_hold_local_data(tmp_path):
    give_digits(tmp_path, 3)
    with pytest.raises(InputError, match="a node holds one client, this one"):
        by_flower({**LOCAL, "data.data-dir": str(tmp_path)}, 2)
