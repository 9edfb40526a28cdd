"""Nodes on Ray's actors: each node always on the same one, many messages to a call.

An actor does its calls one after another. Where it dies, another takes its place, finds what the
nodes kept (`journal`), and does again what was not answered: of the call that was under way, one
message at a time, so that one that takes its process down is found out and given up alone.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
from flwr.app import Metadata, RecordDict
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from fedmoe.exchange.actors import Actors, ActorsError
from fedmoe.exchange.grid.copies import made_of
from fedmoe.exchange.grid.freight import Store, Stored, packed, unpacked
from fedmoe.exchange.grid.home import (
    CRASHED,
    FIRST_NODE,
    UNKNOWN,
    Answer,
    App,
    Census,
    Home,
    Order,
    failure,
)
from fedmoe.exchange.grid.journal import Journal
from fedmoe.exchange.ray.cluster import connected, resources

CALL_S = 0.1  # that a call should take
FIRST_CALL, MOST_A_CALL = 4, 64  # messages in one
MOST_DEATHS = 2  # of actors under one message alone, before it is given up
START_S = 300.0  # that Ray may take to start an actor
FATE_S = 60.0  # for what became of a dead actor's calls
# From before anything is imported there: one thread, and the C library keeps freed memory, as the
# next client wants as much.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}


class Place:
    """What an actor is: a home to some nodes."""

    def start(self, app: bytes, census: bytes, folder: str) -> None:
        found_app, found_census = (ray.cloudpickle.loads(x) for x in (app, census))
        self._home = Home(found_app, found_census, Journal(Path(folder)))
        self._values: dict[int, bytes] = {}
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)

    def work(
        self, post: bytes, only: Sequence[int], refs: Mapping[int, Any], settled: int
    ) -> tuple[float, bytes, list[np.ndarray]]:
        """Have some orders of a packed list done; seconds, answers, and their large values."""
        before = time.perf_counter()
        self._fetch(refs)
        orders: list[Order] = unpacked(post, self._values.__getitem__)
        assert self._home.journal is not None
        self._home.journal.settled = settled
        answers = [self._home.work(orders[i]) for i in only]
        known = {id(value): key for key, value in self._values.items()}
        large: list[np.ndarray] = []
        keys: dict[int, int] = {}

        def key_of(value: bytes) -> Hashable:
            # What a client sends back as it got it goes by its name alone.
            if (key := known.get(id(value))) is not None:
                return True, key
            if id(value) not in keys:
                keys[id(value)] = len(large)
                large.append(np.frombuffer(value, np.uint8))  # Ray copies it, pickle does not
            return False, keys[id(value)]

        head = packed(answers, key_of)
        return time.perf_counter() - before, head, large

    def _fetch(self, refs: Mapping[int, Any]) -> None:
        """Keep the values of this call, and no others."""
        missing = [key for key in refs if key not in self._values]
        values = dict(zip(missing, ray.get([refs[key] for key in missing]), strict=True))
        self._values = {key: values.get(key) or self._values[key] for key in refs}


@dataclass(frozen=True)
class Call:
    """Some of the orders of a packed list, as one actor was given them."""

    actor: int
    asked: tuple[tuple[int, Metadata], ...]  # number and metadata of each order of the list
    only: tuple[int, ...]
    post: bytes
    values: Mapping[int, Stored[Any]]
    deaths: int = 0  # of actors under this one
    suspect: bool = False  # an actor failed when this was before it: none other must be with it

    @property
    def numbers(self) -> list[int]:
        return [self.asked[i][0] for i in self.only]


class OnRay:
    """An engine that does the work of `Inline` on actors."""

    def __init__(self, app: App, census: Census, actors: Actors, states: Path | None) -> None:
        self._actors = actors
        self._places: list[Any] = []
        self._calls: dict[Any, Call] = {}  # by the reference of what they return; in order
        self._open: list[set[int]] = [set() for _ in range(actors.count)]
        self._held: list[deque[Call]] = [deque() for _ in range(actors.count)]  # not sent yet
        self._pace_s: float | None = None  # of a message, lately
        self._ends = ExitStack()
        cargo = [_pickled("client_app", app), _pickled("node_config", census)]
        with ExitStack() as ends:
            if states is not None:
                states.mkdir(parents=True, exist_ok=True)
            folder = TemporaryDirectory(prefix="fedmoe-grid-", dir=states)
            self._folder = Path(ends.enter_context(folder))
            ends.enter_context(connected(actors))
            ends.callback(self._end)
            self._cargo = [ray.put(thing) for thing in cargo]
            self._store: Store[Any] = Store(ray.put)
            started = [self._new(i) for i in range(actors.count)]
            self._places = [place for place, _ in started]
            self._await([ready for _, ready in started])
            self._ends = ends.pop_all()

    # What a grid asks of an engine

    def push(self, orders: Sequence[Order]) -> None:
        """Pickle them, as they are now, and hand all of them to Ray."""
        shares: list[list[Order]] = [[] for _ in self._places]
        for order in orders:
            node = order.message.metadata.dst_node_id
            shares[(node - FIRST_NODE) % len(shares)].append(order)
        longest = max(map(len, shares))
        size = self._size(longest)
        for start in range(0, longest, size):  # every actor has its first call early
            for actor, share in enumerate(shares):
                if part := share[start : start + size]:
                    self._submit(self._call(actor, part))
        self._store.turn_over()

    def answers(self, wanted: Set[int], until: float, *, wait: bool) -> list[Answer]:
        if not self._calls:
            return []
        refs = list(self._calls)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        left_s = until - time.monotonic()
        if not ready and wait and left_s > 0:
            ready, _ = ray.wait(refs, num_returns=1, timeout=left_s)
        found: list[Answer] = []
        for ref in ready:
            if call := self._calls.pop(ref, None):
                try:
                    result = ray.get(ref)
                except RayError as why:
                    found += self._replace(call, why)
                else:
                    found += self._done(call, result)
        return found

    def close(self) -> None:
        self._ends.close()

    # How it does that

    def _end(self) -> None:
        self._calls.clear()
        for held in self._held:
            held.clear()
        for place in self._places:
            ray.kill(place)

    def _new(self, actor: int) -> tuple[Any, Any]:
        """An actor, and what is there when it has started."""
        made: Any = ray.remote(Place).options(
            num_cpus=self._actors.cpus,
            num_gpus=self._actors.gpus,
            max_restarts=0,  # by us, who know what has to be done again
            runtime_env={"env_vars": {**ENVIRONMENT, "PYTHONPATH": _paths()}},
        )
        place = made.remote()
        folder = str(self._folder / f"actor-{actor}")
        return place, place.start.remote(*self._cargo, folder)

    def _await(self, started: Sequence[Any]) -> None:
        try:
            ray.get(list(started), timeout=START_S)
        except GetTimeoutError:
            raise ActorsError(
                f"{self._actors.count} actors did not start within {START_S:.0f} s: each takes "
                f"{self._actors.cpus:g} CPUs and {self._actors.gpus:g} GPUs, and Ray has free "
                f"{resources()}"
            ) from None
        except RayError as why:
            said = str(why).strip().splitlines()[-1]
            raise ActorsError(f"an actor cannot take the ClientApp in: {said}") from why

    def _size(self, share: int) -> int:
        """How many messages make a call: as many as take CALL_S, and two calls at least."""
        size = FIRST_CALL if self._pace_s is None else int(CALL_S / max(self._pace_s, 1e-9))
        return max(1, min(size, MOST_A_CALL, -(-share // 2)))

    def _call(self, actor: int, orders: Sequence[Order]) -> Call:
        keys: dict[int, None] = {}

        def key_of(value: bytes) -> int:
            key = self._store.key_of(value)
            keys[key] = None
            return key

        post = packed(list(orders), key_of)
        values = {key: self._store[key] for key in keys}
        asked = tuple((o.number, o.message.metadata) for o in orders)
        return Call(actor, asked, tuple(range(len(asked))), post, values)

    def _submit(self, call: Call) -> None:
        self._open[call.actor].update(call.numbers)
        self._held[call.actor].append(call)
        self._send(call.actor)

    def _send(self, actor: int) -> None:
        """Give an actor its next calls: all of them, but a suspect by itself, so that nobody else
        is blamed if it takes the actor down.
        """
        held = self._held[actor]
        there = [call for call in self._calls.values() if call.actor == actor]
        while held and not (there and (held[0].suspect or there[-1].suspect)):
            call = held.popleft()
            settled = min(self._open[actor]) - 1
            refs = {key: stored.ref for key, stored in call.values.items()}
            work = self._places[actor].work
            self._calls[work.remote(call.post, call.only, refs, settled)] = call
            there.append(call)

    def _done(self, call: Call, result: tuple[float, bytes, list[np.ndarray]]) -> list[Answer]:
        seconds, head, large = result
        pace_s = seconds / len(call.only)
        self._pace_s = pace_s if self._pace_s is None else (self._pace_s + pace_s) / 2
        values: dict[int, bytes] = {}

        def value_of(key: tuple[bool, int]) -> bytes:
            known, number = key
            if known:
                return call.values[number].data
            if number not in values:
                values[number] = large[number].tobytes()
            return values[number]

        answers: list[Answer] = unpacked(head, value_of)
        self._open[call.actor].difference_update(a.number for a in answers)
        self._send(call.actor)
        return answers

    def _replace(self, call: Call, why: RayError) -> list[Answer]:
        """Put another actor in the place of one that failed, and have its calls done there.

        One that is alive after a call failed goes too: what it had done of that call would count
        twice if it was done again there.
        """
        actor = call.actor
        ray.kill(self._places[actor])
        later, self._held[actor] = self._held[actor], deque()
        found, lost = [], [call]
        for ref, other in [(r, c) for r, c in self._calls.items() if c.actor == actor]:
            del self._calls[ref]
            try:
                result = ray.get(ref, timeout=FATE_S)
            except RayError:
                lost.append(other)
            else:
                found += self._done(other, result)
        self._places[actor], ready = self._new(actor)
        self._await([ready])
        first, *others = sorted(lost, key=lambda c: c.numbers[0])
        given_up, again = self._again(first, why)  # that one was under way, as far as is known
        self._held[actor].extend(sorted((*again, *others, *later), key=lambda c: c.numbers[0]))
        self._send(actor)
        return found + given_up

    def _again(self, call: Call, why: RayError) -> tuple[list[Answer], list[Call]]:
        """What is given up of a call that failed, and what is to be done once more of it: each
        message by itself.
        """
        if call.suspect and call.deaths + 1 >= MOST_DEATHS:
            number, metadata = call.asked[call.only[0]]
            self._open[call.actor].discard(number)
            code = CRASHED if isinstance(why, RayActorError) else UNKNOWN
            said = f"{type(why)}:<'{why}'>"
            asked = made_of(metadata, RecordDict())
            return [Answer(number, failure(asked, code, said), said)], []
        deaths = call.deaths + 1 if call.suspect else 0
        return [], [replace(call, only=(i,), deaths=deaths, suspect=True) for i in call.only]


def _paths() -> str:
    """Where this process finds modules: the apps' are there, and perhaps nowhere else."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _pickled(name: str, thing: object) -> bytes:
    """By value where it cannot be imported, as Ray does it."""
    dumps: Any = ray.cloudpickle.dumps
    try:
        pickled: bytes = dumps(thing)
    except Exception as why:  # whatever an object's own way of being pickled raises
        raise ValueError(f"{name} must be picklable to go to actors: {why}") from why
    return pickled
