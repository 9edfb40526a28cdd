"""What runs in an actor: the work of many clients, one after another, in a process that stays."""

import os
import platform
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch

from fedmoe.data.examples import ClientData
from fedmoe.device import keep_freed_memory
from fedmoe.exchange.ray.packing import Bytes, Packed, Slip, pack, unpack
from fedmoe.federated.folding import Accept, Folded, Folding, Measure
from fedmoe.types import ClientFailure, ClientUpdate, Exchange, Terms

MARK = ".actors"  # a file in the clients' folder: who reads the same in it sees the same folder


@dataclass
class Remembered:
    """Clients' data as `load` makes them; those used last are kept, up to `max_bytes`."""

    load: Callable[[int], ClientData]
    max_bytes: int
    _kept: OrderedDict[int, tuple[int, ClientData]] = field(default_factory=OrderedDict)
    _used: int = 0

    def __call__(self, client: int) -> ClientData:
        if client not in self._kept:
            data = self.load(client)
            parts = (data.train, data.validation, data.test)
            num_bytes = sum(t.nbytes for part in parts for t in part)
            if num_bytes > self.max_bytes:
                return data
            self._kept[client] = num_bytes, data
            self._used += num_bytes
            while self._used > self.max_bytes:
                self._used -= self._kept.popitem(last=False)[1][0]
        self._kept.move_to_end(client)
        return self._kept[client][1]


class Errand(NamedTuple):
    """What a `Folding` is made of."""

    terms: Terms
    accept: Accept
    measure: Measure


@dataclass(frozen=True)
class Done:
    """What comes back of one call."""

    answers: list[ClientUpdate | ClientFailure]  # of updates only those that were not folded
    folded: Folded | None  # since it was last asked for
    seconds: float  # that the clients took


class Worker:
    """One actor. Knows of one round at a time, by its number."""

    def __init__(self, make: Packed, folder: Path | None, mark: str) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        # What comes from the object store is read-only, and nothing here writes to it.
        for what in ("buffer", "NumPy array"):
            warnings.filterwarnings("ignore", message=f"The given {what} is not writable")
        if folder is not None and not _holds(folder / MARK, mark):
            raise ValueError(
                f"{folder} must be the same folder for all actors and for the process that leads "
                f"them, and on {platform.node()} it is another: clients keep their parameters in "
                f"it, so put it on storage that all machines share"
            )
        self.exchange: Exchange = unpack(make, copy=False)()
        self.round = -1

    def pid(self) -> int:
        return os.getpid()

    def ready(self) -> Packed:
        """Answers once there is an exchange."""
        return pack(Done([], None, 0.0))

    def work(
        self,
        round: int,
        new: Mapping[int, Any],
        errand: Slip | None,
        slip: Slip,
        settle: bool,
    ) -> Packed:
        """Carry a slice of a round's assignments; returns a `Done`, packed.

        Args:
            round: counts what the exchange was called for; where it is not that of the last call,
                all that belongs to the last round goes.
            new: volumes of the object store, by number, that this actor was not told of yet.
            errand: an `Errand`, or None where updates are to come back whole; told once a round.
            settle: hand over what was folded.
        """
        if round != self.round:
            self.round, self.volumes = round, dict[int, Bytes]()
            self.errand: Errand | None = None
        for number, volume in new.items():
            self.volumes[number] = ray.get(volume)
        if errand is not None:
            self.errand = errand.read(self.volumes)
            self.folding = Folding(*self.errand)
        assignments = slip.read(self.volumes)
        began = time.perf_counter()
        answers: list[ClientUpdate | ClientFailure] = []
        for reply in self.exchange(assignments):
            if self.errand is None or isinstance(reply, ClientFailure):
                answers.append(reply)
            else:
                self.folding.add(reply, assignments[reply.client])
        folded = None
        if self.errand is not None and settle:
            folded = self.folding.done()
            self.folding = Folding(*self.errand)
        return pack(Done(answers, folded, time.perf_counter() - began))


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text
