"""Algorithm 2 on Ray without a server: blocks of clients live in actors and send rows straight to one another.

The driver keeps time and metrics: what passes through it per round are losses and references, as many bytes for a
large model as for a small one. Rows go from actor to actor through Ray's object store; block means go to the first
actor, which measures disagreement and evaluates the mean model. Checkpoints alone bring the rows to the driver.
"""

import math
import os
import socket
import sys
import time
from typing import Any

import numpy as np
import torch

from fedmom.actors.cluster import join_ray
from fedmom.actors.nodes import difference, missing_on, on
from fedmom.actors.watch import Watch, leave_ray
from fedmom.actors.work import WARM_UP_SECONDS
from fedmom.backends.agreement import held
from fedmom.backends.peer import Peer
from fedmom.config.build import actors_device, pool_options, resolve_device
from fedmom.config.keys import Config
from fedmom.config.load import replace
from fedmom.config.numbers import counted
from fedmom.engine.auto import Said
from fedmom.engine.gossip import mean_of
from fedmom.errors import ClientsFailedError, InputError
from fedmom.method.state import ClientState, as_tensor, flatten, rows_of, to_arrays, to_device, unflatten
from fedmom.rounds.evaluation import summarised
from fedmom.rounds.plan import Plan
from fedmom.rounds.round import Backend, Fetched, Job, Outcome, Progress
from fedmom.tasks.problem import Problem
from fedmom.user_code import one_line

LINK_SECONDS = 60.0  # how long rows may take from actor to actor; simulation.straggler-seconds, if that is given


class Peers(Backend):
    """Rounds of Algorithm 2 by actors that exchange rows among themselves."""

    def __init__(self, config: Config, problem: Problem, plan: Plan) -> None:
        assert plan.topology is not None
        self.problem, self.plan, self.policy = problem, plan, config.simulation.on_link_failure
        if self.policy == "skip" and not plan.topology.is_symmetric:
            raise InputError(
                f"simulation.on-link-failure = 'skip': topology {plan.topology.name!r} is directed, and leaving out a "
                "link would make W neither mean- nor consensus-preserving; use stop"
            )
        num_clients = len(problem.sizes)
        wanted = min(config.engine.workers, num_clients)
        options = pool_options(replace(config, "engine", workers=wanted))
        joined = join_ray(options)
        self._ray, self._started = joined.ray, joined.started
        self._here = self._ray.get_runtime_context().get_node_id()
        self.options = options = joined.options
        # Neighbouring blocks on one node, where rows go from one to the other through its store.
        self._nodes = joined.placement.spread(wanted) if joined.is_cluster else []
        self._gone = ""  # what of Ray has ended
        self._watch = Watch(self._ray, lambda what: setattr(self, "_gone", what))
        try:
            self.blocks = np.array_split(np.arange(num_clients), wanted)
            self.limit = config.simulation.straggler_seconds
            self.seconds = self.limit or LINK_SECONDS
            inside = replace(config, "engine", device=actors_device(options), threads=0, workers=0)
            self.hosts = [""] * wanted  # of each actor, once it is up
            self.peers = self._actors(inside)
            self.at = -1  # rounds that the peers' rows have behind them
            self.driver_bytes = 0  # through this process in the last round
            self.path, self.chunk_size, self.said = self._settle(config)
        except BaseException:
            self.close()
            raise

    def _actors(self, config: Config) -> list[Any]:
        """One for each block, in the order of the blocks."""
        options = self.options
        actor = self._ray.remote(num_cpus=options.num_cpus, num_gpus=options.num_gpus, max_restarts=0)(Peer)
        places = [{"scheduling_strategy": on(self._ray, node.id)} for node in self._nodes] or [{}] * len(self.blocks)
        return [
            actor.options(**place).remote(config, number, self.blocks, sys.path, os.getcwd())
            for number, place in enumerate(places)
        ]

    def _settle(self, config: Config) -> tuple[str, int, Said]:
        """(path, chunk size, what was measured) of all actors, by the first, once all are up and hold the same.

        Starting is no round and has no limit.
        """
        begun = [peer.begin.remote(bool(self._nodes)) for peer in self.peers]
        expected = held(config, self.problem) if self._nodes else {}  # while they begin
        answers = self._all(begun, list(range(len(begun))), 0, limit=0.0)
        self.hosts = [host for host, _ in answers]
        for node, (_, there) in zip(self._nodes, answers, strict=False):
            if why := difference(node.name, there, expected):
                raise InputError(why)
        return self._all([self.peers[0].choose.remote()], [0], 0, limit=0.0)[0]

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        self._watch.close()
        if self._started:
            leave_ray(self._ray, gone=bool(self._gone))
        elif self._ray.is_initialized() and not self._gone:
            for peer in getattr(self, "peers", []):
                self._ray.kill(peer)

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """I local steps in every actor, then the exchange among them. ClientsFailedError where one cannot go on."""
        number = job.round_index
        self._check(number)
        if self.at != number:
            self._load(number, job)
        everybody, self.driver_bytes = list(range(len(self.peers))), 0
        stepped = self._all([peer.step.remote(number) for peer in self.peers], everybody, number)
        if progress:
            progress(int(job.num_steps.sum()))
        skipped = self._gather(stepped, number)
        mixed = self._all([p.mix.remote(number, skipped, job.evaluates) for p in self.peers], everybody, number)
        self.at = number + 1
        measured = self._measure(stepped, mixed, job.evaluates, number)
        losses = torch.tensor([loss for part in stepped for loss in part["losses"]], dtype=torch.float64)
        values = {"train_loss": float(losses.mean())}
        for name, key in (("consensus_distance", "consensus"), ("momentum_spread", "momentum")):
            for when, parts in (("", stepped), ("_after", mixed)):
                within = sum(len(b) * part[key] for b, part in zip(self.blocks, parts, strict=True))
                values[name + when] = measured[name + when] + within / len(losses)
        evaluated = measured.get("measured", {})
        if job.evaluates:
            each = [client for part in mixed for client in part["clients"]]
            evaluated = evaluated | summarised([_plain(client) for client in each])
        more = {name: value for name, value in values.items() if name.endswith("_after")}
        if skipped:
            more["num_skipped_links"] = len(skipped)
        return Outcome(
            mean=start,
            train_loss=values["train_loss"],
            consensus_distance=values["consensus_distance"],
            momentum_spread=values["momentum_spread"],
            trajectory=[],
            losses=losses,
            more=more,
            measured=evaluated,
            fetch=lambda: self._fetch(number + 1),
        )

    def _load(self, number: int, job: Job) -> None:
        assert job.rows is not None
        calls = []
        for peer, ids in zip(self.peers, self.blocks, strict=True):
            rows = to_arrays(flatten(to_device(rows_of(job.rows, torch.from_numpy(ids)), "cpu")))
            calls.append(peer.load.remote(number, rows, self.path, self.chunk_size))
        self._all(calls, list(range(len(calls))), number)

    def _gather(self, stepped: list[dict[str, Any]], number: int) -> list[tuple[int, int]]:
        """Have all rows fetched; the pairs of blocks to do without."""
        inboxes: list[dict[int, Any]] = [{} for _ in self.peers]
        for source, part in enumerate(stepped):
            for target, ref in part["out"].items():
                inboxes[target][source] = ref
        calls = [peer.gather.remote(refs, self.seconds) for peer, refs in zip(self.peers, inboxes, strict=True)]
        missing = self._all(calls, list(range(len(calls))), number, waiting=self.seconds)
        if any(missing):
            self._check(number, error_seen=True)  # without its object store nothing arrives
        skipped = set()
        for target, sources in enumerate(missing):
            for source, reason in sources.items():
                if self.policy == "stop":
                    who = f"from {self._named(source)} to {self._named(target)}"
                    raise ClientsFailedError(f"round {number + 1}: rows {who} did not arrive: {reason}")
                skipped.add((min(source, target), max(source, target)))
        return sorted(skipped)

    def _measure(self, stepped: list[Any], mixed: list[Any], evaluate: bool, number: int) -> dict[str, Any]:
        before, after = ([part["mean"] for part in parts] for parts in (stepped, mixed))
        # Under skip a link may be away for a while, and there is no round without its means.
        seconds = self.seconds if self.policy == "stop" else max(self.seconds, LINK_SECONDS)
        call = self.peers[0].measure.remote(before, after, evaluate, seconds)
        (found,) = self._all([call], [0], number, waiting=seconds)
        for block, reason in found.get("missing", {}).items():
            self._check(number, error_seen=True)
            raise ClientsFailedError(
                f"round {number + 1}: the mean of {self._named(block)} did not arrive at {self._named(0)}: {reason}"
            )
        return dict(found)

    def _fetch(self, done: int) -> Fetched:
        """(mean, rows) after so many rounds, brought to this process."""
        self._check(done - 1)
        counted = self.driver_bytes
        parts = self._all([peer.collect.remote(done) for peer in self.peers], list(range(len(self.peers))), done - 1)
        self.driver_bytes = counted
        rows = unflatten({name: torch.cat([as_tensor(part[name]) for part in parts]) for name in parts[0]})
        return Fetched(to_device(mean_of(rows, self.plan.method.running_var), self.problem.device), rows)

    def _check(self, number: int, error_seen: bool = False) -> None:
        """ClientsFailedError where Ray is gone: it would end the process that calls it."""
        self._gone = self._gone or (self._watch.look(error_seen=True) if error_seen else "")
        if self._gone:
            raise ClientsFailedError(f"round {number + 1}: {self._gone}")

    def _answer(self, call: Any, deadline: float, number: int) -> Any:
        """What the call gives; looks now and then whether it still can give anything."""
        while True:
            try:
                return self._ray.get(call, timeout=max(0.1, min(1.0, deadline - time.monotonic())))
            except self._ray.exceptions.GetTimeoutError:
                self._check(number)
                if time.monotonic() > deadline:
                    raise

    def _named(self, peer: int) -> str:
        """The clients of an actor, and its machine where that is another than this."""
        host = self.hosts[peer]
        return _clients(self.blocks[peer]) + (f" on {host}" if host and host != socket.gethostname() else "")

    def _all(
        self, calls: list[Any], who: list[int], number: int, limit: float | None = None, waiting: float = 0.0
    ) -> list[Any]:
        """The answers of all calls; ClientsFailedError names the clients of an actor that died, failed or is late.

        limit: seconds for all of them, 0 for as long as they take; by default the straggler limit. waiting: seconds on
        top of it that the actors may wait for one another.
        """
        answers = []
        if limit is None:  # the first round loads libraries
            limit = max(self.limit, WARM_UP_SECONDS) if self.limit and self.at < 0 else self.limit
        deadline = time.monotonic() + limit + waiting if limit else math.inf
        for call, peer in zip(calls, who, strict=True):
            try:
                answers.append(self._answer(call, deadline, number))
            except ClientsFailedError:
                raise
            except InputError as error:  # Ray's own kind of one, whose words are a traceback
                # The driver has read all that the configuration names: another machine lacks what it has.
                there = self._nodes[peer] if self._nodes else None
                where = missing_on(there.name) if there and there.id != self._here else ""
                raise InputError(str(getattr(error, "cause", error)) + where) from None
            except self._ray.exceptions.GetTimeoutError:
                late = f"no answer within {limit:g} s (simulation.straggler-seconds)"
                raise ClientsFailedError(f"round {number + 1}: {self._named(peer)}: {late}") from None
            except Exception as error:
                self._check(number, error_seen=True)
                cause = getattr(error, "cause", None)
                died = "their Ray actor died" if type(error).__name__.startswith("Actor") else one_line(cause or error)
                raise ClientsFailedError(f"round {number + 1}: {self._named(peer)}: {died}") from None
        self.driver_bytes += sum(map(_size, answers))
        return answers


def _plain(measured: dict[str, Any]) -> dict[str, Any]:
    """One client's mean is its own value."""
    return {name.removeprefix("mean_client_"): v for name, v in measured.items() if name.startswith("mean_client_")}


def _clients(ids: np.ndarray) -> str:
    return f"client {ids[0]}" if len(ids) == 1 else f"clients {ids[0]} … {ids[-1]}"


def _size(value: Any) -> int:
    """Bytes of an answer; a reference to rows is 28, whatever it refers to."""
    if isinstance(value, dict):
        return sum(_size(k) + _size(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    return len(value) if isinstance(value, str) else 28 if hasattr(value, "hex") and hasattr(value, "task_id") else 8


def make_peers(config: Config, problem: Problem, plan: Plan) -> Peers:
    """The actors of `engine.workers` for Algorithm 2, with what one of them chose."""
    backend = Peers(config, problem, plan)
    path, chunk_size = backend.path, backend.chunk_size
    backend.settled = {
        "engine.device": resolve_device(config).engine.device,
        "engine.path": path,
        "engine.chunk-size": chunk_size,
        "engine.threads": torch.get_num_threads(),
        "simulation.num-gpus": backend.options.num_gpus,
    }
    actors, biggest = counted(len(backend.peers), "Ray actor"), max(map(len, backend.blocks))
    what = f"{actors} on {actors_device(backend.options)}, of at most {counted(biggest, 'client')}"
    backend.notes = [f"{what} exchange rows directly; each {path} × {chunk_size}"]
    backend.notes += [f"the first actor: {backend.said.short}"] if backend.said.short else []
    backend.details = [f"the first actor: {backend.said.details}"] if backend.said.details else []
    return backend
