"""What it costs to look at every client: x̂ on 1,000 clients' own test examples, and models after personal steps.

x̂ is held to one forward pass over the same examples, in pieces of 500 or of 2,000, whichever is faster; personal models
of k steps to k + 1 local steps of all clients on the same path. The largest resident set is told, too.

    python benchmarks/own_results.py [--clients 1000] [--model cnn] [--steps 5] [--seconds 5]
"""

import argparse
import resource
import statistics
import sys
import time
from functools import partial

import numpy as np
import torch

from fedmom.config.build import make_plan, make_problem, resolve_device, set_up_torch
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.engine.engine import Engine
from fedmom.method.state import stacked
from fedmom.rounds.clients import look, steps_job
from fedmom.rounds.plan import beginning


def timed(function, seconds: float) -> float:
    """Median seconds of a call."""
    function()
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 3:
        begin = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def examples(n: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, n)
    x = rng.integers(0, 255, (n, *shape), dtype=np.uint8)
    return {"x_train": x, "y_train": y, "x_test": x[:100], "y_test": y[:100]}


def many():
    """Fifty examples a client, of the shape of Fashion-MNIST."""
    data = examples(50 * N, (1, 28, 28))
    return tuple(data[name] for name in ("x_train", "y_train", "x_test", "y_test"))


def measure(args: argparse.Namespace) -> None:
    keys = {
        "data.dataset": f"{__file__.rpartition('/')[2].removesuffix('.py')}:many",
        "data.num-clients": args.clients,
        "data.partition": "iid",
        "data.client-test-share": 0.2,
        "data.batch-size": 8,
        "model.name": args.model,
        "run.client-eval-every": 1,
        "run.personal-steps": args.steps,
        "engine.path": args.path,
    }
    config = resolve_device(resolve(load(keys)).config)
    set_up_torch(config.engine)
    problem, plan = make_problem(config, config.engine.device), make_plan(config)
    state, tests, judge = problem.start(), problem.own, problem.evaluation
    rows = torch.from_numpy(tests.partition.indices).to(problem.device)

    @torch.no_grad()
    def forward(size: int) -> None:
        for piece in rows.split(size):
            judge._outputs(state, judge.normalised(tests.x.index_select(0, piece)))

    once = min(timed(partial(forward, size), args.seconds) for size in (500, 2000))
    own = timed(lambda: problem.evaluate_own(state), args.seconds)
    print(
        f"{args.model}, {args.clients} clients, {len(rows)} test examples of their own, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"x̂: {own:.3f} s, one forward pass {once:.3f} s: {own / once:.3f} times")
    engine, done = Engine(problem, plan.method, path=args.path, chunk_size=args.chunk), beginning(problem, plan)
    done = done._replace(round=1)
    ids = np.arange(args.clients)
    some = steps_job(problem, plan, 1, ids, None, None, None, lr=0.01)
    more = some._replace(num_steps=some.num_steps + 1, lrs=[*some.lrs, 0.01])

    def steps() -> None:
        for places in torch.from_numpy(ids).split(args.chunk):
            part = more._replace(
                **{name: getattr(more, name)[places] for name in ("clients", "weights", "first_steps", "num_steps")}
            )
            engine.run_rows(stacked(state, len(places)), part)

    of_steps = timed(steps, args.seconds)
    whole = timed(lambda: look(problem, plan, engine, done, 0.01), args.seconds)
    print(
        f"{args.steps} personal steps, {args.path} × {args.chunk}: {whole - own:.3f} s beside x̂, "
        f"{args.steps + 1} local steps {of_steps:.3f} s: {(whole - own) / of_steps:.3f} times"
    )
    print(f"largest resident set: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--path", default="stack")
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    N = args.clients
    sys.modules.setdefault("own_results", sys.modules["__main__"])
    measure(args)
