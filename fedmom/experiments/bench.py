"""`fedmom bench`: how fast a configuration runs here, how near to what the device can do, and where the time goes."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedmom.backends.local import make_backend
from fedmom.config.build import make_plan, make_problem, resolve_device
from fedmom.config.keys import Config
from fedmom.config.load import replace, with_choices
from fedmom.engine.engine import Engine
from fedmom.engine.gossip import GossipRounds
from fedmom.engine.stacked.timings import now
from fedmom.machine.memory import most_bytes
from fedmom.method.state import ClientState, num_bytes, parameter_of
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, beginning, round_job
from fedmom.rounds.round import Backend
from fedmom.tasks.problem import Problem
from fedmom.tasks.supervised import Supervised, one_of_batch

KINDS = {  # of torch's operators, by a part of the name; the first that fits
    "convolution": ("conv",),
    "matrix products": ("mm", "matmul", "linear", "einsum", "dot"),
    "update of x and u": ("sgd", "_fused_ad", "foreach", "lerp", "sign"),
    "pooling, norms": ("pool", "norm"),
    "loss": ("softmax", "nll", "cross_entropy"),
    "gathering minibatches": ("index", "gather", "sort", "embedding", "repeat_interleave", "cumsum"),
    "copies": ("copy", "cat", "stack", "fill", "zero", "clone", "contiguous"),
}


_ENOUGH = 50  # rounds of a cycle


class Bench(NamedTuple):
    """What was measured; rates in client-steps, bytes and operations per second."""

    config: Config  # with what `auto` chose
    notes: list[str]
    rate: float
    seconds: list[float]  # of every round
    flops: float  # of one client-step, forward and backward; 0 if they cannot be counted
    bytes: float  # that one client-step moves at least
    peak_flops: float
    peak_bytes: float
    memory: float  # bytes, the most that was in use
    shares: dict[str, float]  # {kind of operator: part of a round's time}
    details: Sequence[str] = ()  # how fast every way was that could have been taken


def bench(
    config: Config,
    *,
    seconds: float = 10.0,
    progress: Callable[[str], None] = lambda text: None,
    remember: bool = False,
) -> Bench:
    """Run a resolved configuration for about so long, without evaluation, and throw it away.

    remember: whether engine.remember decides what `auto` may take from before; else it measures, and keeps nothing.
    Raises InputError and DivergedError as a run would.
    """
    config = resolve_device(config)
    config = replace(config, "engine", remember=remember and config.engine.remember)
    device = torch.device(config.engine.device)
    progress("data and model")
    problem = make_problem(config, config.engine.device)
    plan = make_plan(config, problem)
    progress("timing the ways to run it")
    backend = make_backend(config, problem, plan)
    try:
        steps = _endless(problem, plan, backend)
        progress("rounds")
        next(steps)
        found: list[float] = []
        rates: list[float] = []
        while sum(found) < seconds and len(found) < 1000:
            begin = time.perf_counter()
            rates.append(next(steps))  # it ends with a wait, and the device may have begun the next one by then
            found.append(time.perf_counter() - begin)
        progress("where the time goes")
        shares = _shares(lambda: next(steps), device)
    finally:
        backend.close()
    progress("what the device can do")
    start = beginning(problem, plan)
    return Bench(
        with_choices(config, backend.settled),
        list(backend.notes),
        statistics.median(count / s for count, s in zip(rates, found, strict=True)),
        found,
        _flops(problem, start.state),
        _bytes(problem, backend, start.state, round_job(problem, plan, start)),
        *peaks(device, getattr(torch, config.run.dtype)),
        float(most_bytes(device)),
        shares,
        backend.details,
    )


def _endless(problem: Problem, plan: Plan, rounds: Backend) -> Iterator[float]:
    """Runs a round after the other, again from the beginning after the last, and gives each one's client-steps."""
    # A run evaluates its last round: here one more would follow, so none is the last. That one may have been begun when
    # it is left, so there are enough of them for it not to count.
    plan = plan._replace(num_rounds=max(plan.num_rounds, _ENOUGH))
    longer = plan._replace(num_rounds=plan.num_rounds + 1, eval_every=plan.num_rounds + 2, client_eval_every=0)
    while True:
        before = 0.0
        for new, record in run_rounds(problem, longer, rounds, beginning(problem, longer)):
            yield record["num_clients"] * (record["steps"] - before)
            before = record["steps"]
            if new.round == plan.num_rounds:
                break


def peaks(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """(operations per second of a large matrix product, bytes per second of a large copy), the best of several."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros((1 << 30 if device.type == "cuda" else 1 << 28) // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    product = min(_timed(device, lambda: torch.mm(a, b)) for _ in range(6))
    copy = min(_timed(device, lambda: target.copy_(source)) for _ in range(6))
    return 2 * size**3 / product, 2 * num_bytes({"": source}) / copy


def _timed(device: torch.device, run: Callable[[], Any]) -> float:
    begin = now(device)
    run()
    return now(device) - begin


def _flops(problem: Problem, start: ClientState) -> float:
    """Of one client-step's forward and backward pass, as torch counts matrix products and convolutions."""
    if not isinstance(problem, Supervised):
        return 0.0
    first = torch.zeros(1, dtype=torch.int64, device=problem.device)
    batch = one_of_batch(next(iter(problem.round_batches(first, first, 1))), 0)
    params = {name: x.detach().requires_grad_() for name, x in start.params.items()}
    with FlopCounterMode(display=False) as counter:
        problem.loss(params, start.buffers, batch)[0].backward()
    return float(counter.get_total_flops())


def _bytes(problem: Problem, rounds: Backend, start: ClientState, job: Any) -> float:
    """Six passes over a client's weights, two over every state of its optimizer, five over what backward keeps.

    Two passes use the weights, g is written and read, x and the states (SGD's u) are read and written. Weights in
    factors are read and written by nobody, their layers' inputs and outputs twice more.
    """
    engine = rounds.engine if isinstance(rounds, GossipRounds) else rounds
    weights, extra = dict(start.params), 0.0
    stack = engine.stack if isinstance(engine, Engine) and job.rows is None else None
    if stack is not None and stack.factors is not False:
        for name in stack.in_factors(start, job):
            size_in, size_out, rows = (stack.sizes or {})[name]
            extra += 2 * rows * (size_in + size_out) * weights.pop(name).dtype.itemsize
    # What is kept for backward includes the weights themselves.
    kept = max(0, problem.activation_bytes(start) - num_bytes(start.params))
    states = {name: t for name, t in start.momentum.items() if parameter_of(name) in weights}
    return 6 * num_bytes(weights) + 2 * num_bytes(states) + 5 * kept + extra


def _shares(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """{kind of operator: part of the time of a round}; what is not torch's own is "Python and waiting"."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells standard error when it starts and stops
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        total = 1e6 * _timed(device, run)
    spent: dict[str, float] = {}
    for event in profiled.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = event.key.lower()
        known = name.startswith("aten::") or cuda
        kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "other operators")
        spent[kind if known else "rest"] = spent.get(kind if known else "rest", 0.0) + own
    total = max(total, sum(spent.values()))
    shares = {kind: t / total for kind, t in sorted(spent.items(), key=lambda pair: -pair[1]) if kind != "rest"}
    return {**shares, "Python and waiting": max(0.0, 1 - sum(shares.values()))}


def as_rows(found: Bench) -> list[list[str]]:
    """The table that the command prints."""
    chosen = found.config.engine
    rows = [
        ["client-steps/s", f"{found.rate:,.0f}"],
        ["path", f"{chosen.path} × {chosen.chunk_size}, {chosen.threads} threads on {chosen.device}"],
        ["rounds timed", f"{len(found.seconds)}, {min(found.seconds):.4g} to {max(found.seconds):.4g} s"],
    ]
    for name, each, peak, unit in (
        ("operations", found.flops, found.peak_flops, "FLOP"),
        ("memory traffic", found.bytes, found.peak_bytes, "B"),
    ):
        if each:
            share = 100 * found.rate * each / peak
            rows.append([f"{name} per client-step", f"{_si(each)}{unit}"])
            rows.append(
                [f"{name}/s", f"{_si(found.rate * each)}{unit}/s, {share:.0f} % of {_si(peak)}{unit}/s measured"]
            )
    rows.append(["most memory in use, this process", f"{_si(found.memory)}B"])
    rows += [[f"time in {kind}", f"{100 * share:.0f} %"] for kind, share in found.shares.items() if share >= 0.01]
    return rows


def _si(value: float) -> str:
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "
