"""Clients that come with the data, or from a rule of the user's own: who holds what, and what is refused."""

import json
import sys
import textwrap

import numpy as np
import pytest
import torch

from both_sides import DIGITS, assert_same, by_engine, by_flower
from fedmom.config.examples import load_data
from fedmom.config.load import flat, load
from fedmom.config.resolve import resolve
from fedmom.data.datasets import load_dataset
from fedmom.data.given.natural import drawn_clients, natural_partition, owned, pick_ids
from fedmom.data.given.own_rule import own_partition
from fedmom.data.sources.leaf import ALPHABET
from fedmom.errors import InputError
from laws import table


def refused(*words, do):
    """The one line with which `do` ends."""
    with pytest.raises(InputError) as caught:
        do()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def held(**keys):
    return load_data(resolve(load({f"data.{name.replace('_', '-')}": value for name, value in keys.items()})).config)


def arrays(num=40, tests=12, clients=5, seed=0):
    """Features whose first number is the example's own, so that it can be followed."""
    rng = np.random.default_rng(seed)
    x, m = np.arange(num, dtype=np.float32).reshape(-1, 1), np.arange(tests, dtype=np.float32).reshape(-1, 1)
    return {
        "x_train": x,
        "y_train": rng.integers(0, 3, num),
        "x_test": m,
        "y_test": rng.integers(0, 3, tests),
        "writer": rng.permutation(np.arange(num) % clients) * 11 - 7,
        "writer_test": np.arange(tests) % (clients + 1) * 11 - 7,  # the last one trains on nothing
    }


# Natural clients


@table(
    "kind, num_all",
    [(kind, n) for kind in (np.int64, np.uint16, str, bytes, object, list, torch.Tensor) for n in (1, 2, 5)],
)
def test_a_client_holds_the_examples_with_its_id_and_no_others(kind, num_all):
    """As plain Python says it, in the order of the sorted ids; tests too, and those of strangers are nobody's."""
    ids, tests = np.arange(23) * 7 % num_all, np.arange(9) % (num_all + 1)
    given = {"who": ids, "who_test": tests}
    if kind in (str, bytes, object, list):
        words = {name: [f"client {k}" for k in value] for name, value in given.items()}
        given = {n: v if kind is list else np.array(v, dtype={bytes: "S"}.get(kind, kind)) for n, v in words.items()}
    else:
        given = {n: torch.from_numpy(v) if kind is torch.Tensor else v.astype(kind) for n, v in given.items()}
    found = natural_partition(pick_ids("data", "who", given, [*given], (23, 9)), "who", num_all)
    assert found.partition.num_clients == found.test_partition.num_clients == num_all
    for part, own in ((found.partition, ids), (found.test_partition, tests)):
        for client in range(num_all):
            assert part.of(client).tolist() == [e for e in range(len(own)) if own[e] == client]
    assert [str(one) for one in found.ids] == [
        str(k) if found.ids.dtype.kind == "i" else f"client {k}" for k in range(num_all)
    ]


def test_the_drawn_clients_are_uniform_nested_and_the_seeds_own():
    for num_all in (1, 2, 5, 40):
        for seed in (0, 1):
            smaller = set()
            for n in range(1, num_all + 1):
                drawn = drawn_clients(num_all, n, seed)
                assert len(drawn) == n
                assert (np.diff(drawn) > 0).all()
                assert smaller <= {*drawn}
                smaller = {*drawn}
            assert smaller == {*range(num_all)}  # N of N are all, in their order
    counts = np.bincount(np.concatenate([drawn_clients(10, 3, seed) for seed in range(2000)]), minlength=10)
    # Each is drawn with probability 3/10: five standard deviations of 2,000 draws.
    assert np.abs(counts - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)


def test_a_draw_holds_the_drawn_clients_examples_alone(tmp_path):
    np.savez(tmp_path / "mine.npz", **(mine := arrays()))
    keys = {"dataset": str(tmp_path / "mine.npz"), "partition": "natural", "clients": "writer"}
    everybody = held(**keys, num_clients=0)
    assert everybody.ids.tolist() == np.unique(mine["writer"]).tolist()
    assert everybody.partition.sizes.sum() == 40
    for n in (1, 2, 5):
        some = held(**keys, num_clients=n)
        assert some.partition.num_clients == n
        for c, one in enumerate(some.ids):
            assert some.partition.of(c).tolist() == np.flatnonzero(mine["writer"] == one).tolist()
            assert some.own.partition.of(c).tolist() == np.flatnonzero(mine["writer_test"] == one).tolist()
    all_five = held(**keys, num_clients=5)
    assert np.array_equal(all_five.partition.indices, everybody.partition.indices)
    del mine["writer_test"]
    np.savez(tmp_path / "mine.npz", **mine)
    assert held(**keys, num_clients=0).own is None


def test_zero_becomes_the_number_that_there_are_and_stays_it(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    data = {"dataset": str(tmp_path / "mine.npz"), "partition": "natural", "clients": "writer", "num-clients": 0}
    ring = {"name": "d-sgd-m", "topology": "ring"}
    settled = resolve(load({"data": data, "algorithm": ring})).config
    assert settled.data.num_clients == settled.algorithm.cohort_size == 5
    assert flat(resolve(load(settled)).config) == flat(settled)
    elsewhere = load({"data": {**data, "dataset": "/nowhere/mine.npz"}})
    assert resolve(elsewhere, here=False).config.data.num_clients == 0
    refused("there is no file /nowhere/mine.npz", do=lambda: resolve(elsewhere))


def test_what_is_wrong_with_ids_is_said(tmp_path):
    right = arrays()
    keys = {"partition": "natural", "clients": "writer", "num_clients": 2}
    for changes, words in [
        ({"writer": right["writer"][1:]}, ["writer has 39 ids, x_train has 40 examples"]),
        ({"writer_test": right["writer_test"][1:]}, ["writer_test has 11 ids, x_test has 12 examples"]),
        ({"writer": right["writer"].astype(float)}, ["writer has dtype float64", "integers or strings"]),
        ({"writer": right["writer"] > 0}, ["writer has dtype bool"]),
        ({"writer": right["writer"].reshape(-1, 1)}, ["shape [40, 1]: ids are [n]"]),
        ({"writer_test": right["writer_test"].astype(str)}, ["writer has integers and writer_test has strings"]),
        ({"writer": np.array([2**63] * 40, dtype=np.uint64)}, ["2^63 and more"]),
    ]:
        np.savez(tmp_path / "mine.npz", **{**right, **changes})
        refused("data.clients = 'writer'", *words, do=lambda: held(**keys, dataset=str(tmp_path / "mine.npz")))
    np.savez(tmp_path / "mine.npz", **right, role=np.arange(40))
    keys["dataset"] = str(tmp_path / "mine.npz")
    for n in (0, 2):
        words = ["data.clients = 'writr' is not known: did you mean writer?", "writer, role"]
        refused(*words, do=lambda n=n: held(**{**keys, "clients": "writr", "num_clients": n}))
        refused("has no ids of clients", do=lambda n=n: held(**{**keys, "dataset": "digits", "num_clients": n}))
    refused("data.num-clients = 6", "has 5 clients", "or 0 for all", do=lambda: held(**{**keys, "num_clients": 6}))
    refused("data.min-size = 9: client", "has 8 examples", do=lambda: held(**keys, min_size=9))
    refused(
        "data.clients = 'writer': needs data.partition = 'natural', not 'iid'",
        do=lambda: held(**{**keys, "partition": "iid"}),
    )
    refused("data.partition = 'natural': needs data.clients", do=lambda: held(**{**keys, "clients": ""}))
    refused("data.num-clients = 0: must be >= 1", do=lambda: held(num_clients=0))
    for own in ("local", "quadratic"):
        refused(f"data.dataset = {own!r} has clients of its own", do=lambda own=own: held(**{**keys, "dataset": own}))


# Whole runs


def written(tmp_path):
    """Real digits with the ids of five clients of unequal sizes; the keys of a run of them, and of what each holds."""
    data, names = load_dataset("digits"), np.array(["dora", "adam", "emil", "bert", "cleo"])
    writer = names[np.minimum(np.random.default_rng(3).geometric(0.4, 1437) - 1, 4)]
    content = {name: getattr(data, name).numpy() for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(tmp_path / "written.npz", **content, writer=writer)
    for client, name in enumerate(sorted(names)):
        own = {part: content[part][writer == name] for part in ("x_train", "y_train")}
        np.savez(tmp_path / f"client-{client}.npz", **own)
    np.savez(tmp_path / "test.npz", x_test=content["x_test"], y_test=content["y_test"])
    few = {**DIGITS, "run.num-rounds": 2}
    keys = {**few, "data.num-clients": 0, "data.partition": "natural", "data.clients": "writer"}
    local = {**few, "data.dataset": "local", "data.data-dir": str(tmp_path)}
    return {**keys, "data.dataset": str(tmp_path / "written.npz")}, local


def test_a_run_is_that_of_clients_who_hold_these_examples_themselves(tmp_path):
    """Under Flower too, where server and nodes count the clients by themselves."""
    keys, local = written(tmp_path)
    result = by_engine(keys, out=tmp_path / "run")
    assert_same(result, by_engine(local))
    flower, _ = by_flower(keys, 2, out=tmp_path / "flower")
    assert_same(result, flower)
    for folder in ("run", "flower"):
        assert load(tmp_path / folder / "config.toml").config.data.num_clients == 5


def test_a_resume_takes_the_same_clients_and_refuses_others(tmp_path):
    keys, _ = written(tmp_path)
    keys |= {"data.num-clients": 3, "run.checkpoint-every": 1}
    whole = by_engine(keys)
    by_engine({**keys, "run.num-rounds": 1}, out=tmp_path / "parts")
    assert_same(by_engine(keys, resume=tmp_path / "parts"), whole, 0)
    content = dict(np.load(tmp_path / "written.npz"))
    np.savez(tmp_path / "written.npz", **{**content, "writer": content["writer"][::-1]})
    more = {**keys, "run.num-rounds": 4}
    refused("data.partition = 'natural': which client holds", do=lambda: by_engine(more, resume=tmp_path / "parts"))


@pytest.mark.slow
def test_rays_actors_run_natural_clients_as_the_engine_does(tmp_path):
    pytest.importorskip("ray")
    keys, _ = written(tmp_path)
    whole = by_engine(keys)
    actors = {"simulation.num-actors": 2, "simulation.clients-per-node": 2}
    assert_same(by_engine({**keys, "engine.workers": 2}), whole)
    assert_same(by_engine({**keys, **actors, "run.backend": "simulation"}), whole)


# A rule of the user's own


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """A module of the user's own with every kind of rule."""
    (tmp_path / "own_rules.py").write_text(
        textwrap.dedent("""
        import numpy as np
        import torch

        def by_label(labels, num_clients, seed):
            return labels % num_clients

        def as_parts(labels, num_clients, seed):
            return [np.flatnonzero(labels % num_clients == c) for c in range(num_clients)]

        def as_tensor(labels, num_clients, seed):
            return torch.from_numpy(labels % num_clients)

        def as_list(labels, num_clients, seed):
            return (labels % num_clients).tolist()

        def some(labels, num_clients, seed, *, alpha, dataset):
            assert alpha == 0.3 and len(dataset.y_train) == len(labels)
            return np.where(np.arange(len(labels)) < 3 * num_clients, np.arange(len(labels)) % num_clients, -1)

        def wrong(what):
            return lambda labels, num_clients, seed: what
        raises = lambda labels, num_clients, seed: 1 / 0
        short = wrong(np.zeros(3, dtype=int))
        high = wrong(np.arange(12))
        low = wrong(np.full(12, -2))
        floats = wrong(np.zeros(12))
        nothing = wrong(None)
        twice = wrong([[0, 1], [1, 2]])
        again = wrong([[0, 1, 1], [2]])
        beyond = wrong([[0], [12]])
        lonely = wrong([[0, 1], []])
        three = wrong([[0], [1], [2]])
        """)
    )
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_rules", None)


def test_a_rule_of_ones_own_decides(rules):
    labels = np.arange(12) % 5
    for n in (1, 2, 5):
        for name in ("by_label", "as_parts", "as_tensor", "as_list"):
            part = own_partition(f"own_rules:{name}", labels, n, more={})
            for client in range(n):
                assert part.of(client).tolist() == np.flatnonzero(labels % n == client).tolist()
    found = held(partition="own_rules:some", num_clients=5)
    assert found.partition.sizes.tolist() == [3] * 5
    assert found.partition.of(1).tolist() == [1, 6, 11]
    assert owned(np.full(4, -1), 2).sizes.tolist() == [0, 0]
    few = ["client 0 gets 2 examples", "at least 3 (data.min-size)"]
    refused(*few, do=lambda: own_partition("own_rules:by_label", np.arange(4), 2, min_size=3, more={}))


@table(
    "name, words",
    [
        ("raises", ["raised ZeroDivisionError", "own_rules.py:"]),
        ("short", ["returned 3 numbers for 12 examples", "owner [n]"]),
        ("high", ["example 11 is of client 11", "0 to 1"]),
        ("low", ["example 0 is of client -2"]),
        ("floats", ["dtype float64"]),
        ("nothing", ["whole numbers"]),
        ("twice", ["clients 0 and 1 both get example 1"]),
        ("again", ["client 0 gets example 1 twice"]),
        ("beyond", ["client 1 gets example 12", "0 to 11"]),
        ("lonely", ["client 1 gets 0 examples", "at least 1"]),
        ("three", ["returned 3 parts", "data.num-clients = 2"]),
        ("missing", ["has no attribute"]),
    ],
)
def test_what_is_wrong_with_a_rule_is_said(rules, name, words):
    spec = f"own_rules:{name}"
    refused(f"data.partition = {spec!r}", *words, do=lambda: own_partition(spec, np.arange(12), 2, min_size=0, more={}))


# LEAF's format, and folders of images


def write_leaf(folder, parts, split="train", file="a.json", **changes):
    """parts: {user: (x, y)}, in the order in which LEAF writes them."""
    content = {
        "users": [*parts],
        "num_samples": [len(y) for _, y in parts.values()],
        "user_data": {user: {"x": x, "y": y} for user, (x, y) in parts.items()},
    }
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / split / file).write_text(json.dumps(content | changes))


def test_leafs_files_are_read_user_by_user(tmp_path):
    pixel = lambda k: [k / 255] * 784  # noqa: E731
    write_leaf(tmp_path, {"f02": ([pixel(1), pixel(2)], [3, 61]), "f01": ([pixel(3)], [0])}, file="b.json")
    write_leaf(tmp_path, {"f00": ([pixel(4)] * 3, [5, 5, 6])}, file="a.json")
    write_leaf(tmp_path, {"f01": ([pixel(5)], [1]), "f09": ([pixel(6)], [2])}, split="test")
    keys = {"dataset": f"{tmp_path}/", "partition": "natural", "clients": "users"}
    found = held(**keys, num_clients=0)
    assert found.ids.tolist() == ["f00", "f01", "f02"]
    assert found.dataset.x_train.shape == (6, 1, 28, 28)
    assert found.dataset.num_classes == 62
    for client, (pixels, labels) in enumerate([([4, 4, 4], [5, 5, 6]), ([3], [0]), ([1, 2], [3, 61])]):
        own = found.partition.of(client)
        assert found.dataset.x_train[own, 0, 0, 0].tolist() == pytest.approx([p / 255 for p in pixels], abs=1e-7)
        assert found.dataset.y_train[own].tolist() == labels
    assert found.own.partition.sizes.tolist() == [0, 1, 0]
    assert held(**keys, num_clients=2).partition.num_clients == 2
    assert held(dataset=f"{tmp_path}/", partition="iid", num_clients=3).partition.sizes.tolist() == [2, 2, 2]

    # Shakespeare: characters by their places in the alphabet, all 80 of them classes.
    tmp_path /= "text"
    assert len(ALPHABET) == len(set(ALPHABET)) == 80
    lines = [ALPHABET, ALPHABET[::-1]]
    write_leaf(tmp_path, {"HAMLET": (lines, ["a", "}"])})
    write_leaf(tmp_path, {"HAMLET": (lines[:1], ["\n"])}, split="test")
    found = held(dataset=f"{tmp_path}/", partition="natural", clients="users", num_clients=1)
    assert found.dataset.x_train.tolist() == [[*range(80)], [*range(79, -1, -1)]]
    assert found.dataset.y_train.tolist() == [ALPHABET.index("a"), 79]
    assert (found.dataset.num_classes, found.dataset.x_train.dtype) == (80, torch.int64)


def test_what_is_wrong_with_leafs_files_is_said(tmp_path):
    good = {"u": ([[0.5, 1.0]], [1])}
    keys = {"partition": "natural", "clients": "users"}
    for number, (parts, changes, words) in enumerate(
        [
            ({"u": ([[0.5]], [])}, {}, ["user 'u': x has 1 examples, y has 0"]),
            ({"u": ([], [])}, {}, ["user 'u': has no examples"]),
            (good, {"num_samples": [4]}, ["num_samples says 4"]),
            (good, {"num_samples": [1, 1]}, ["1 users and 2 num_samples"]),
            (good, {"users": ["v"]}, ["user 'v': has no lists x and y"]),
            ({"u": ([[0.5], [1.0, 2.0]], [1, 2])}, {}, ["differ in length"]),
            ({"u": (["a€"], ["b"])}, {}, ["the character '€'"]),
            ({"u": (["ab", "a"], ["b", "c"])}, {}, ["different lengths"]),
            ({"u": (["face.jpg"], [1])}, {}, ["no single characters"]),
            ({"u": ([["id", "text"]], [1])}, {}, ["no lists of numbers"]),
            ({"u": ([[0.5]], [1]), "v": ([[0.5, 1.0]], [1])}, {}, ["user 'v' are [2], those before [1]"]),
            (good, {"user_data": []}, ["is not LEAF's format"]),
        ]
    ):
        folder = tmp_path / str(number)
        write_leaf(folder, good, split="test")
        write_leaf(folder, parts, **changes)
        name = f"{folder}/"
        refused(
            f"data.dataset = {name!r}", "a.json", *words, do=lambda name=name: held(**keys, dataset=name, num_clients=1)
        )
    write_leaf(tmp_path, good)
    name = f"{tmp_path}/"
    refused("test: has no .json file", do=lambda: held(**keys, dataset=name, num_clients=0))
    write_leaf(tmp_path, good, split="test")
    refused("choose one of users", do=lambda: held(**{**keys, "clients": "folders"}, dataset=name, num_clients=0))
    write_leaf(tmp_path, good, file="b.json")
    refused("b.json: user 'u' comes twice", do=lambda: held(**keys, dataset=name, num_clients=1))
    refused("there is no folder", do=lambda: held(dataset="no/such", num_clients=1))


def test_folders_of_images_have_a_folder_for_each_client(tmp_path):
    image = pytest.importorskip("PIL.Image")
    shades = {"bob": {"cat": [10, 11], "dog": [12]}, "ann": {"dog": [20]}, "eve": {"cat": [30]}}
    for client, labels in shades.items():
        for label, values in labels.items():
            for split in ("train", "test")[: 1 + (client == "ann")]:
                (place := tmp_path / split / client / label).mkdir(parents=True)
                for k, value in enumerate(values):
                    image.fromarray(np.full((5, 4), value, np.uint8)).save(place / f"{k}.png")
    keys = {"dataset": f"{tmp_path}/", "classes": "cat,dog", "partition": "natural", "clients": "folders"}
    found = held(**keys, num_clients=0)
    assert found.ids.tolist() == ["ann", "bob", "eve"]
    for client, (values, labels) in enumerate([([20], [1]), ([10, 11, 12], [0, 0, 1]), ([30], [0])]):
        own = found.partition.of(client)
        assert found.dataset.x_train[own, 0, 0, 0].tolist() == values
        assert found.dataset.y_train[own].tolist() == labels
    assert found.own.partition.sizes.tolist() == [1, 0, 0]
    refused("choose one of folders", do=lambda: held(**{**keys, "clients": "users"}, num_clients=0))
    refused("data.classes must name it", do=lambda: held(**{**keys, "classes": ""}, num_clients=1))
    (tmp_path / "train" / "stray.png").touch()
    refused("stray.png: lies beside the folders of clients", do=lambda: held(**keys, num_clients=0))
