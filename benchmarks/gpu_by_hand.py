"""What the engine is compared with on a GPU: one resident model in plain PyTorch, as one would write it by hand."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_ways import FORMS, Load, Row, now, problem_of, why
from torch.nn.functional import cross_entropy

from fedmom.data.datasets import Dataset
from fedmom.machine.precision import allow_tf32
from fedmom.rounds.plan import beginning, round_job

PLAIN = "resident model, plain PyTorch"


def by_hand(load: Load, data: Dataset, form: str, device: str, seconds: float) -> Iterator[Row]:
    """Client-steps/s on the engine's own minibatches: plain, channels-last, and a step recorded as a CUDA graph.

    Each client would begin from the round's x and u: the copies that this takes, and the average, are left out.
    """
    convolves = load.model not in ("logistic", "mlp")
    forms = [(PLAIN, False, False), (f"{PLAIN}, channels-last", True, False)][: 2 if convolves else 1]
    forms += [(f"{PLAIN}, a step as a CUDA graph", convolves, True)] * (device == "cuda")
    for name, last, graph in forms:
        row: Row = {"model": load.name, "way": name, "form": form}
        allow_tf32(FORMS[form][1])
        try:
            steps = steps_of(load, data, form, device, last, graph)
            steps()  # not timed: kernels are loaded and chosen in it
            count, begin = 0, now(torch.device(device))
            while now(torch.device(device)) - begin < seconds:
                count += steps()
            row["rate"] = count / (now(torch.device(device)) - begin)
        except Exception as failure:
            row["failed"] = why(failure)
        finally:
            allow_tf32(False)
        yield row


def steps_of(load: Load, data: Dataset, form: str, device: str, last: bool, graph: bool) -> Callable[[], int]:
    """A function that takes one client's local steps and says how many."""
    problem = problem_of(load, data, device, form)
    job = round_job(problem, load.plan, beginning(problem, load.plan))
    layout = torch.channels_last if last else torch.contiguous_format
    model = problem.model.to(memory_format=layout)
    model.train()
    batches = list(problem.round_batches(job.clients[:1], job.first_steps[:1], len(job.lrs)))
    images = [(b.x[0].contiguous(memory_format=layout) if last else b.x[0], b.y[0]) for b in batches]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=load.momentum, fused=True)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    taken = recorded_step(step, *images[0]) if graph else step

    def steps() -> int:
        for x, y in images:
            taken(x, y)
        return len(images)

    return steps


def recorded_step(step: Callable[[Any, Any], None], x: torch.Tensor, y: torch.Tensor) -> Callable[[Any, Any], None]:
    """The same step as a CUDA graph, into which each minibatch is copied."""
    x_there, y_there = x.clone(), y.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x_there, y_there)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x_there, y_there)

    def replayed(x: torch.Tensor, y: torch.Tensor) -> None:
        x_there.copy_(x)
        y_there.copy_(y)
        graph.replay()

    return replayed
