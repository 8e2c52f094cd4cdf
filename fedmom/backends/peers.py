"""Algorithm 2 on Ray without a server: blocks of clients live in actors and send rows straight to one another.

The driver keeps time and metrics: what passes through it per round are losses and references, as many bytes for a
large model as for a small one. Rows go from actor to actor through Ray's object store; block means go to the first
actor, which measures disagreement and evaluates the mean model. Checkpoints alone bring the rows to the driver.
"""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from fedmom.actors.cluster import Watch, join_ray
from fedmom.actors.pool import WARM_UP_SECONDS
from fedmom.config.build import actors_device, make_plan, make_task, pool_options, resolve_device, set_up_torch
from fedmom.config.keys import Config, flat, replace
from fedmom.config.numbers import counted
from fedmom.engine.auto import choose
from fedmom.engine.engine import Engine
from fedmom.engine.gossip import mean_of
from fedmom.errors import ClientsFailedError, InputError
from fedmom.machine.allocator import keep_freed_memory
from fedmom.method.algorithms import MOMENTUM_POLICIES
from fedmom.method.averaging import WeightedMean
from fedmom.method.mixing import Block, combine, spread
from fedmom.method.state import ClientState, Tree, as_tensor, flatten, rows_of, to_device, unflatten
from fedmom.method.topology import Mixing
from fedmom.rounds.loop import Plan, beginning, chosen_clients, clients_job, evaluate_rows, summarised
from fedmom.rounds.round import Backend, Outcome, Progress, Round
from fedmom.tasks.classification import Task
from fedmom.user_code import blamed, one_line

LINK_SECONDS = 60.0  # how long rows may take from actor to actor; simulation.straggler-seconds, if that is given
Arrays = dict[str, np.ndarray]


class Peer:
    """An actor: a block of clients, their rows after the last two rounds, and an engine."""

    def __init__(self, config: Config, me: int, blocks: Sequence[np.ndarray]) -> None:
        set_up_torch(config.engine)
        keep_freed_memory()
        self.config, self.me, self.blocks = config, me, blocks
        self.ids = blocks[me]
        self.keys = flat(config)
        with blamed(self.keys):
            self.task: Task = make_task(config, config.engine.device)
            self.plan: Plan = make_plan(config)
        self.states: dict[int, ClientState] = {}  # {rounds done: the block's rows}
        self.received: dict[int, Tree] = {}  # {block: its rows of this round}

    def choose(self) -> tuple[str, int]:
        """(path, chunk size) as configured, or by timing; InputError where the path is not right for the model."""
        start, wanted = beginning(self.task, self.plan).state, self.config.engine
        job = clients_job(self.task, self.plan, 0, self.ids)
        path, chunk_size = wanted.path, wanted.chunk_size
        with blamed(self.keys):
            chosen = choose(self.task, self.plan.method, start, job, path=path, chunk_size=chunk_size, own_rows=True)
        return chosen.path, wanted.chunk_size or chosen.chunk_size

    def load(self, round_index: int, rows: Arrays, path: str, chunk_size: int) -> None:
        """Begin round 0, 1, … from these rows."""
        self.states = {round_index: to_device(unflatten(_tensors(rows)), self.task.device)}
        self.engine = Engine(self.task, self.plan.method, path=path, chunk_size=chunk_size)

    def collect(self, round_index: int) -> Arrays:
        """The block's rows after so many rounds: of the last two."""
        return _arrays(flatten(self.states[round_index]))

    def step(self, round_index: int) -> dict[str, Any]:
        """I local steps of the block, and the rows for each of the other blocks put into the store."""
        import ray

        job = clients_job(self.task, self.plan, round_index, self.ids)
        with blamed(self.keys):
            self.after, losses, _ = self.engine.run_rows(self.states[round_index], job)
        self.lr = job.lrs[0]
        out = {other: ray.put(_arrays(self._for(other, round_index))) for other in self._targets(round_index)}
        return {"losses": losses.tolist(), "out": out, **self._measured(self.after)}

    def gather(self, refs: dict[int, Any], seconds: float) -> dict[int, str]:
        """Fetch other blocks' rows; {block: why} of those that do not arrive."""
        import ray

        missing = {}
        self.received = {}
        for other, ref in refs.items():
            try:
                self.received[other] = _tensors(ray.get(ref, timeout=seconds))
            except Exception as error:  # lost, freed, timed out, or its owner died
                missing[other] = one_line(error)
        return missing

    def mix(self, round_index: int, skipped: Iterable[tuple[int, int]], evaluate: bool) -> dict[str, Any]:
        """Combine the rows by W_t, without the links between the `skipped` pairs of blocks."""
        mixing = without_blocks(self._mixing(round_index), self.blocks, skipped)
        needed = np.unique(np.concatenate([self.ids, mixing.sources[np.isin(mixing.targets, self.ids)]]))
        own_part = flatten(self._sent(self.after))
        parts, ids = [own_part], [self.ids]
        for other, tensors in self.received.items():
            parts.append({name: value.to(self.task.device) for name, value in tensors.items()})
            ids.append(senders(self._mixing(round_index), self.blocks[other], self.ids))
        everybody = np.concatenate(ids)
        order = torch.from_numpy(np.argsort(everybody)[np.isin(np.sort(everybody), needed)])
        stack = unflatten({name: torch.cat([part[name] for part in parts])[order] for name in own_part})
        mixed = combine(
            Block(mixing, self.ids, needed),
            stack,
            own=self.after,
            before=self.states[round_index],
            policy=self.plan.method.momentum_policy,
            lr=self.lr,
            beta=self.plan.method.beta,
            pooled=self.plan.method.running_var == "pooled",
        )
        self.states = {round_index: self.states[round_index], round_index + 1: mixed}
        self.received = {}
        found: dict[str, Any] = self._measured(mixed)
        if evaluate:
            chosen = chosen_clients(len(self.task.sizes), self.plan.eval_clients)
            places = [int(np.searchsorted(self.ids, c)) for c in chosen if c in self.ids]
            with blamed(self.keys):
                found["clients"] = [evaluate_rows(self.task, mixed, [place]) for place in places]
        return found

    def measure(self, before: list[Any], after: list[Any], evaluate: bool) -> dict[str, Any]:
        """At the first actor, from all blocks' means: Σ size ‖mean_block − mean‖² / N; the mean model's evaluation."""
        import ray

        sizes = torch.tensor([len(block) for block in self.blocks], dtype=torch.float64)
        found: dict[str, Any] = {}
        for when, refs in (("", before), ("_after", after)):
            means = [_tensors(part) for part in ray.get(refs)]
            rows = {n: torch.stack([part[n] for part in means]) for n in means[0]}
            for part, name in (("params", "consensus_distance"), ("momentum", "momentum_spread")):
                found[name + when] = _between({n: v for n, v in rows.items() if n.startswith(part)}, sizes)
        if evaluate:
            whole = {n: torch.tensordot(sizes / sizes.sum(), v.double(), 1) for n, v in rows.items()}
            start = self.task.start()
            state = unflatten({n: whole[n].to(v.dtype) for n, v in flatten(start).items() if n in whole})
            state = state._replace(buffers=self._buffers(rows))
            with blamed(self.keys):
                found["measured"] = self.task.evaluate(to_device(state, self.task.device))
        return found

    def _buffers(self, rows: Tree) -> Tree:
        """Buffers of the mean model: blocks' pooled variances pooled once more."""
        names = self.task.start().buffers
        weights = torch.tensor([len(block) for block in self.blocks], dtype=torch.float64)
        mean = WeightedMean(self.plan.method.running_var)
        mean.add(ClientState({}, {}, {name: rows[f"buffers/{name}"] for name in names}), weights)
        return mean.mean().buffers

    def _measured(self, rows: ClientState) -> dict[str, Any]:
        """Scalars of the block, and a reference to its mean."""
        import ray

        mean = to_device(mean_of(rows, self.plan.method.running_var), "cpu")
        return {
            "consensus": spread(rows.params),
            "momentum": spread(rows.momentum),
            "mean": ray.put(_arrays(flatten(mean))),
        }

    def _mixing(self, round_index: int) -> Mixing:
        assert self.plan.topology is not None
        return self.plan.topology.at(round_index)

    def _targets(self, round_index: int) -> list[int]:
        """Blocks that need rows of this one."""
        mixing = self._mixing(round_index)
        return [b for b in range(len(self.blocks)) if b != self.me and len(senders(mixing, self.ids, self.blocks[b]))]

    def _sent(self, rows: ClientState) -> ClientState:
        """What travels: x, the real buffers, and u if the policy mixes it."""
        momentum = rows.momentum if MOMENTUM_POLICIES[self.plan.method.momentum_policy].sends_momentum else {}
        return ClientState(rows.params, momentum, rows.buffers)

    def _for(self, other: int, round_index: int) -> Tree:
        ids = senders(self._mixing(round_index), self.ids, self.blocks[other])
        places = torch.from_numpy(np.searchsorted(self.ids, ids))
        return flatten(to_device(rows_of(self._sent(self.after), places), "cpu"))


def senders(mixing: Mixing, block: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Ascending ids of the clients of `block` that send to clients of `other`."""
    away = np.isin(mixing.sources, block) & np.isin(mixing.targets, other)
    return np.unique(mixing.sources[away])


def without_blocks(mixing: Mixing, blocks: Sequence[np.ndarray], skipped: Iterable[tuple[int, int]]) -> Mixing:
    """W without the links between pairs of blocks; ValueError for a W that is not symmetric."""
    gone = set()
    for a, b in skipped:
        forth = np.isin(mixing.sources, blocks[a]) & np.isin(mixing.targets, blocks[b])
        gone |= set(zip(mixing.sources[forth].tolist(), mixing.targets[forth].tolist(), strict=True))
    return mixing.without(gone)


def _between(rows: Tree, sizes: torch.Tensor) -> float:
    """Σ size ‖mean_block − mean‖² / Σ size."""
    total = 0.0
    for value in rows.values():
        flat = value.reshape(len(value), -1).double()
        mean = (sizes / sizes.sum()) @ flat
        total += float(sizes @ ((flat - mean) ** 2).sum(1))
    return total / float(sizes.sum())


def _arrays(tree: Tree) -> Arrays:
    return {name: value.detach().cpu().numpy() for name, value in tree.items()}


def _tensors(arrays: Arrays) -> Tree:
    return {name: as_tensor(value) for name, value in arrays.items()}


class Peers(Backend):
    """Rounds of Algorithm 2 by actors that exchange rows among themselves."""

    def __init__(self, config: Config, task: Task, plan: Plan) -> None:
        assert plan.topology is not None
        self.task, self.plan, self.policy = task, plan, config.simulation.on_link_failure
        if self.policy == "skip" and not plan.topology.is_symmetric:
            raise InputError(
                f"simulation.on-link-failure = 'skip': topology {plan.topology.name!r} is directed, and leaving out a "
                "link would make W neither mean- nor consensus-preserving; use stop"
            )
        num_clients = len(task.sizes)
        wanted = min(config.engine.workers, num_clients)
        self.options = options = pool_options(replace(config, "engine", workers=wanted))
        self._ray, self._started, _ = join_ray(options, wanted)
        self._gone = ""  # what of Ray has ended
        self._watch = Watch(self._ray, lambda what: setattr(self, "_gone", what))
        try:
            self.blocks = np.array_split(np.arange(num_clients), wanted)
            self.limit = config.simulation.straggler_seconds
            self.seconds = self.limit or LINK_SECONDS
            inside = replace(config, "engine", device=actors_device(options), threads=0, workers=0)
            actor = self._ray.remote(num_cpus=options.num_cpus, num_gpus=options.num_gpus, max_restarts=0)(Peer)
            self.peers = [actor.remote(inside, number, self.blocks) for number in range(wanted)]
            self.at = -1  # rounds that the peers' rows have behind them
            self.driver_bytes = 0  # through this process in the last round
            self.path, self.chunk_size = self._settle(config)
        except BaseException:
            self.close()
            raise

    def _settle(self, config: Config) -> tuple[str, int]:
        return self._all([self.peers[0].choose.remote()], [0], 0)[0]

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        self._watch.close()
        if self._started:
            self._ray.shutdown()
        elif self._ray.is_initialized() and not self._gone:
            for peer in getattr(self, "peers", []):
                self._ray.kill(peer)

    def run_round(self, start: ClientState, job: Round, progress: Progress | None = None) -> Outcome:
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
            path=[],
            momentum=None,
            losses=losses,
            more=more,
            measured=evaluated,
            fetch=lambda: self._fetch(number + 1),
        )

    def _load(self, number: int, job: Round) -> None:
        assert job.rows is not None
        calls = []
        for peer, ids in zip(self.peers, self.blocks, strict=True):
            rows = _arrays(flatten(to_device(rows_of(job.rows, torch.from_numpy(ids)), "cpu")))
            calls.append(peer.load.remote(number, rows, self.path, self.chunk_size))
        self._all(calls, list(range(len(calls))), number)

    def _gather(self, stepped: list[dict[str, Any]], number: int) -> list[tuple[int, int]]:
        """Have all rows fetched; the pairs of blocks to do without."""
        inboxes: list[dict[int, Any]] = [{} for _ in self.peers]
        for source, part in enumerate(stepped):
            for target, ref in part["out"].items():
                inboxes[target][source] = ref
        calls = [peer.gather.remote(refs, self.seconds) for peer, refs in zip(self.peers, inboxes, strict=True)]
        missing = self._all(calls, list(range(len(calls))), number)
        if any(missing):
            self._check(number, error_seen=True)  # without its object store nothing arrives
        skipped = set()
        for target, sources in enumerate(missing):
            for source, reason in sources.items():
                if self.policy == "stop":
                    who = f"from {_named(self.blocks[source])} to {_named(self.blocks[target])}"
                    raise ClientsFailedError(f"round {number + 1}: rows {who} did not arrive: {reason}")
                skipped.add((min(source, target), max(source, target)))
        return sorted(skipped)

    def _measure(self, stepped: list[Any], mixed: list[Any], evaluate: bool, number: int) -> dict[str, Any]:
        before, after = ([part["mean"] for part in parts] for parts in (stepped, mixed))
        return self._all([self.peers[0].measure.remote(before, after, evaluate)], [0], number)[0]

    def _fetch(self, done: int) -> tuple[ClientState, ClientState]:
        """(mean, rows) after so many rounds, brought to this process."""
        self._check(done - 1)
        counted = self.driver_bytes
        parts = self._all([peer.collect.remote(done) for peer in self.peers], list(range(len(self.peers))), done - 1)
        self.driver_bytes = counted
        rows = unflatten({name: torch.cat([as_tensor(part[name]) for part in parts]) for name in parts[0]})
        return to_device(mean_of(rows, self.plan.method.running_var), self.task.device), rows

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

    def _all(self, calls: list[Any], who: list[int], number: int) -> list[Any]:
        """The answers of all calls; ClientsFailedError names the clients of an actor that died, failed or is late."""
        answers = []
        # The first calls read data and build models.
        limit = max(self.limit, WARM_UP_SECONDS) if self.limit and self.at < 0 else self.limit
        deadline = time.monotonic() + limit if limit else math.inf
        for call, peer in zip(calls, who, strict=True):
            try:
                answers.append(self._answer(call, deadline, number))
            except ClientsFailedError:
                raise
            except InputError as error:  # Ray's own kind of one, whose words are a traceback
                raise InputError(str(getattr(error, "cause", error))) from None
            except self._ray.exceptions.GetTimeoutError:
                late = f"no answer within {limit:g} s (simulation.straggler-seconds)"
                raise ClientsFailedError(f"round {number + 1}: {_named(self.blocks[peer])}: {late}") from None
            except Exception as error:
                self._check(number, error_seen=True)
                cause = getattr(error, "cause", None)
                died = "their Ray actor died" if type(error).__name__.startswith("Actor") else one_line(cause or error)
                raise ClientsFailedError(f"round {number + 1}: {_named(self.blocks[peer])}: {died}") from None
        self.driver_bytes += sum(map(_size, answers))
        return answers


def _plain(measured: dict[str, Any]) -> dict[str, Any]:
    """One client's mean is its own value."""
    return {name.removeprefix("mean_client_"): v for name, v in measured.items() if name.startswith("mean_client_")}


def _named(ids: np.ndarray) -> str:
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


def make_peers(config: Config, task: Task, plan: Plan) -> Peers:
    """The actors of `engine.workers` for Algorithm 2, with what one of them chose."""
    backend = Peers(config, task, plan)
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
    return backend
