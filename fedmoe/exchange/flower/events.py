"""What happens between server and clients, told as it happens: for logs and metrics."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Kinds: "hello" (a client has come), "left", "sent", "replied", "failed" (a client has no update
    this round), "refused" (a message or a node, by name), "retried", "missed" (a client lacks what
    it was thought to hold), "waiting".
    """

    kind: str
    round: int | None = None
    client: int | None = None
    node: int | None = None
    text: str = ""
    nbytes: int = 0  # of "sent" and "replied": what travelled


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Tell nobody."""


@dataclass
class Traffic:
    """Counts events and bytes; `take` gives the bytes since it was last called."""

    counts: Counter[str] = field(default_factory=Counter)
    down: int = 0
    up: int = 0

    def __call__(self, event: Event) -> None:
        self.counts[event.kind] += 1
        if event.kind == "sent":
            self.down += event.nbytes
        elif event.kind in ("replied", "missed"):
            self.up += event.nbytes

    def take(self) -> tuple[int, int]:
        """Bytes down and up."""
        taken = self.down, self.up
        self.down = self.up = 0
        return taken


def to_file(path: Path) -> OnEvent:
    """Append each event as a line of JSON, with the time in seconds since 1970."""

    def write(event: Event) -> None:
        said = {k: v for k, v in asdict(event).items() if v is not None and v != ""}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **said}) + "\n")

    return write


def to_all(*listeners: OnEvent) -> OnEvent:
    """Tell each in turn."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell
