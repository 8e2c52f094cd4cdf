"""A zoo of models: each trains on every path as plain torch does, or is refused before anything is trained."""

import sys
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import fedmom
import plain
from fedmom.config.examples import load_data
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data.batches import Sampler
from fedmom.errors import InputError
from zoo import PATHS, ZOO, build
from zoo.page import PAGE, page

ROUNDS, STEPS, BATCH, SEED = 3, 3, 4, 3
LR, BETA, DECAY = 0.03, 0.8, 0.01
STACKED = PATHS[1:]
# One of each kind; the others are slow tests only because there are so many.
FAST = ("conv2d", "batch_norm", "lstm", "pruned", "dropout", "batch_mean")
EVERY = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ZOO]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, about what the zoo keeps in old style


def config(name: str, path: str, **changes: object) -> dict[str, object]:
    """Three clients of 10, 3 and 17 examples, the second of one class and with less than a batch; chunks of 2 and 1."""
    return {
        "data.dataset": f"zoo.data:{ZOO[name].data}",
        "data.num-clients": 3,
        "data.partition": "dirichlet-class",
        "data.alpha": 0.5,
        "data.min-size": 3,
        "data.batch-size": BATCH,
        "model.name": ZOO[name].spec,
        "algorithm.num-local-steps": STEPS,
        "algorithm.lr": LR,
        "algorithm.beta": BETA,
        "algorithm.nesterov": True,
        "algorithm.weight-decay": DECAY,
        "algorithm.client-weights": "samples",
        "run.num-rounds": ROUNDS,
        "run.seed": SEED,
        "run.dtype": "float64",
        "engine.path": path,
        "engine.chunk-size": {"loop": 1, "auto": 0}.get(path, 2),
        **changes,
    }


@lru_cache
def by_plain_torch(name: str, decay: float = DECAY) -> plain.Plain:
    """What the model must come to."""
    data, partition = load_data(resolve(load(config(name, "loop"))).config)[:2]
    numbers = {"num_rounds": ROUNDS, "num_local_steps": STEPS, "lr": LR, "beta": BETA, "weight_decay": decay}
    sampler = Sampler(partition, BATCH, seed=SEED)
    return plain.train(lambda: build(name), data, sampler, **numbers, nesterov=True, seed=SEED)


class Seen(fedmom.Callback):
    """What a run said and came to."""

    def __init__(self) -> None:
        self.notes: tuple[str, ...] = ()
        self.details: tuple[str, ...] = ()
        self.rounds = 0
        self.state: dict[str, Tensor] = {}

    def on_start(self, start) -> None:
        self.notes, self.details = start.notes, start.details

    def on_round(self, record, state) -> None:
        self.rounds += 1
        parts = state._asdict().items()
        self.state = {f"{part}/{name}": value.clone() for part, tree in parts for name, value in tree.items()}


def assert_right(seen: Seen, result: fedmom.Result, right: plain.Plain, digits: float) -> None:
    """x, u and the buffers are those of plain torch, in units of how far all of them went; so are the losses."""
    assert result.status == "done", result.message
    assert seen.state.keys() == right.end.keys()
    away, step = [], []
    for key, value in right.end.items():
        got, before = seen.state[key], right.start[key]
        assert got.shape == value.shape, key
        if not value.is_floating_point() or torch.equal(value, before):
            torch.testing.assert_close(got.to(value.dtype), value, rtol=digits, atol=digits, msg=key)
            continue
        away.append(torch.linalg.vector_norm(got - value).item())
        step.append(torch.linalg.vector_norm(value - before).item())
    off, whole = torch.tensor(away).norm().item(), torch.tensor(step).norm().item()
    assert off <= digits * whole, f"off by {off / whole:.2g} of the step"
    for key, values in (("train_loss", right.train_losses), ("test_loss", right.test_losses)):
        assert [record[key] for record in result.rounds] == pytest.approx(values, abs=10 * digits), key
    if digits < 1e-6:
        assert [record["test_accuracy"] for record in result.rounds] == right.test_accuracies


# What torch 2.11 says instead.
OLDER = {"saved tensor hooks": "vmap over _NoopSaveInputs"}


def assert_refused(name: str, path: str, words: str, **changes: object) -> None:
    """In one line with these words, and nothing was trained."""
    seen = Seen()
    with pytest.raises(InputError) as caught:
        fedmom.run(config(name, path, **changes), callbacks=[seen])
    assert seen.rounds == 0
    message = str(caught.value)
    assert "\n" not in message
    assert words in message or OLDER.get(words, words) in message


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    """Dynamo compiles a function eight times and then no more, whichever test asked."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.mark.parametrize("name", EVERY)
def test_every_path_is_plain_torch_or_refuses(name):
    made = ZOO[name]
    for path in PATHS:
        if path in made.refused:
            assert_refused(name, path, made.refused[path])
        else:
            seen = Seen()
            assert_right(seen, fedmom.run(config(name, path), callbacks=[seen]), by_plain_torch(name), made.digits)


# Each path alone is tried above. Here: a model of every path, one of vmap and loop, one of loop alone, one of none.
AUTO = ("conv2d", "pruned", "parameter_hook", "two_outputs")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in AUTO else pytest.mark.slow) for name in ZOO])
def test_auto_finds_a_stacked_path_where_one_is_right(name):
    made = ZOO[name]
    if "loop" in made.refused:
        assert_refused(name, "auto", made.refused["loop"])
        return
    seen = Seen()
    assert_right(seen, fedmom.run(config(name, "auto"), callbacks=[seen]), by_plain_torch(name), made.digits)
    measured = " ".join(seen.details)
    assert any(f"{path} ×" in measured for path in STACKED) == bool(set(STACKED) - set(made.refused)), seen.notes


FLOAT32 = [
    pytest.param(n, marks=() if n == "batch_norm" else pytest.mark.slow)
    for n, m in ZOO.items()
    if "stack" not in m.refused and m.digits < 1e-6
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOAT32)
def test_float32_refuses_nothing_that_float64_trains(name):
    """Rounding is no disagreement, not even where a gradient is nothing else (a bias before BatchNorm)."""
    seen = Seen()
    result = fedmom.run(
        config(name, "stack", **{"run.dtype": "float32", "algorithm.weight-decay": 0}), callbacks=[seen]
    )
    assert_right(seen, result, by_plain_torch(name, 0.0), 1e-2)


WORKERS, SIMULATION = {"engine.workers": 2}, {"run.backend": "simulation"}
ELSEWHERE = {  # a dozen: the path that is asked for, each of them on both kinds of actors
    "conv2d": ("factors", WORKERS),
    "dropout": ("factors", SIMULATION),
    "batch_norm": ("stack", WORKERS),
    "two_names": ("stack", SIMULATION),
    "transformer": ("vmap", WORKERS),
    "lstm": ("vmap", SIMULATION),
    "assigned_average": ("vmap", SIMULATION),
    "frozen": ("auto", WORKERS),
    "gpt": ("auto", SIMULATION),
    "pruned": ("auto", WORKERS),
    "counter_buffer": ("loop", WORKERS),
    "checkpoint_dropout": ("loop", SIMULATION),
}


@pytest.mark.slow
@pytest.mark.xdist_group("Ray: messages")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_on_ray_too_it_is_plain_torch(one_ray, name):
    path, changes = ELSEWHERE[name]
    keys = {"simulation.num-actors": 2, "simulation.num-cpus": 0.5, "simulation.clients-per-node": 2}
    seen = Seen()
    result = fedmom.run(config(name, path, **keys, **changes), callbacks=[seen])
    assert_right(seen, result, by_plain_torch(name), ZOO[name].digits)


@pytest.mark.slow
@pytest.mark.xdist_group("Ray: messages")
@pytest.mark.parametrize(("name", "changes"), [("depth_numpy", WORKERS), ("two_outputs", SIMULATION)])
def test_on_ray_too_what_has_no_meaning_is_refused(one_ray, name, changes):
    keys = {"simulation.num-actors": 2, "simulation.num-cpus": 0.5}
    assert_refused(name, "auto", ZOO[name].refused["loop"], **keys, **changes)


def test_the_page_of_models_is_the_zoos():
    assert PAGE.read_text(encoding="utf-8") == page(), "cd tests; python -m zoo.page"
