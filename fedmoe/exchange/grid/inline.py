"""Nodes in this process, one after another, each when its reply is asked for."""

import time
from collections import deque
from collections.abc import Sequence, Set

from flwr.app import RecordDict

from fedmoe.exchange.grid.copies import copied, copy_of
from fedmoe.exchange.grid.draws import Apart
from fedmoe.exchange.grid.home import Answer, App, Census, Home, Order


class Inline:
    """Does what was pushed first first, so a node sees its messages in their order."""

    def __init__(self, app: App, census: Census) -> None:
        self._home = Home(app, census)
        self._orders: deque[Order] = deque()
        self._apart = Apart()

    def push(self, orders: Sequence[Order]) -> None:
        copies: dict[int, RecordDict] = {}  # strategies give all nodes one and the same content
        for order in orders:
            content = order.message.content
            if id(content) not in copies:
                copies[id(content)] = copy_of(content)
            order.message.content = copies[id(content)]
        self._orders += orders

    def answers(self, wanted: Set[int], until: float, *, wait: bool) -> list[Answer]:
        """Work until all that is wanted is done, or until a time, but for one message at least."""
        found: list[Answer] = []
        missing = set(wanted)
        with self._apart():
            while missing and self._orders:
                number, reply, trace = self._home.work(self._orders.popleft())
                missing.discard(number)
                found.append(Answer(number, reply and copied(reply), trace))
                if time.monotonic() >= until:
                    break
        return found

    def close(self) -> None:
        self._orders.clear()
