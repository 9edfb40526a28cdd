"""The actors, each in its place: started, waited for, replaced when they die, ended."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from fedmoe.exchange.actors import Actors, ActorsError
from fedmoe.exchange.ray.actor import Worker
from fedmoe.exchange.ray.cluster import resources
from fedmoe.exchange.ray.packing import pack
from fedmoe.types import Exchange, Job

START_S = 300.0  # for an actor to start, however busy the machines are
LOOK_S = 5.0  # between looks at those that are starting
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# An actor that is gone, or a result that went with the machine it lay on.
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.WorkerCrashedError,
)


@dataclass(frozen=True)
class Call:
    """What an actor was asked for, and has not answered yet."""

    result: Any
    clients: tuple[int, ...]
    settle: bool  # what it has folded is to come back with it


@dataclass
class Seat:
    """A place for an actor, and what it has to do; when the actor dies another takes it."""

    number: int
    actor: Any = None
    started: float | None = None  # when; None: it is ready
    calls: deque[Call] = field(default_factory=deque)  # in the order in which it does them
    todo: deque[int] = field(default_factory=deque)  # clients that are in no call yet
    folded: list[int] = field(default_factory=list)  # clients whose work it has, and we have not
    failures: list[Any] = field(default_factory=list)  # among them, of which nobody knows yet
    folding_s: float = 0.0  # that their work took
    told: set[int | str] = field(default_factory=set)  # what it knows of this round

    @property
    def unsettled(self) -> bool:
        """Whether it has folded, or will have, what it was not yet asked to hand over."""
        return not self.calls[-1].settle if self.calls else bool(self.folded)

    def forget(self) -> None:
        """Whatever it was to do, and has done that nobody was told of."""
        self.calls.clear()
        self.todo.clear()
        self.reckon()
        self.told.clear()

    def reckon(self) -> None:
        """All that it has folded has come back."""
        self.folded, self.failures, self.folding_s = [], [], 0.0


class Crew:
    """As many actors as asked for, for as long as it is; see `exchange.over_actors`.

    Raises:
        ActorsError: an actor does not start.
    """

    def __init__(
        self, make: Callable[[], Exchange], actors: Actors, folder: Path | None, mark: str
    ) -> None:
        self.actors = actors
        self.seats = [Seat(number) for number in range(actors.count)]
        self.moved: dict[int, int] = {}  # clients that have another seat than at first
        self.pace: dict[Job, float] = {}  # seconds that a client took, last
        kind = ray.remote(Worker).options(
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            max_restarts=0,  # by us, who know what has to be done again
            runtime_env={"env_vars": ONE_THREAD},
        )
        packed = ray.put(pack(make))
        self._new: Callable[[], Any] = lambda: kind.remote(packed, folder, mark)
        try:
            for seat in self.seats:
                self.fill(seat)
            for seat in self.seats:
                while seat.calls:
                    self.first_of([seat])
                    self._answered(seat)
        except BaseException:
            self.close()
            raise

    def seat_of(self, client: int) -> Seat:
        """Where this client's data are, if they are anywhere."""
        return self.seats[self.moved.get(client, client % len(self.seats))]

    def fill(self, seat: Seat) -> None:
        """Put a new actor into a seat; the call that tells that it is ready comes first."""
        if seat.actor is not None:
            ray.kill(seat.actor)  # it may be alive, and only out of reach
        seat.actor, seat.started = self._new(), time.monotonic()
        seat.told.clear()
        seat.calls = deque([Call(seat.actor.ready.remote(), (), True)])

    def first_of(self, seats: list[Seat]) -> Seat:
        """Wait for the first of these whose oldest call has ended, one way or another.

        Raises:
            ActorsError: an actor takes too long to start.
        """
        waiting = {seat.calls[0].result: seat for seat in seats if seat.calls}
        while True:
            ready, _ = ray.wait(list(waiting), timeout=LOOK_S)
            if ready:
                return waiting[ready[0]]
            for seat in waiting.values():
                if seat.started is not None and time.monotonic() - seat.started > START_S:
                    raise ActorsError(
                        f"actor {seat.number} of {len(self.seats)} did not start within "
                        f"{START_S:.0f} s: each takes {self.actors.cpus:g} CPUs and "
                        f"{self.actors.gpus:g} GPUs, and Ray has free {resources()}"
                    )

    def _answered(self, seat: Seat) -> None:
        try:
            ray.get(seat.calls[0].result)
        except (*LOST, ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as why:
            raise not_started(seat, why) from why
        seat.started = None
        seat.calls.popleft()

    def close(self) -> None:
        """End the actors; whatever they do is lost."""
        for seat in self.seats:
            if seat.actor is not None:
                with suppress(ray.exceptions.RayError):  # where Ray itself is gone
                    ray.kill(seat.actor)

    def pids(self) -> list[int]:
        """The actors' processes, each on its own machine."""
        return list(ray.get([seat.actor.pid.remote() for seat in self.seats]))


def not_started(seat: Seat, why: Exception) -> ActorsError:
    return ActorsError(f"actor {seat.number} does not start: {shortly(why)}")


def shortly(why: Exception) -> str:
    """The last line of what Ray says, which tells most; without colours."""
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    return f"{type(why).__name__}: {lines[-1] if lines else 'no reason given'}"
