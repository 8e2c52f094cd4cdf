"""What is checked before a deployment, or a run on it, touches anything: hosts, identities, what travels, proxies."""

import io
import os
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, RecordDict

from clients import client_app
from fedmom.config.keys import Config
from fedmom.config.load import flat, load, replace
from fedmom.deploy.bundle import check_travels, modules_beside, pack, stage
from fedmom.deploy.certificates import as_sent, make_node_key
from fedmom.deploy.commands import Commands
from fedmom.deploy.deployment import open_deployment
from fedmom.deploy.federation import Found, conflict, refused
from fedmom.deploy.following import Following
from fedmom.deploy.initialise import initialise
from fedmom.errors import InputError
from fedmom.runs.progress import Left
from laws import table
from strategies.dispatch import _reason

ROOT = Path(__file__).parents[2]
NOBODY = [
    *("256.1.1.1", "10.0.0", "1", "1.2.3.4.5", "0x7f.1", "0.0.0.0", "::", "::ffff:0.0.0.0", "255.255.255.255"),
    *("224.0.0.1", "ff02::1", "fe80::1%eth0", "fe80::1", "localhost", "127.0.0.1", "::1", "::ffff:127.0.0.1", "a..b"),
]


def test_an_address_where_no_server_can_be_leaves_nothing_behind(tmp_path):
    for address in NOBODY:
        with pytest.raises(InputError, match=re.escape(f"--address '{address}': ")):
            initialise(tmp_path / "d", num_clients=1, address=address)
        assert not (tmp_path / "d").exists()
    initialise(tmp_path / "d", num_clients=1, address="fl1.example.org", hosts=["10.0.0.7", "::1"])


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_natural_clients_are_counted_where_the_data_are(tmp_path):
    """The machine that sends the configuration does not see the nodes' data, so 0 travels as it is.

    What a name sets where nothing is given does not: which keys were given is known here alone.
    """
    data = {"data.dataset": "/data/own.npz", "data.partition": "natural", "data.clients": "writer"}
    data |= {"algorithm.name": "diloco", "algorithm.optimizer": "sgd", "algorithm.momentum-policy": "average"}
    for n in (0, 4, 2):
        sets = [f"{key}={value}" for key, value in {**data, "data.num-clients": n}.items()]
        send = lambda sets=sets: pack(  # noqa: E731
            ROOT / "configs" / "quickstart.toml", sets, name="r", resume=None, app=ROOT, num_nodes=3
        )
        if n == 2:
            with pytest.raises(InputError, match=r"data\.num-clients = 2: the deployment has 3 nodes"):
                send()
        else:
            sent = send().config
            assert (sent.data.num_clients, sent.algorithm.optimizer) == (n, "sgd")
            assert sent.algorithm.states == "x: average every 1; u: average every 1"


SPOILT = {
    "another address": (lambda d: None, {"address": "fl.example.org"}),
    "another name": (lambda d: None, {"name": "Ours"}),
    "half an authority": (lambda d: (d / "ca-key.pem").unlink(), {}),
    "a broken authority": (lambda d: (d / "ca.pem").write_text("none"), {}),
    "half a server": (lambda d: (d / "server" / "server.pem").unlink(), {}),
    "half a node": (lambda d: (d / "client-1" / "node.key").unlink(), {}),
    "a key that is none": (
        lambda d: ((d / "client-1" / "node.key.pub").unlink(), (d / "client-1" / "node.key").write_text("none")),
        {},
    ),
}


@table("what", SPOILT)
def test_an_init_that_is_refused_writes_nothing(tmp_path, what):
    """Each with three clients more than there are: none of them is made."""
    spoil, words = SPOILT[what]
    initialise(tmp_path, num_clients=2)
    spoil(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(InputError):
        initialise(tmp_path, num_clients=5, **words)
    assert everything(tmp_path) == before


def test_two_deployments_are_told_apart_and_one_that_is_older_stays_what_it_was(tmp_path):
    for name in ("a", "b"):
        initialise(tmp_path / name, num_clients=1)
    a, b = (open_deployment(tmp_path / name) for name in ("a", "b"))
    assert a.identity != b.identity
    assert a.project_name != b.project_name
    lines = (tmp_path / "b" / ".env").read_text().splitlines()
    old = [line for line in lines if not line.startswith("FEDMOM_ID")]
    (tmp_path / "b" / ".env").write_text("\n".join(old).replace(b.project_name, "fedmom"))
    initialise(tmp_path / "b")
    b = open_deployment(tmp_path / "b")
    assert (b.identity, b.project_name) == ("", "fedmom")


def test_what_another_deployment_has_under_our_name_is_never_taken_for_ours(tmp_path):
    initialise(tmp_path / "a", num_clients=1, name="ours")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    ours = open_deployment(tmp_path / "a")
    here, copy, gone = (str(tmp_path / name) for name in ("a", "copy", "gone"))
    found = {
        ("ours", ours.identity, here): "",
        ("theirs", "x", copy): "",
        ("ours", ours.identity, gone): "",  # ours was moved
        ("ours", ours.identity, copy): f"was started from {copy}, which is still there",
        ("ours", "x", copy): f"is that of the deployment in {copy}",
        ("ours", "x", gone): f"is that of the deployment in {gone}",
        ("ours", "", here): "is that of an earlier deployment in the same folder",
        ("ours", "x", here): "is that of an earlier deployment in the same folder",
        ("theirs", ours.identity, here): "take them down first",  # the name was changed while they were up
    }
    for one, said in found.items():
        wrong = conflict(ours, [Found("box", *one)])
        assert said in wrong, one
        assert bool(said) == bool(wrong), one
    # Two that are older than identities, by their folders alone.
    older = ours._replace(settings={**ours.settings, "FEDMOM_ID": ""})
    assert conflict(older, [Found("box", "ours", "", here), Found("box", "ours", "", gone)]) == ""
    assert "which is still there" in conflict(older, [Found("box", "ours", "", copy)])


def test_the_shell_decides_neither_the_project_nor_a_proxy(tmp_path, monkeypatch):
    for name in (
        "COMPOSE_PROJECT_NAME",
        "COMPOSE_FILE",
        "FEDMOM_ID",
        "FEDMOM_CONTROL_PORT",
        "https_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("FEDMOM_MEMORY", "8g")
    initialise(tmp_path, num_clients=1)
    commands = Commands(open_deployment(tmp_path))
    compose, flwr = (commands.environment_of(c) for c in (commands.compose("up"), Commands.flwr("list")))
    assert not {"COMPOSE_PROJECT_NAME", "COMPOSE_FILE"} & set(compose)
    assert compose["FEDMOM_ID"] == commands.deployment.identity
    assert compose["FEDMOM_CONTROL_PORT"] == "8000"
    assert compose["FEDMOM_MEMORY"] == "8g"
    assert ["--project-name", commands.deployment.project_name] == commands.compose("up")[2:4]
    assert compose["https_proxy"] == "elsewhere"  # an engine elsewhere may need it
    assert not [name for name in flwr if name.lower().endswith("_proxy")]


@pytest.fixture
def checkout(tmp_path):
    """An app with a model of its own in clients/, and code beside it that is not bundled."""
    app = tmp_path / "app"
    for folder in ("fedmom", "clients", "strategies", "mine"):
        (app / folder).mkdir(parents=True)
        (app / folder / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", app)
    for file in ("clients/nets.py", "mine/nets.py", "own.py"):
        (app / file).write_text("def net(*words): ...")
    return app


TRAVELS = {"model.name": "clients.nets:net", "data.dataset": "/data/x.npz", "algorithm.topology": "/data/W.csv"}
STAYS = {
    "model.name": ["nowhere:net", "elsewhere:net", "test_nets:net", "lib.nets:net", "fedmom.nets:net"],
    "data.dataset": ["x.npz", "/home/me/x.npz", "/data/../x.npz", "nowhere:data"],
    "algorithm.topology": ["W.csv", "graphs/W.npy"],
    "algorithm.correction": ["nowhere:prox"],
}


def test_what_does_not_travel_is_refused_by_name(checkout, monkeypatch, in_tmp):
    (checkout / "elsewhere.py").touch()  # beside the app, and not where the command was started
    for file in ("test_nets.py", "lib/nets.py", "fedmom/nets.py"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    for name, value in TRAVELS.items():
        assert check_travels(load({name: value}).config, checkout) == ({}, {})
    for name, values in STAYS.items():
        for value in values:
            with pytest.raises(InputError, match=re.escape(f"{name} = '{value}': ")) as error:
                check_travels(load({name: value}).config, checkout)
            assert ("does not travel" if ":" in value else "/data/") in str(error.value)
    # Installed code may be in the image: whether it is, the container says.
    assert check_travels(replace(Config(), "model", name="sklearn.base:clone"), checkout).needs == {
        "sklearn": "model.name = 'sklearn.base:clone'"
    }
    assert check_travels(Config(), checkout) == ({}, {})


def test_ones_own_modules_travel_with_what_they_import_and_nothing_else(checkout, in_tmp):
    """From a checkout and from an installed fedmom, whose app has no folder fedmom beside it."""
    from flwr.cli.build import build_fab_from_disk  # here: other tests' processes do without its seconds

    files = {
        "mine.py": "import torch, helper\ndef net(*words): ...\n",
        "helper.py": "def f():\n    from clients.nets import net\n",
        "clients/__init__.py": "",
        "clients/nets.py": "from . import other\nimport mine, json\n",
        "clients/labels.json": "[]",
        "clients/weights.bin": "",
        "secret.py": "",
        "notes/plan.md": "",
    }
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    own = check_travels(load({"model.name": "mine:net", "data.dataset": "/data/x.npz"}).config, checkout).own
    assert {*own} == {"mine.py", "helper.py", "clients/__init__.py", "clients/nets.py", "clients/labels.json"}
    installed = in_tmp / "installed"
    shutil.copytree(checkout, installed, ignore=lambda folder, names: {"fedmom"} & {*names})
    for name in ("README.md", "LICENSE"):
        (checkout / name).touch()
        (installed / name).touch()
    assert stage(checkout, {}, in_tmp / "staged") == checkout
    for app, more in [(checkout, {"mine.py": own["mine.py"]}), (installed, own), (installed, {})]:
        folder = stage(app, more, in_tmp / "staged")
        code = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
        place = "" if app == checkout else "fedmom/_app/"
        assert {f"{place}strategies/__init__.py", f"{place}clients/nets.py", "fedmom/__init__.py"} <= code
        assert ("clients/nets.py" in code) == (app == checkout or more == own)
        assert ("fedmom/cli/main.py" in code) == (app == installed)
        bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder)))
        assert code <= {*bundle.namelist()}
        assert {*more} <= {*bundle.namelist()}


def test_of_two_things_of_one_name_travels_what_python_would_import(in_tmp):
    """And neither records that lie in a folder of code, nor the user's secrets.py for Python's own module."""
    files = {
        "mine.py": "import secrets, records, nets",
        "mine/notes.py": "",
        "mine/notes.json": "",
        "secrets.py": "TOKEN = 1",
        "records/read.py": "",
        "records/patients.json": "{}",
        "nets/__init__.py": "",
        "nets/labels.json": "[]",
        "nets.py": "",
        "elsewhere.json": "{}",
    }
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("nets/linked.json").symlink_to(Path("elsewhere.json").absolute())
    assert {*modules_beside("mine", in_tmp)} == {"mine.py", "records/read.py", "nets/__init__.py", "nets/labels.json"}


def test_an_error_of_a_clients_data_names_the_client_and_no_class(tmp_path, monkeypatch):
    """On the node, which alone knows whose data they are; what Flower makes of it is read back as it was."""
    keys = flat(replace(Config(), "data", dataset="local", num_clients=2))
    context = SimpleNamespace(run_config=keys, node_config={"partition-id": 1, "num-partitions": 2})
    raised = {
        InputError("/data/x.npz: has no y_train"): "client 1: /data/x.npz: has no y_train",
        InputError("client 1 holds 7 examples"): "client 1 holds 7 examples",
        PermissionError(
            13, "Permission denied", "/data/x"
        ): f"client 1: /data/x: may not be read by user {os.getuid()}",
    }
    for error, said in raised.items():
        with pytest.raises(InputError) as told, client_app._of_own_data(context):
            raise error
        assert str(told.value) == said
        reply = SimpleNamespace(error=SimpleNamespace(code=1, reason=f"{type(told.value)}:<'{told.value}'>"))
        assert _reason(reply) == said
    (tmp_path / "x.npz").touch()
    context.node_config["data-dir"] = str(tmp_path)
    asked = SimpleNamespace(content=RecordDict({"config": ConfigRecord({"facts": True})}))
    for unreadable in (tmp_path, tmp_path / "x.npz"):  # the tests' own user may be root, who can read everything
        monkeypatch.setattr(os, "access", lambda path, mode, unreadable=unreadable: Path(path) != unreadable)
        with pytest.raises(InputError, match=f"^client 1: {unreadable}: may not be read by user {os.getuid()}$"):
            client_app.query(asked, context)
    reply.error.reason = "<class 'ZeroDivisionError'>:<'division by zero'>"
    assert _reason(reply) == "ZeroDivisionError: division by zero"


def test_an_error_of_a_clients_data_says_where_they_are(tmp_path):
    said = "node 7: client 1: data.dataset = 'local': /data: has neither an .npz file nor a folder train"
    for address, place in [("", str(tmp_path / "" / "client-1" / "data")), ("fl.example.org", "FEDMOM_DATA")]:
        shutil.rmtree(tmp_path, ignore_errors=True)
        initialise(tmp_path, num_clients=2, address=address)
        following = Following(Commands(open_deployment(tmp_path)), ROOT, "run", tmp_path / "run", print)
        text = following._placed(said)
        assert text.startswith(said)
        assert place in text
        assert f"FEDMOM_USER = {following.commands.deployment.settings['FEDMOM_USER']}" in text
    assert following._placed("client 1, node 7: no reply in time") == "client 1, node 7: no reply in time"


def test_a_registered_key_that_was_refused_is_a_hint_at_a_clock(tmp_path):
    initialise(tmp_path, num_clients=2)
    make_node_key(tmp_path / "stranger")
    line = '1970 1.2.3.4 "POST /v1/fleet/{} HTTP/1.1" {} refused, public key {}\n'
    ours, stranger = as_sent(tmp_path / "client-1" / "node.key.pub"), as_sent(tmp_path / "stranger.pub")
    log = line.format("push-object", 413, ours) + line.format("activate-node", 401, stranger)
    commands = Commands(open_deployment(tmp_path))
    for text, clients in [(log, []), (log + line.format("activate-node", 401, ours), ["client 1"])]:
        commands.do = lambda command, changes, text=text: text
        assert [hint.partition(":")[0] for hint in refused(commands)] == clients


def test_the_time_left_is_that_of_the_rounds_whenever_they_are_read():
    """A follower reads the first ones at once, long after the run began, or goes on in the middle."""
    for first in (1, 4):
        left = Left(10)
        for number in range(first, 11):
            assert left.seconds({"round": number, "wall_seconds": 7.0 * number}) == pytest.approx(7.0 * (10 - number))
