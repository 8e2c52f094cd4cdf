"""What the link of a client's machine carries is what the run says that it sends, and one of each is the engine's."""

import pytest
import torch

import fedmom
from containers import CHANGES, CONFIG, assert_engines
from fedmom.records.files import CLIENTS, read_tensors
from traffic import count, idle, payload

pytestmark = [pytest.mark.container, pytest.mark.timeout(1500), pytest.mark.xdist_group("containers")]

NUMBERS = 266_890  # in x. In int8 they are a quarter of a megabyte, and what else travels in a round is a tenth of that
LARGE = {**CHANGES, "model.hidden": 480, "run.num-rounds": 3, "algorithm.num-local-steps": 2}
# What is the clients' own is asked for once, at the end.
LARGE |= {"run.checkpoint-every": 100}
FLOAT32 = {**LARGE, "run.dtype": "float32"}


@pytest.fixture(scope="module")
def around(deployment, tmp_path_factory):
    """(what a run of so many rounds sends that is no array, the link's rate without a run).

    The run is one of its own kind, SCAFFOLD's, and the engine's.
    """
    rate = idle(deployment)
    changes = {**CHANGES, "run.num-rounds": LARGE["run.num-rounds"], "algorithm.name": "scaffold", "model.hidden": 4}
    out = tmp_path_factory.mktemp("around") / "scaffold"
    counted = count(deployment, out, changes)
    assert_engines(out, changes)
    return counted, rate


def assert_carried(deployment, around, out, changes, *, down=None, kept=0):
    """Both ways the link carries what the run says, within a tenth.

    down: bytes that one client is sent, where the run counts none; kept: bytes of its own, for the checkpoint.
    """
    run = count(deployment, out, changes)
    seen = payload(run, *around)
    print(f"{out.name}: said {run.said}, kept {run.kept:.0f}, carried {seen}, {run.seconds:.0f} s")
    assert run.kept == kept
    assert seen.up == pytest.approx(run.said.up + kept, rel=0.1)
    assert seen.down == pytest.approx(run.said.down if down is None else down, rel=0.1)


def test_the_link_carries_x_and_u_as_they_are(deployment, around, tmp_path):
    assert_carried(deployment, around, tmp_path / "plain", FLOAT32, down=3 * 2 * 4 * NUMBERS)


def test_in_a_round_without_u_the_link_carries_x_alone(deployment, around, tmp_path):
    """Down u goes as it begins, and as it is averaged after round 2."""
    changes = {**FLOAT32, "algorithm.states": "u: average every 2"}
    words = {"down": (3 + 2) * 4 * NUMBERS, "kept": 4 * NUMBERS}
    assert_carried(deployment, around, tmp_path / "every-2", changes, **words)


def test_what_a_client_keeps_is_not_on_the_link(deployment, around, tmp_path):
    changes = {**FLOAT32, "algorithm.momentum-policy": "local", "server.own-rows": "nodes"}
    assert_carried(deployment, around, tmp_path / "local", changes, down=3 * 4 * NUMBERS, kept=4 * NUMBERS)


def test_what_is_encoded_is_what_the_link_carries_and_ends_with_the_engines_model_and_errors(
    deployment, around, tmp_path
):
    """Down the first message is whole."""
    codecs = {"algorithm.codecs": "x: int8; u: topk", "algorithm.codecs-down": "x: bfloat16; u: bfloat16"}
    changes, out, here = {**LARGE, **codecs}, tmp_path / "coded", tmp_path / "engine"
    down = 2 * (8 + 2 + 2) * NUMBERS
    assert_carried(deployment, around, out, changes, down=down, kept=2 * 8 * NUMBERS)
    assert_engines(out, changes)
    fedmom.run(CONFIG, sets=changes, out=here, callbacks=[fedmom.Callback()])
    (found, _), (right, _) = (read_tensors(folder / CLIENTS) for folder in (out, here))
    assert any(name.startswith("momentum/e/") for name in right)
    assert found.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)
