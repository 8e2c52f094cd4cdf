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
        # [N, ...] the rows that the server knows, after a round: a checkpoint's.
        self._known: tuple[int, Tree] = 0, {}
        self._to_give: set[int] = set()  # clients whose nodes have not got theirs yet
        self._doubted: set[int] = set()  # clients that did not answer last time: their nodes may have started anew

    def begin_at(self, done: RunState) -> None:
        """Told once: where a run begins or goes on. Of a checkpoint every client's row is the server's to give."""
        if not done.round:
            return
        self.since[:] = done.round
        own = {} if done.own is None else flatten(done.own)
        states = {STATES + name: rows for name, rows in (done.client_correction or {}).items()}
        self._known = done.round, {**own, **states}
        self._to_give = set(range(self.num_clients))

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
        """{client: its row as the server knows it}, of those whose node cannot have it, or perhaps has it no more."""
        some = sorted((self._to_give | {c for c in self._doubted if self.since[c]}).intersection(clients))
        return {client: self._row(client, round_index) for client in some}

    def answered(self, clients: Iterable[int], number: int) -> None:
        """These clients' updates are in the means of round 1, 2, …"""
        for client in clients:
            self.since[client] = number
            self._to_give.discard(client)
            self._doubted.discard(client)

    def silent(self, clients: Iterable[int]) -> None:
        """These clients were asked, and are not in the means."""
        self._doubted |= {*clients}

    def restored(self, clients: Iterable[int]) -> list[int]:
        """Of clients that began with the row they were given those that should have had a newer one."""
        return [client for client in clients if client not in self._to_give]

    def there(self) -> np.ndarray:
        """[N] the round of the row that every client's node has now; 0: none that the server has not.

        A copy: what is brought later, when another round has begun, must be of this one.
        """
        found = self.since.copy()
        found[[*self._to_give]] = 0
        return found

    @property
    def known_round(self) -> int:
        return self._known[0]

    def trained_in(self, clients: Iterable[int], number: int) -> bool:
        """Whether any of these took part in round 1, 2, … in this process."""
        return any(self.since[client] == number and client not in self._to_give for client in clients)

    def counts(self, since: int, number: int) -> bool:
        """Whether a row of round `since` says anything after round 1, 2, …: not all agreed on it later."""
        newer = any(since > self.turns.agreed(flat, number) for flat in self.turns.own(number))
        return since > 0 and (newer or bool(self.turns.states))

    def rows(self, number: int, there: np.ndarray, brought: Callable[[int], Tree | None]) -> tuple[Tree, Tree]:
        """([N, ...] what clients have of their own after round 1, 2, …, their states of a correction [N, ...]).

        there: as nodes had them then; brought: a client's row, of one whose node has it; None where it did not come:
        then the last known one.
        """
        form, turns = self.turns.own(number), self.turns
        own = {flat: torch.empty(rows.shape, dtype=rows.dtype) for flat, rows in form.items()}
        states = {name: torch.empty(self.num_clients, *v.shape, dtype=v.dtype) for name, v in turns.states.items()}
        for client in range(self.num_clients):
            since = int(there[client])
            held = since > 0
            row = (brought(client) if held else None) or self._row(client, number)
            for flat in own:
                newer = not held or since > turns.agreed(flat, number)
                own[flat][client] = row[flat] if newer and flat in row else self._common(flat, client)
            for name in states:
                states[name][client] = row[STATES + name]
        self._known = number, {**own, **{STATES + name: rows for name, rows in states.items()}}
        return own, states

    def _row(self, client: int, number: int) -> Tree:
        """A client's row after round 1, 2, …, of what the server knows."""
        since, known = self._known
        row = {}
        for flat in self.turns.own(number):
            newer = since > self.turns.agreed(flat, number)
            row[flat] = known[flat][client] if newer else self._common(flat, client)
        for name, value in self.turns.states.items():
            row[STATES + name] = known[STATES + name][client] if since else value
        return row

    def _common(self, flat: str, client: int) -> torch.Tensor:
        """What a client goes on from that has not trained since all agreed on it."""
        told = flat in self.turns.begin and self.turns.is_told(flat)
        return self.agreed[flat] if told else self.turns.first_value(flat, client)
