"""What nodes keep, on disk, so that a process that dies takes nothing with it.

A file is one node's context after one message, by the message's number. Where messages are done
again, each finds the context from before it, so that none counts twice.
"""

import os
import pickle
from bisect import bisect_left, insort
from pathlib import Path
from typing import NamedTuple

from flwr.app import RecordDict, UserConfig


class Kept(NamedTuple):
    """What a node finds again in its context."""

    state: RecordDict
    config: UserConfig


class Journal:
    """The contexts of the nodes of one process, which alone writes into the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settled = -1  # no message up to this number is ever done again
        self.numbers: dict[int, list[int]] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in folder.glob("*.context"):
            node, number = map(int, path.stem.split("-"))
            insort(self.numbers.setdefault(node, []), number)

    def before(self, node: int, number: int) -> Kept | None:
        """What the node kept before a message, which is now done again, as all after it."""
        numbers = self.numbers.get(node, [])
        for later in numbers[bisect_left(numbers, number) :]:
            self._path(node, later).unlink()
            numbers.remove(later)
        if not numbers:
            return None
        kept: Kept = pickle.loads(self._path(node, numbers[-1]).read_bytes())
        return kept

    def write(self, node: int, number: int, kept: Kept) -> None:
        path = self._path(node, number)
        beside = path.with_suffix(".new")
        beside.write_bytes(pickle.dumps(kept, protocol=pickle.HIGHEST_PROTOCOL))
        os.replace(beside, path)
        numbers = self.numbers.setdefault(node, [])
        numbers.append(number)
        while len(numbers) > 1 and numbers[1] <= self.settled:
            self._path(node, numbers.pop(0)).unlink()

    def _path(self, node: int, number: int) -> Path:
        return self.folder / f"{node}-{number}.context"
