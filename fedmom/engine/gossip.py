"""Algorithm 2 on one device: N rows of (x, u), I local steps each, then one product with the mixing matrix W_t.

Yu, Jin, Yang (ICML 2019), Algorithm 2 (there I = 1). The local steps are the engine's, on the same addressed batches.
"""

import torch
from torch import Tensor

from fedmom.engine.engine import Engine
from fedmom.method.algorithms import Method
from fedmom.method.averaging import WeightedMean
from fedmom.method.decentralized.mixing import Blocks, combine, spread
from fedmom.method.decentralized.topology import Mixing, Topology
from fedmom.method.state import ClientState, is_momentum, to_device
from fedmom.rounds.round import Backend, Job, Outcome, Progress


def mean_of(rows: ClientState, running_var: str = "pooled") -> ClientState:
    """x̄, ū and the buffers' mean over rows [N, ...], in float64 sums."""
    buffers = rows.buffers
    if buffers:
        mean, one = WeightedMean(running_var), next(iter(buffers.values()))
        mean.add(ClientState({}, {}, buffers), torch.ones(len(one), dtype=torch.float64, device=one.device))
        buffers = mean.mean().buffers
    params, momentum = (
        {name: value.mean(0, dtype=torch.float64).to(value.dtype) for name, value in tree.items()} for tree in rows[:2]
    )
    return ClientState(params, momentum, {name: buffers[name] for name in rows.buffers})


def exchange(
    after: ClientState,
    before: ClientState,
    mixing: Mixing,
    method: Method,
    lr: float,
    number: int,
    blocks: Blocks | None = None,
) -> ClientState:
    """All clients' rows after the local steps of round 1, 2, … (`number`) -> their next start, each state by its rule:
    x, and u by the momentum policy, times W.
    """
    return combine(
        (blocks or Blocks()).of(mixing),
        after,
        own=after,
        before=before,
        rules=method.rules,
        number=number,
        lr=lr,
        beta=method.beta,
        pooled=method.running_var == "pooled",
    )


def outcome_of(
    device: torch.device,
    job: Job,
    method: Method,
    after: ClientState,
    mixed: ClientState,
    losses: Tensor,
    path: list[Tensor],
) -> Outcome:
    """What a round came to, with disagreement measured just before and after the exchange."""
    total = float(job.weights.sum())
    return Outcome(
        mean=to_device(mean_of(mixed, method.running_var), device),
        train_loss=float(job.weights @ losses) / total,
        consensus_distance=spread(after.params),
        momentum_spread=spread(after.momentum, is_momentum),
        trajectory=[point / total for point in path],
        losses=losses,
        rows=mixed,
        more={
            "consensus_distance_after": spread(mixed.params),
            "momentum_spread_after": spread(mixed.momentum, is_momentum),
        },
    )


class GossipRounds(Backend):
    """Rounds of Algorithm 2: the engine's local steps, and the exchange on the device where the rows are."""

    def __init__(self, engine: Engine, topology: Topology, home: torch.device | str) -> None:
        """`home`: where the N rows are kept between rounds; main memory if the device is too small for them."""
        self.engine, self.topology, self.home = engine, topology, torch.device(home)
        self.blocks = Blocks()

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """I local steps of every client from its own row, then the exchange. Changes nothing in place."""
        assert job.rows is not None, "Algorithm 2 needs every client's row"
        rows, method = to_device(job.rows, self.home), self.engine.method
        after, losses, path = self.engine.run_rows(rows, job, progress)
        mixing = self.topology.at(job.round_index)
        mixed = exchange(after, rows, mixing, method, job.lrs[0], job.round_index + 1, self.blocks)
        return outcome_of(self.engine.problem.device, job, method, after, mixed, losses, path)
