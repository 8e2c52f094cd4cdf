"""What runs on a GPU, tried on one that is not there: nothing mixes devices, and nothing reads what others may write.

The pretended card (pretend_cuda.py) takes the same kernels as the CPU, so all numbers are the CPU's to the last bit but
for the order of sums.
"""

from types import SimpleNamespace

import pytest
import torch

from fedmom.backends.workers import make_workers
from fedmom.config.build import pool_options, resolve_device
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data import batches
from fedmom.data.batches import normalised
from fedmom.engine import rates
from fedmom.engine.auto import Said, choose
from fedmom.engine.engine import Engine
from fedmom.engine.gossip import GossipRounds
from fedmom.engine.stacked.convolutions import CONVOLUTIONS
from fedmom.errors import InputError
from fedmom.method.decentralized.topology import make_topology
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning, round_job
from laws import table
from pretend_cuda import CPU, CUDA, clock, pretend
from runs import image_problem, simple_plan, tiny_images
from test_cuda_graphs import assert_same, on_cpu


def rounds(plan, device, path, model="cnn"):
    problem = image_problem(model, 3, device=device, augment="crop-flip")
    engine = Engine(problem, plan.method, path=path, chunk_size=2, convolution="loop")
    if plan.topology is not None:
        engine = GossipRounds(engine, plan.topology, "cpu")  # rows that visit the device by chunks
    steps = list(run_rounds(problem, plan, engine, beginning(problem, plan)))
    problem.evaluate_clients(steps[-1][0].state, torch.arange(3, device=problem.device))
    return steps[-1][0], [record for _, record in steps]


WAYS = {
    "loop": ("loop", {}),
    "vmap": ("vmap", {"slow": (0.5, 1.0)}),
    "stack, unequal steps": ("stack", {"local_epochs": 1, "num_rounds": 1}),
    "stack, local momentum": ("stack", {"momentum_policy": "local", "cohort_size": 2}),
    "factors": ("factors", {"client_weights": "samples"}),
    "gossip": ("stack", {"topology": make_topology("ring", 3)}),
}


@pytest.mark.slow
@table("way", WAYS)
def test_a_card_gives_the_cpus_numbers_and_nothing_is_mixed(way):
    path, options = WAYS[way]
    plan = simple_plan(3, **{"num_rounds": 2, "num_local_steps": 2, **options})
    with pretend() as card:
        done, records = rounds(plan, "cuda", path)
        assert next(iter(done.state.params.values())).device == CUDA
        done = on_cpu(done)
    assert card.troubles() == {}
    assert card.launches.total() > 200
    assert_same((done, records), rounds(plan, "cpu", path), 1e-12)


def test_nothing_of_a_pretended_card_is_kept_for_a_real_one():
    """Nor of a real one for a pretended one, which would say the same name of its device."""
    images = tiny_images().x_train
    for device in ("cpu", "cuda"):
        normalised(images, (0.4,), (0.3,), torch.float32)
        with pretend():
            there = images.to(device)
            assert batches._constants.cache_info().currsize == 0
            normalised(there, (0.4,), (0.3,), torch.float32)
            assert batches._constants.cache_info().currsize == 1
        assert batches._constants.cache_info().currsize == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", ["loop", "stack", "factors"])
@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet20"])
def test_whole_rounds_of_every_model_mix_nothing(model, path):
    """The fifth is replayed, where there are replays."""
    plan = simple_plan(3, num_rounds=5, num_local_steps=2)
    with pretend() as card:
        done, records = rounds(plan, "cuda", path, model)
        done = on_cpu(done)
    assert card.troubles() == {}
    assert (card.replays > 0) == (path != "loop")
    tolerance = 1e-8 if model == "resnet20" else 1e-11  # BatchNorm amplifies the rounding of other orders of summation
    assert_same((done, records), rounds(plan, "cpu", path, model), tolerance)


@pytest.mark.slow
def test_what_is_compiled_once_does_not_decide(monkeypatch):
    """The first use of every shape costs a second; what counts is how often the host launches, and replays do not."""
    rates = {}
    for policy in ("average", "local"):
        plan = simple_plan(4, num_local_steps=2, momentum_policy=policy)
        with pretend() as card:
            problem = image_problem("mlp", 4, device="cuda")
            done = beginning(problem, plan)
            monkeypatch.setattr("fedmom.engine.stacked.timings.time", clock(card))
            card.first_seconds = 1.0
            job = round_job(problem, plan, done)
            chosen = choose(problem, plan.method, done.state, job, path="auto", chunk_size=0)
        assert (chosen.path in ("stack", "factors"), chosen.chunk_size) == (True, 4)
        rates[policy] = chosen.measured
        # Four clients cost no more launches than one.
        assert chosen.measured["stack × 4"] == pytest.approx(4 * chosen.measured["stack × 1"], rel=0.3)
        assert min(chosen.measured.values()) > 100  # a first use counted would leave less than 20
    assert rates["average"]["stack × 4"] > 1.2 * rates["local"]["stack × 4"]  # replayed, as the run will be


def test_what_the_host_does_beside_it_does_not_decide(monkeypatch):
    """A short round is timed several times on a card, the fastest counts; a long one once, as on a CPU."""
    problem, job = SimpleNamespace(device=CUDA), SimpleNamespace(lrs=[0.1] * 2)
    monkeypatch.setattr(rates, "_engine", lambda *_: SimpleNamespace(replays=None))
    for device, warm, times, best in ((CUDA, 1, [9, 3, 4, 1], 3), (CUDA, 1, [600, 3], 600), (CPU, 1, [9, 3], 9)):
        clocked = iter([*[1000] * warm, *times])
        problem.device = device
        monkeypatch.setattr(rates, "_seconds_of", lambda *_, clocked=clocked: next(clocked) / 1000)
        assert rates.rate(problem, None, None, job, "stack", 3) == pytest.approx(3 * 2 / (best / 1000))


@table(
    "cards, actors, named, share",
    [(1, 1, 0, 1), (1, 2, 0, 0.5), (1, 3, 0, 0.3333), (2, 3, 0, 0.5), (4, 2, 0, 1), (1, 0, 0, 1), (1, 2, 0.25, 0.25)],
)
def test_ray_actors_get_a_share_of_the_gpus(monkeypatch, cards, actors, named, share):
    """Ray hides all GPUs from an actor that asks for none; a run that says cuda must not train on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # beside the pretended cards, where there is one too
    for key in ("engine.workers", "simulation.num-actors"):
        given = {key: actors, "simulation.num-gpus": named}
        with pretend(count=cards):
            for device in ("auto", "cuda"):
                assert pool_options(load({**given, "engine.device": device}).config).num_gpus == share
            assert pool_options(load({**given, "engine.device": "cpu"}).config).num_gpus == named
        assert pool_options(load(given).config).num_gpus == named
    with pytest.raises(InputError, match=r"engine\.device = 'cuda'"):
        pool_options(load({"engine.device": "cuda"}).config)


def test_workers_run_where_the_configuration_says(monkeypatch):
    pools = []

    class OfOne:
        """A pool whose actor says how it would run."""

        num_workers = 2

        def __init__(self, make_worker, options):
            pools.append((make_worker.args[0], options))
            self.options = options

        def submit(self, key, block):
            pass

        def take(self):
            return "choose", ("stack", 4, Said())

    monkeypatch.setattr("fedmom.backends.workers.Pool", OfOne)
    with pretend():
        config = resolve_device(resolve(load({"engine.workers": 2})).config)
        workers = make_workers(config, image_problem("mlp"), simple_plan(4))
    ((inside, options),) = pools
    assert (workers.settled["engine.device"], inside.engine.device) == ("cuda", "cuda")
    assert (workers.settled["simulation.num-gpus"], options.num_gpus) == (0.5, 0.5)
    assert "on cuda" in workers.notes[0]


@pytest.mark.slow
def test_a_way_to_convolve_that_cannot_run_here_does_not_rule_out_the_others(monkeypatch):
    """Such as Triton's kernels where there is no compiler for them."""

    def cannot(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setitem(CONVOLUTIONS, "implicit", cannot)
    for way in ("grouped", "unfold"):
        monkeypatch.delitem(CONVOLUTIONS, way)
    plan = simple_plan(2, num_local_steps=2, batch_size=2)
    with pretend():
        problem = image_problem("cnn", 2, device="cuda", batch_size=2)
        done = beginning(problem, plan)
        chosen = choose(problem, plan.method, done.state, round_job(problem, plan, done), path="stack", chunk_size=2)
    assert (chosen.path, chosen.chunk_size, chosen.trouble) == ("stack", 2, "")
