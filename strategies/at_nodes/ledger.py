"""The server's book: in which round every client trained last, and what clients agreed on since when."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from fedmom.backends.at_nodes.node import STATES
from fedmom.backends.at_nodes.turns import Turns
from fedmom.method.state import ClientState, Tree, flatten, to_device
from fedmom.rounds.plan import RunState


class Ledger:
    """What nodes hold of N clients, as far as the server knows it."""

    def __init__(self, turns: Turns, num_clients: int) -> None:
        self.turns, self.num_clients = turns, num_clients
        self.since = np.zeros(num_clients, dtype=np.int64)  # the last round that each client trained in; 0: none
        self.agreed = dict(turns.begin)  # what clients agreed on last
        self._rows: Tree = {}  # [N, ...] as a checkpoint has them, of clients whose nodes have not got theirs yet
        self._to_give: set[int] = set()

    def begin_at(self, done: RunState) -> None:
        """Told once: where a run begins or goes on. Of a checkpoint every client's row is the server's to give."""
        if not done.round:
            return
        self.since[:] = done.round
        own = {} if done.own is None else flatten(done.own)
        states = {STATES + name: rows for name, rows in (done.client_correction or {}).items()}
        self._rows, self._to_give = {**own, **states}, set(range(self.num_clients))

    def begin(self, start: ClientState, round_index: int) -> None:
        """Told as round 0, 1, … begins, with what it begins from."""
        for flat, value in flatten(to_device(start, "cpu")).items():
            if flat in self.turns.begin and self.turns.agreed(flat, round_index) == round_index:
                self.agreed[flat] = value

    def down(self, clients: Sequence[int], round_index: int) -> Tree:
        """What clients of one node must be told of what all agree on."""
        names = self.turns.down(round_index, (int(self.since[c]) for c in clients))
        return {flat: self.agreed[flat] for flat in names}

    def given(self, clients: Iterable[int], round_index: int) -> dict[int, Tree]:
        """{client: its row}, of those whose node cannot have it yet."""
        found = {}
        for client in self._to_give.intersection(clients):
            names = [
                name
                for name in self._rows
                if name.startswith(STATES) or self.since[client] > self.turns.agreed(name, round_index)
            ]
            found[client] = {name: self._rows[name][client] for name in names}
        return dict(sorted(found.items()))

    def answered(self, clients: Iterable[int], number: int) -> None:
        """These clients' updates are in the means of round 1, 2, …"""
        for client in clients:
            self.since[client] = number
            self._to_give.discard(client)

    def held(self, clients: Iterable[int]) -> list[int]:
        """Of clients of one node those that it has rows of."""
        return [client for client in clients if self.since[client] and client not in self._to_give]

    def rows(self, number: int, brought: Callable[[int], Tree]) -> tuple[Tree, Tree]:
        """([N, ...] what clients have of their own after round 1, 2, …, their states of a correction [N, ...]).

        brought: a client's row, of one whose node has it.
        """
        form, turns = self.turns.own(number), self.turns
        own = {flat: torch.empty(rows.shape, dtype=rows.dtype) for flat, rows in form.items()}
        states = {name: torch.empty(self.num_clients, *v.shape, dtype=v.dtype) for name, v in turns.states.items()}
        for client in range(self.num_clients):
            since = int(self.since[client])
            row = {} if not since else self._row(client) if client in self._to_give else brought(client)
            for flat in own:
                own[flat][client] = row[flat] if since > turns.agreed(flat, number) else self._common(flat, client)
            for name, value in turns.states.items():
                states[name][client] = row[STATES + name] if since else value
        return own, states

    def _row(self, client: int) -> Tree:
        return {name: rows[client] for name, rows in self._rows.items()}

    def _common(self, flat: str, client: int) -> torch.Tensor:
        """What a client goes on from that has not trained since all agreed on it."""
        told = flat in self.turns.begin and self.turns.is_told(flat)
        return self.agreed[flat] if told else self.turns.first_value(flat, client)
