"""Who holds which client: node ids are random, so the server asks, once."""

import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedmom.config.numbers import counted
from fedmom.errors import InputError

from .dispatch import OVERDUE, Exchange, anew, exchange

_QUERY_WINDOW = 256
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_ASK_AGAIN = 60.0  # longer than an app's cold start; a node may lose a message, or sit on its reply
# The ClientApp cannot be loaded, raised, or a mod refused: waiting for other nodes would not help.
_ITS_OWN_FAULT = (ErrorCode.LOAD_CLIENT_APP_EXCEPTION, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.INVALID_FAB)


class Holder(NamedTuple):
    """One node and the clients it holds."""

    node_id: int
    clients: tuple[int, ...]  # ascending
    about: Mapping[str, Any] = MappingProxyType({})  # what else it answered


def learn_holders(
    grid: Grid,
    num_clients: int,
    *,
    wait_seconds: float,
    ask_again_after: float = _SECONDS_TO_ASK_AGAIN,
    question: dict[str, Any] | None = None,
) -> list[Holder]:
    """Every client's node, in the order of clients; waits until all of 0 … N − 1 are there.

    A node that is connected and does not answer is asked again after every `ask_again_after` seconds.

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
            if done.code in _ITS_OWN_FAULT or not done.failure:
                raise InputError(reasons[-1])
        owner: dict[int, int] = {}
        for node_id, clients in found.items():
            for client in clients:
                if client in owner:
                    raise InputError(
                        f"client {client}: nodes {owner[client]} and {node_id} both hold it; every node needs a "
                        "partition-id of its own and the same num-partitions"
                    )
                owner[client] = node_id
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
