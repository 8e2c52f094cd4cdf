"""All clients behind a Grid: who holds which (node ids are random, so the server asks, once), and what happens when one
fails: a policy, never silence.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from types import MappingProxyType
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedmom.backends.at_nodes.node import LOST
from fedmom.config.names import ON_FAILURE
from fedmom.config.numbers import counted
from fedmom.errors import ClientsFailedError, InputError, RayEndedError, unknown
from fedmom.flower.private import error_codes, log

from .dispatch import OVERDUE, Exchange, anew, exchange
from .replies import CONFIG

_QUERY_WINDOW = 256
_SECONDS_BETWEEN_LOOKS = 1.0
_RETRIES_OF_THE_LOST = 2  # what a node has not kept may be on its way from the app before; else it never comes
_SECONDS_TO_ASK_AGAIN = 60.0  # longer than an app's cold start; a node may lose a message, or sit on its reply
_CODES = error_codes()
# The ClientApp cannot be loaded, raised, or a mod refused: waiting for other nodes would not help.
_ITS_OWN_FAULT = (_CODES.LOAD_CLIENT_APP_EXCEPTION, _CODES.CLIENT_APP_RAISED_EXCEPTION, _CODES.INVALID_FAB)
_WINDOW_BYTES = 48 << 20  # per worker: its two batches of at most 16 MB, and replies that wait for their turn
_LARGEST_WINDOW = 1024  # messages

# (the clients that were asked for, a reply) -> what the caller makes of it; ValueError with the reason to refuse it
Accept = Callable[[Sequence[int], Message], Any]


class Holder(NamedTuple):
    """One node and the clients it holds."""

    node_id: int
    clients: tuple[int, ...]  # ascending
    about: Mapping[str, Any] = MappingProxyType({})  # what else it answered


@dataclass
class Fleet:
    """All clients behind a Grid: who holds which, how to exchange messages with them, and what a failure means.

    on_failure: "stop" (ClientsFailedError names the client), "retry" (`retries` times, then stop) or "proceed" (without
    it, if at least `min_clients` answer). An error, a missing reply and a refused update all are failures.
    """

    num_clients: int
    on_failure: str = "stop"
    min_clients: int = 1
    retries: int = 2
    window: int = 0
    wait_seconds: float = 600.0
    holders: list[Holder] = field(default_factory=list)
    _held: dict[int, tuple[int, ...]] = field(default_factory=dict)  # {node: its clients}, also of nodes now gone

    def __post_init__(self) -> None:
        if self.on_failure not in ON_FAILURE:
            raise unknown("on_failure", self.on_failure, ON_FAILURE)

    def learn(self, grid: Grid, question: dict[str, Any] | None = None, *, patient: bool = False) -> None:
        """Find out which node holds which clients, and what it answers to a question besides."""
        wait = self.wait_seconds
        self.use(learn_holders(grid, self.num_clients, wait_seconds=wait, question=question, patient=patient))

    def use(self, holders: Iterable[Holder]) -> None:
        """These nodes hold the clients from now on."""
        self.holders = list(holders)
        self._held |= {holder.node_id: holder.clients for holder in self.holders}

    def asked_of(self, message: Message) -> list[int]:
        """The clients that a message is for: those it names, else all that its node holds, or held when it was sent."""
        named: Any = message.content.config_records.get(CONFIG, ConfigRecord()).get("clients", [])
        return list(named) or list(self._held.get(message.metadata.dst_node_id, ()))

    def exchange(
        self,
        grid: Grid,
        server_round: int,
        messages: Iterable[Message],
        arrays: ArrayRecord,
        *,
        timeout: float = 0.0,
        accept: Accept = lambda clients, reply: reply,
    ) -> Iterator[Any]:
        """What `accept` made of the replies, in the order of `messages`, without the failures that policy lets pass."""
        size = sum(len(array.data) for array in arrays.values())
        workers = getattr(grid, "num_workers", 4)
        window = self.window or max(4 * workers, workers * _WINDOW_BYTES // max(1, size))
        done = exchange(
            grid,
            messages,
            window=min(window, _LARGEST_WINDOW),
            timeout=timeout,
            accept=lambda message, reply: accept(self.asked_of(message), reply),
            again=lambda failed: self._again(grid, server_round, failed),
        )
        try:
            yield from (one.answer for one in done if one.answer is not None)
        except RayEndedError as error:
            raise ClientsFailedError(f"round {server_round}: {error}") from None

    def answered(
        self,
        server_round: int,
        asked: Mapping[int, Sequence[int]] | None,
        replies: Iterable[Message],
        accept: Accept = lambda clients, reply: reply,
    ) -> Iterator[Any]:
        """What `accept` made of replies that somebody else collected; `asked`: {node: the clients it was asked for}.

        An error, a refused update, a node that did not answer and one that answers unasked or twice stop the run unless
        the policy is "proceed": there is no asking again from here. asked None: what was missing has been met before.
        """
        missing = dict(asked or {})
        for reply in replies:
            node_id = reply.metadata.src_node_id
            if asked is not None and node_id not in missing:
                self._without(_named(server_round, node_id, [], "its reply answers nothing that it was asked"))
                continue
            clients = missing.pop(node_id, [])
            if reply.has_error():
                self._without(_named(server_round, node_id, clients, reply.error.reason or f"error {reply.error.code}"))
                continue
            try:
                answer = accept(clients, reply)
            except ValueError as error:
                self._without(_named(server_round, node_id, clients, str(error)))
                continue
            yield answer
        for node_id, clients in missing.items():
            self._without(_named(server_round, node_id, clients, "no reply"))

    def _without(self, reason: str) -> None:
        """Go on without a client if the policy is "proceed"; else ClientsFailedError."""
        if self.on_failure != "proceed":
            raise ClientsFailedError(reason)
        log(WARNING, "%s; the round goes on without", reason)

    def enough(self, server_round: int, answered: int) -> None:
        """Raises ClientsFailedError where too few clients answered for a round."""
        if answered < self.min_clients:
            raise ClientsFailedError(
                f"round {server_round}: {counted(answered, 'client')} answered, server.min-clients = {self.min_clients}"
            )

    def _again(self, grid: Grid, server_round: int, failed: Exchange) -> Message | None:
        """A message for another try, None to go on without; raises ClientsFailedError where the run must stop."""
        node_id, clients = failed.message.metadata.dst_node_id, self.asked_of(failed.message)
        reason = _named(server_round, node_id, clients, failed.failure)
        if self.on_failure == "proceed":
            self._without(reason)
            return None
        retries = min(self.retries, _RETRIES_OF_THE_LOST) if LOST in failed.failure else self.retries
        if self.on_failure == "stop" or failed.tries > retries:
            raise ClientsFailedError(reason + (f" ({failed.tries} tries)" if failed.tries > 1 else ""))
        log(WARNING, "%s; try %d of %d", reason, failed.tries + 1, retries + 1)
        if node_id not in set(grid.get_node_ids()):  # it may be back under another id
            return anew(failed.message, self._found_again(grid, reason, clients))
        return anew(failed.message, node_id)

    def _found_again(self, grid: Grid, reason: str, clients: Sequence[int]) -> int:
        """The node that holds these clients now. In mid-run it is no bad input that there is none."""
        try:
            self.learn(grid, patient=True)
        except InputError as error:
            raise ClientsFailedError(f"{reason}; it did not come back: {error}") from None
        for holder in self.holders:
            if set(clients) <= set(holder.clients):
                return holder.node_id
        raise ClientsFailedError(f"{reason}; it came back, but no node holds all of its clients any more")


def _named(server_round: int, node_id: int, clients: Sequence[int], reason: str) -> str:
    """One line on a failure: the round, the clients and what happened."""
    some = ", ".join(map(str, clients[:5])) + (f", … ({len(clients)} clients)" if len(clients) > 5 else "")
    who = f"client{'s' * (len(clients) > 1)} {some}, " if clients else ""
    return f"round {server_round}: {who}node {node_id}: {' '.join(reason.split())}"


def learn_holders(
    grid: Grid,
    num_clients: int,
    *,
    wait_seconds: float,
    ask_again_after: float = _SECONDS_TO_ASK_AGAIN,
    question: dict[str, Any] | None = None,
    patient: bool = False,
) -> list[Holder]:
    """Every client's node, in the order of clients; waits until all of 0 … N − 1 are there.

    A node that is connected and does not answer is asked again after every `ask_again_after` seconds. One whose app
    fails is bad input before the first round; in mid-run (`patient`) it has worked, and may work again: a full disk.

    Raises InputError naming the first client that no node, or more than one node, holds.
    """
    begin, found, about = time.monotonic(), dict[int, tuple[int, ...]](), dict[int, dict[str, Any]]()
    told = begin
    while True:
        connected = set(grid.get_node_ids())
        found = {node: clients for node, clients in found.items() if node in connected}
        reasons = []
        # A node that never answers must not take longer than all may.
        deadline = max(time.monotonic() + 1.0, begin + wait_seconds)
        new = sorted(connected - set(found))
        for node_id, answer, done in ask(grid, new, question or {}, timeout=ask_again_after, deadline=deadline):
            if answer is not None:
                found[node_id], about[node_id] = tuple(sorted(answer["clients"])), dict(answer)
                continue
            reasons.append(f"node {node_id}: {done.failure or 'it answered without its clients'}")
            if not patient and (done.code in _ITS_OWN_FAULT or not done.failure):
                raise InputError(reasons[-1])
        owner = _owners(found)
        missing = [client for client in range(num_clients) if client not in owner]
        if not missing:
            beyond = [client for client in owner if client >= num_clients]
            if beyond:
                raise InputError(f"client {beyond[0]}: data.num-clients = {num_clients}")
            holders = (Holder(node_id, held, about[node_id]) for node_id, held in found.items() if held)
            return sorted(holders, key=lambda holder: holder.clients)
        if time.monotonic() - begin > wait_seconds:
            why = f" ({reasons[0]})" if reasons else ""
            raise InputError(
                f"server.wait-seconds = {wait_seconds:g}: no node holds client {missing[0]} ({len(missing)} of "
                f"{counted(num_clients, 'client')} missing, {counted(len(connected), 'node')} connected){why}"
            )
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"waiting for nodes: {num_clients - len(missing)} of {num_clients} clients are there", flush=True)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _owners(held: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """{client: its node} of {node: its clients}; InputError names the first client that two nodes hold."""
    owner: dict[int, int] = {}
    for node_id, clients in held.items():
        for client in clients:
            if client in owner:
                raise InputError(
                    f"client {client}: nodes {owner[client]} and {node_id} both hold it; every node needs a "
                    "partition-id of its own and the same num-partitions"
                )
            owner[client] = node_id
    return owner


def ask(
    grid: Grid, node_ids: Iterable[int], question: dict[str, Any], *, timeout: float = 0.0, deadline: float = 0.0
) -> Iterable[tuple]:
    """(node id, its answer or None, the exchange) for one query to each node.

    Who does not answer within `timeout` seconds is asked again until `deadline`, on time.monotonic()'s clock.
    """

    def again(failed: Exchange) -> Message | None:
        node_id = failed.message.metadata.dst_node_id
        late = failed.failure == OVERDUE and time.monotonic() < deadline and node_id in set(grid.get_node_ids())
        return anew(failed.message, node_id) if late else None

    if deadline:
        timeout = min(timeout, deadline - time.monotonic())
    content = RecordDict({"config": ConfigRecord(question)})
    messages = [Message(content, message_type=MessageType.QUERY, dst_node_id=node_id) for node_id in node_ids]
    for done in exchange(grid, messages, window=_QUERY_WINDOW, timeout=timeout, again=again):
        answer = None if done.answer is None else done.answer.content.config_records.get("config")
        yield done.message.metadata.dst_node_id, answer, done
