"""A Flower Grid in this process: calls the ClientApp on push, and can lose, break or reorder what comes back."""

import random
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedmom.config.keys import KEYS
from fedmom.config.load import flat, load
from fedmom.flower.private import identify, set_message_id


def run_config(changes: Mapping) -> dict:
    """What Flower would hand to the apps: every key, flat."""
    assert set(changes) <= set(KEYS)
    return flat(load(changes).config)


class LocalGrid(Grid):
    """P nodes with one ClientApp. `fault(message, node_config)`: "lose", an Exception, or a changer of replies."""

    num_workers = 1

    def __init__(
        self,
        app: Callable[[Message, Context], Message],
        num_nodes: int,
        config: Mapping,
        *,
        fault: Callable | None = None,
        shuffle: bool = True,
        shares_memory: bool = False,
    ) -> None:
        self.app, self.fault, self.shares_memory = app, fault, shares_memory
        self.ids = random.Random(num_nodes).sample(range(1, 10**9), num_nodes)  # in no order
        self.contexts = {
            node_id: Context(1, node_id, {"partition-id": p, "num-partitions": num_nodes}, RecordDict(), dict(config))
            for p, node_id in enumerate(self.ids)
        }
        self.rng = random.Random(0) if shuffle else None
        self.replies: dict[str, Message] = {}
        self.pushed: list[Message] = []
        self.in_flight, self.most_in_flight = 0, 0
        identify(1, 0, 1)

    @property
    def run(self):
        raise NotImplementedError

    def set_run(self, run) -> None:
        raise NotImplementedError

    def create_message(self, *args, **kwargs) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return set(self.ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = f"m{len(self.pushed)}"
            set_message_id(message, message_id)
            self.pushed.append(message)
            ids.append(message_id)
            self.in_flight += 1
            reply = self._answer(message)
            if reply is not None:
                self.replies[message_id] = reply
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return ids

    def _answer(self, message: Message) -> Message | None:
        node_id = message.metadata.dst_node_id
        fault = self.fault(message, self.contexts[node_id].node_config) if self.fault else None
        if fault == "lose":
            return None
        try:
            if isinstance(fault, Exception):
                raise fault
            reply = self.app(message, self.contexts[node_id])
        except Exception as error:
            return Message(Error(2, f"Traceback …\n{type(error).__name__}: {error}"), reply_to=message)
        return fault(reply) if callable(fault) else reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        there = [message_id for message_id in message_ids if message_id in self.replies]
        if self.rng:
            self.rng.shuffle(there)
            there = there[: max(1, len(there) // 2)]  # some come later
        self.in_flight -= len(there)
        return [self.replies.pop(message_id) for message_id in there]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        ids = list(self.push_messages(messages))
        shuffle, self.rng = self.rng, None
        replies = list(self.pull_messages(ids))
        self.rng = shuffle
        return replies

    def wait(self, timeout: float, message_ids: Iterable[str]) -> None:
        """Nothing more will come by waiting, but for deadlines."""
        import time

        time.sleep(min(timeout, 0.01))
