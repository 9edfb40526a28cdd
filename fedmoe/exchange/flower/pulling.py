"""Asking Flower for replies without waiting on one that is still being uploaded.

A reply is there for Flower once its client has announced it, and whoever pulls it then waits for
its content: for minutes, where the client was killed in the middle of it.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

PATIENCE_S = 5.0  # with a pull, before others go on beside it
BESIDE = 2  # slow pulls at most, each with what it has of a reply in memory; others then wait


@dataclass(eq=False)
class _Pull:
    """One request, in a thread that nobody waits for at the end."""

    grid: Grid
    ids: Sequence[str]
    done: threading.Event = field(default_factory=threading.Event)
    messages: list[Message] = field(default_factory=list)
    error: BaseException | None = None

    def begin(self) -> None:
        threading.Thread(target=self._run, name="pull", daemon=True).start()

    def _run(self) -> None:
        try:
            self.messages = list(self.grid.pull_messages(self.ids))
        except BaseException as why:  # it is raised where the messages are wanted
            self.error = why
        self.done.set()

    def take(self) -> list[Message]:
        if self.error is not None:
            raise self.error
        return self.messages


@dataclass
class Puller:
    """Pulls one thing at a time for as long as that is quick; the slow ones go on beside."""

    grid: Grid
    patience_s: float = PATIENCE_S
    slow: list[_Pull] = field(default_factory=list)

    @property
    def busy(self) -> frozenset[str]:
        """Messages whose replies are being pulled: there is no use in asking for these."""
        return frozenset(i for pull in self.slow for i in pull.ids)

    def pull(self, ids: Sequence[str]) -> list[Message]:
        """What has come of these; nothing yet where that is slow, or too many others are."""
        if len(self.slow) >= BESIDE:
            return []
        pull = _Pull(self.grid, ids)
        pull.begin()
        if pull.done.wait(self.patience_s):
            return pull.take()
        self.slow.append(pull)
        return []

    def finished(self) -> list[Message]:
        """What has come of those that were slow."""
        ready = [p for p in self.slow if p.done.is_set()]
        self.slow = [p for p in self.slow if p not in ready]
        return [message for p in ready for message in p.take()]
