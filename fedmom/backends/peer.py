"""What one actor of Algorithm 2 does: a block of clients, whose rows it sends straight to other actors.

Rows travel through Ray's object store: an actor puts what its neighbours need there, and the driver passes references.
The same rows are put once, whoever needs them, so that they travel to a machine once.
"""

import socket
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from fedmom.actors.nodes import as_the_driver
from fedmom.backends.agreement import held
from fedmom.config.build import make_plan, make_problem, set_up_torch
from fedmom.config.keys import Config
from fedmom.config.load import flat
from fedmom.engine.auto import Said, choose
from fedmom.engine.engine import Engine
from fedmom.engine.gossip import mean_of
from fedmom.machine.allocator import keep_freed_memory
from fedmom.method.averaging import WeightedMean, is_measured
from fedmom.method.decentralized.mixing import Block, combine, spread
from fedmom.method.decentralized.topology import Mixing
from fedmom.method.state import (
    Arrays,
    ClientState,
    Tree,
    flatten,
    from_arrays,
    is_momentum,
    rows_of,
    to_arrays,
    to_device,
    unflatten,
)
from fedmom.method.states.policies import MOMENTUM_POLICIES
from fedmom.method.states.rules import state_in
from fedmom.rounds.correction import start_of
from fedmom.rounds.evaluation import chosen_clients, evaluate_rows
from fedmom.rounds.plan import Plan, beginning, clients_job
from fedmom.tasks.problem import Problem
from fedmom.user_code import blamed, one_line


class Peer:
    """An actor: a block of clients, their rows after the last two rounds, and an engine."""

    def __init__(
        self, config: Config, me: int, blocks: Sequence[np.ndarray], paths: Sequence[str] = (), folder: str = ""
    ) -> None:
        """paths, folder: the driver's sys.path and working directory, where the user's own data and model may be."""
        as_the_driver(paths, folder)
        self.config, self.me, self.blocks = config, me, blocks
        self.ids = blocks[me]
        self.keys = flat(config)
        self.states: dict[int, ClientState] = {}  # {rounds done: the block's rows}
        self.received: dict[int, Tree] = {}  # {block: its rows of this round}

    def begin(self, compare: bool = False) -> tuple[str, dict[str, str]]:
        """Read the data and build the model; the name of this machine, and what is `held` there if that is compared.

        Raises InputError, which of a constructor Ray would tell as an actor's death.
        """
        set_up_torch(self.config.engine)
        keep_freed_memory()
        with blamed(self.keys):
            self.problem: Problem = make_problem(self.config, self.config.engine.device)
            self.plan: Plan = make_plan(self.config, self.problem)
        return socket.gethostname(), held(self.config, self.problem) if compare else {}

    def choose(self) -> tuple[str, int, Said]:
        """(path, chunk size, what was measured) as configured, or by timing.

        Raises InputError where the path is not right for the model.
        """
        start, wanted = beginning(self.problem, self.plan).state, self.config.engine
        job = clients_job(self.problem, self.plan, 0, self.ids)
        path, chunk_size = wanted.path, wanted.chunk_size
        with blamed(self.keys):
            chosen = choose(
                self.problem,
                self.plan.method,
                start,
                job,
                path=path,
                chunk_size=chunk_size,
                own_rows=True,
                remember=wanted.remember,
            )
        return chosen.path, wanted.chunk_size or chosen.chunk_size, chosen.said

    def load(self, round_index: int, rows: Arrays, path: str, chunk_size: int) -> None:
        """Begin round 0, 1, … from these rows."""
        self.states = {round_index: to_device(unflatten(from_arrays(rows)), self.problem.device)}
        self.engine = Engine(self.problem, self.plan.method, path=path, chunk_size=chunk_size)

    def collect(self, round_index: int) -> Arrays:
        """The block's rows after so many rounds: of the last two."""
        return to_arrays(flatten(self.states[round_index]))

    def step(self, round_index: int) -> dict[str, Any]:
        """I local steps of the block, and the rows for each of the other blocks put into the store."""
        import ray

        job = clients_job(self.problem, self.plan, round_index, self.ids)
        with blamed(self.keys):
            self.after, losses, _ = self.engine.run_rows(self.states[round_index], job)
        self.lr = job.lrs[0]
        out, there = dict[int, Any](), dict[bytes, Any]()  # {block: its rows}, {ids of rows: they}
        for other, ids in self._targets(round_index).items():
            if (which := ids.tobytes()) not in there:
                there[which] = ray.put(to_arrays(self._rows(ids, round_index)))
            out[other] = there[which]
        return {"losses": losses.tolist(), "out": out, **self._measured(self.after)}

    def gather(self, refs: dict[int, Any], seconds: float) -> dict[int, str]:
        """Fetch other blocks' rows; {block: why} of those that do not arrive within so many seconds."""
        received, missing = fetched(refs, seconds)
        self.received = {other: from_arrays(rows) for other, rows in received.items()}
        return missing

    def mix(self, round_index: int, skipped: Iterable[tuple[int, int]], evaluate: bool) -> dict[str, Any]:
        """Combine the rows by W_t, without the links between the `skipped` pairs of blocks."""
        mixing = without_blocks(self._mixing(round_index), self.blocks, skipped)
        needed = np.unique(np.concatenate([self.ids, mixing.sources[np.isin(mixing.targets, self.ids)]]))
        own_part = flatten(self._sent(self.after, round_index))
        parts, ids = [own_part], [self.ids]
        for other, tensors in self.received.items():
            parts.append({name: value.to(self.problem.device) for name, value in tensors.items()})
            ids.append(senders(self._mixing(round_index), self.blocks[other], self.ids))
        everybody = np.concatenate(ids)
        order = torch.from_numpy(np.argsort(everybody)[np.isin(np.sort(everybody), needed)])
        stack = unflatten({name: torch.cat([part[name] for part in parts])[order] for name in own_part})
        mixed = combine(
            Block(mixing, self.ids, needed),
            stack,
            own=self.after,
            before=self.states[round_index],
            rules=self.plan.method.rules,
            number=round_index + 1,
            lr=self.lr,
            beta=self.plan.method.beta,
            pooled=self.plan.method.running_var == "pooled",
        )
        self.states = {round_index: self.states[round_index], round_index + 1: mixed}
        self.received = {}
        found: dict[str, Any] = self._measured(mixed)
        if evaluate:
            chosen = chosen_clients(len(self.problem.sizes), self.plan.eval_clients)
            places = [int(np.searchsorted(self.ids, c)) for c in chosen if c in self.ids]
            with blamed(self.keys):
                found["clients"] = [evaluate_rows(self.problem, mixed, [place]) for place in places]
        return found

    def measure(self, before: list[Any], after: list[Any], evaluate: bool, seconds: float) -> dict[str, Any]:
        """At the first actor, from all blocks' means: Σ size ‖mean_block − mean‖² / N; the mean model's evaluation.

        {"missing": {block: why}} where means do not arrive within so many seconds.
        """
        sizes = torch.tensor([len(block) for block in self.blocks], dtype=torch.float64)
        num_blocks, found = len(self.blocks), dict[str, Any]()
        means, missing = fetched(dict(enumerate(before + after)), seconds)
        if missing:
            return {"missing": {place % num_blocks: why for place, why in missing.items()}}
        for when, first in (("", 0), ("_after", num_blocks)):
            parts = [from_arrays(means[first + block]) for block in range(num_blocks)]
            rows = {n: torch.stack([part[n] for part in parts]) for n in parts[0]}
            for part, name in (("params", "consensus_distance"), ("momentum", "momentum_spread")):
                measured = {n: v for n, v in rows.items() if _counts(part, n)}
                found[name + when] = _between(measured, sizes)
        if evaluate:
            whole = {n: torch.tensordot(sizes / sizes.sum(), v.double(), 1) for n, v in rows.items()}
            start = start_of(self.problem, self.plan.method)[0]
            state = unflatten({n: whole[n].to(v.dtype) for n, v in flatten(start).items() if n in whole})
            state = state._replace(buffers=self._buffers(rows))
            with blamed(self.keys):
                found["measured"] = self.problem.evaluate(to_device(state, self.problem.device))
        return found

    def _buffers(self, rows: Tree) -> Tree:
        """Buffers of the mean model: blocks' pooled variances pooled once more."""
        names = self.problem.start().buffers
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
            "momentum": spread(rows.momentum, is_momentum),
            "mean": ray.put(to_arrays(flatten(mean))),
        }

    def _mixing(self, round_index: int) -> Mixing:
        assert self.plan.topology is not None
        return self.plan.topology.at(round_index)

    def _targets(self, round_index: int) -> dict[int, np.ndarray]:
        """{block: ascending ids of the clients here whose rows it needs}, without blocks that need none."""
        mixing = self._mixing(round_index)
        needed = {b: senders(mixing, self.ids, ids) for b, ids in enumerate(self.blocks) if b != self.me}
        return {block: ids for block, ids in needed.items() if len(ids)}

    def _sent(self, rows: ClientState, round_index: int) -> ClientState:
        """What travels: of x, the buffers and the states what is exchanged in this round."""
        rules, parts = self.plan.method.rules, dict[str, Tree]()
        for part in ("params", "momentum", "buffers"):
            tree: Tree = getattr(rows, part)
            sent = {
                n: v for n, v in tree.items() if MOMENTUM_POLICIES[rules.of(state_in(part, n)).policy].sends_momentum
            }
            parts[part] = {n: v for n, v in sent.items() if rules.exchanged(part, n, round_index + 1)}
        return ClientState(**parts)

    def _rows(self, ids: np.ndarray, round_index: int) -> Tree:
        places = torch.from_numpy(np.searchsorted(self.ids, ids))
        return flatten(to_device(rows_of(self._sent(self.after, round_index), places), "cpu"))


def fetched(refs: dict[int, Any], seconds: float) -> tuple[dict[int, Arrays], dict[int, str]]:
    """({key: what is there}, {key: why it is not}) of what others have put; all are on their way at the same time."""
    import ray

    there, missing = dict[int, Arrays](), dict[int, str]()
    if not refs:
        return there, missing
    _, late = ray.wait(list(refs.values()), num_returns=len(refs), timeout=seconds)
    for key, ref in refs.items():
        if ref in late:
            missing[key] = f"not within {seconds:g} s"
            continue
        try:
            there[key] = ray.get(ref, timeout=seconds)
        except Exception as error:  # lost, freed, or its owner died
            missing[key] = one_line(error)
    return there, missing


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


def _counts(part: str, flat_name: str) -> bool:
    """Whether the spread of a part is measured on this tensor."""
    own, _, name = flat_name.partition("/")
    return own == part and is_measured(part, name)


def _between(rows: Tree, sizes: torch.Tensor) -> float:
    """Σ size ‖mean_block − mean‖² / Σ size."""
    total = 0.0
    for value in rows.values():
        flat = value.reshape(len(value), -1).double()
        mean = (sizes / sizes.sum()) @ flat
        total += float(sizes @ ((flat - mean) ** 2).sum(1))
    return total / float(sizes.sum())
