"""One exchange of Algorithm 2: the rows of all clients times W, dense or sparse, and what becomes of the momentum.

Yu, Jin, Yang (ICML 2019), Algorithm 2: u_i <- Σ_j ũ_j W_ji and x_i <- Σ_j x̃_j W_ji, adapt first, then combine.
"""

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedmom.method.averaging import MEAN, VAR
from fedmom.method.decentralized.topology import Mixing
from fedmom.method.state import ClientState, Tree, state_of
from fedmom.method.states.policies import MOMENTUM_POLICIES, Rows
from fedmom.method.states.rules import Rules

# Above this share of non-zero entries, and for few clients, one dense product is faster (measured: docs/log.md).
_DENSE_SHARE, _DENSE_CLIENTS = 0.07, 64

Apply = Callable[[Tensor], Tensor]  # rows [N, ...] -> rows [n, ...]


class Block:
    """The columns of W by which some clients combine rows of some others (both in ascending order); all by default."""

    def __init__(self, mixing: Mixing, receivers: np.ndarray | None = None, senders: np.ndarray | None = None) -> None:
        everybody = np.arange(mixing.num_clients)
        receivers = everybody if receivers is None else receivers
        senders = everybody if senders is None else senders
        kept = np.isin(mixing.targets, receivers)
        self.rows = np.searchsorted(receivers, mixing.targets[kept])
        self.columns = np.searchsorted(senders, mixing.sources[kept])
        self.weights = mixing.weights[kept]
        self.shape = (len(receivers), len(senders))
        self._made: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def is_sparse(self) -> bool:
        """Whether the product is taken with a sparse matrix."""
        share = len(self.weights) / max(1, self.shape[0] * self.shape[1])
        return share < _DENSE_SHARE and self.shape[1] > _DENSE_CLIENTS

    def matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Wᵀ of these clients [receivers, senders]: dense, or in compressed rows."""
        if (dtype, device) not in self._made:
            at = torch.from_numpy(np.stack([self.rows, self.columns]))
            values = torch.from_numpy(self.weights).to(dtype)
            coo = torch.sparse_coo_tensor(at, values, self.shape, check_invariants=False).coalesce()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch calls its compressed rows a beta feature
                made = coo.to_sparse_csr() if self.is_sparse() else coo.to_dense()
            self._made[dtype, device] = made.to(device)
        return self._made[dtype, device]

    def __call__(self, rows: Tensor) -> Tensor:
        """Σ_j W_ji row_j for every receiver i: [senders, ...] -> [receivers, ...], in one matrix product."""
        flat = rows.reshape(len(rows), -1)
        return (self.matrix(rows.dtype, rows.device) @ flat).reshape(self.shape[0], *rows.shape[1:])


def mix_buffers(apply: Apply, buffers: Tree, own: Tree, pooled: bool) -> Tree:
    """Real buffers by W; running_var as the variance of all that came in, if `pooled`; integers stay each client's own.

    `own`: the receivers' rows of `buffers`.
    """
    mixed = {name: apply(value) if value.is_floating_point() else own[name] for name, value in buffers.items()}
    if pooled:
        for name in buffers:
            partner = name.removesuffix(VAR) + MEAN
            if name.endswith(VAR) and partner in buffers:
                # Σ w (var + mean²) − (Σ w mean)², with means about a common point: clients that agree add 0, not noise.
                centre = buffers[partner].mean(0)
                away = apply((buffers[partner] - centre) ** 2) - (mixed[partner] - centre) ** 2
                mixed[name] = mixed[name] + away.clamp(min=0)
    return mixed


def _mixed(apply: Apply, tree: Tree) -> Tree:
    return {name: apply(value) for name, value in tree.items()}


def combine(
    apply: Apply,
    after: ClientState,
    *,
    own: ClientState,
    before: ClientState,
    rules: Rules,
    number: int,
    lr: float,
    beta: float,
    pooled: bool,
) -> ClientState:
    """Everybody's rows after the local steps of round 1, 2, … (`number`) -> the receivers' next start.

    after: rows of all senders; own: the receivers' part of them; before: the receivers' rows before the round. A state
    that is not exchanged in this round stays what it is.
    """
    x, held = ({n: v for n, v in t.items() if rules.exchanged(part, n, number)} for part, t in _x_of(after))
    params = own.params | _mixed(apply, x)
    buffers = own.buffers | mix_buffers(apply, held, own.buffers, pooled)
    momentum, groups = dict(own.momentum), dict[str, list[str]]()
    for name in own.momentum:
        if rules.due("momentum", name, number):
            groups.setdefault(state_of(name), []).append(name)
    for state, names in groups.items():
        rows = Rows(
            mix=partial(_mixed, apply, {name: after.momentum[name] for name in names if name in after.momentum}),
            own={name: own.momentum[name] for name in names},
            u_before={name: before.momentum[name] for name in names},
            x_before=before.params,
            x_mixed=params,
            lr=lr,
            beta=beta,
        )
        momentum |= MOMENTUM_POLICIES[rules.of(state).policy].exchange(rows)
    return ClientState(params, momentum, buffers)


def _x_of(state: ClientState) -> tuple[tuple[str, Tree], ...]:
    return ("params", state.params), ("buffers", state.buffers)


class Blocks:
    """`Block` of each W of a topology, made once."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Mixing, Block]] = {}

    def of(self, mixing: Mixing) -> Block:
        found = self._made.get(id(mixing))
        if found is None:
            found = self._made[id(mixing)] = (mixing, Block(mixing))  # held, so that its id stays its own
        return found[1]


def spread(rows: Tree, counts: Callable[[str], bool] = lambda name: True) -> float:
    """(1/N) Σ ‖row_i − mean‖² over clients, all tensors together whose name `counts`."""
    total = 0.0
    for name, value in rows.items():
        if not counts(name):
            continue
        away = value - value.mean(0)
        total += float(torch.linalg.vector_norm(away, dtype=torch.float64)) ** 2
    return total / max(1, len(next(iter(rows.values()), torch.empty(1))))
