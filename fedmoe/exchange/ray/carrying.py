"""One round over actors: slices of clients go out, answers come back, what was lost goes again.

A client's work is done again wherever its result has not arrived: the same assignment gives the
same update, and what a client keeps is saved by round, so nothing is lost or counted twice.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray

from fedmoe.exchange.actors import ActorsError
from fedmoe.exchange.ray.actor import Done, Errand
from fedmoe.exchange.ray.crew import LOST, Call, Crew, Seat, not_started, shortly
from fedmoe.exchange.ray.packing import Shelf, unpack
from fedmoe.types import Assignment, ClientFailure

DEPTH = 2  # calls that an actor has before it, so that it need not wait for the next
SLICE_S = 1.0  # of work that a call should bring at most
LEAST_S = 0.02  # and at least: there is no use in less
MOST_CLIENTS = 64  # in a call
WORTH_MOVING_S = 0.05  # of work: what an idle actor takes over at least
SETTLE_S = 30.0  # of work, after which an actor hands over what it has folded
DEATHS = 3  # of actors at work on one client, in a round, before the client is given up
RESTARTS = 12  # of actors in a round


class Carrying:
    """The way of some assignments to their clients and back.

    Args:
        number: counts the crew's rounds.
        errand: how actors fold updates; None: they come back whole.
    """

    def __init__(
        self,
        crew: Crew,
        number: int,
        assignments: Mapping[int, Assignment],
        errand: Errand | None,
        progress: Callable[[int], None],
    ) -> None:
        self.crew, self.number, self.assignments = crew, number, assignments
        self.progress = progress
        self.shelf = Shelf(ray.put)
        self.errand = None if errand is None else self.shelf.slip(errand)
        self.deaths: Counter[int] = Counter()
        self.restarts = 0
        self.seen: set[int] = set()  # clients of whom `progress` was told

    def answers(self) -> Iterator[Any]:
        """As they arrive: updates, failures, and what an actor has folded.

        Raises:
            ActorsError: actors die again and again, or do what they must not.
        """
        for seat in self.crew.seats:
            seat.forget()
        for client in self.assignments:
            self.crew.seat_of(client).todo.append(client)
        while any(seat.todo or seat.calls for seat in self.crew.seats):
            for seat in self.crew.seats:
                self._feed(seat)
            yield from self._arrived(self.crew.first_of(self.crew.seats))

    def _feed(self, seat: Seat) -> None:
        """Give an actor what it can have before it; the last of it with the bill."""
        folds = self.errand is not None
        while len(seat.calls) < DEPTH and (seat.todo or self._take_over(seat)):
            if self._would_be_blamed(seat):
                break
            clients = self._slice(seat)
            late = seat.folding_s > SETTLE_S
            self._send(seat, clients, folds and (not seat.todo or late or self._suspect(clients)))
        if folds and not seat.todo and seat.unsettled:  # the rest went to somebody else
            self._send(seat, (), True)

    def _slice(self, seat: Seat) -> tuple[int, ...]:
        """The next clients of an actor; whoever may have killed one works alone."""
        size, clients = self._size(seat), [seat.todo.popleft()]
        if self._suspect(clients):
            return tuple(clients)
        while seat.todo and len(clients) < size and not self._suspect([seat.todo[0]]):
            clients.append(seat.todo.popleft())
        return tuple(clients)

    def _size(self, seat: Seat) -> int:
        pace = self._pace(seat.todo[0])
        if pace is None:
            return 1
        half = math.ceil(len(seat.todo) / 2)  # so that the last ones can go elsewhere
        size = max(LEAST_S / pace, min(SLICE_S / pace, half))
        return max(1, min(MOST_CLIENTS, int(size)))

    def _pace(self, client: int) -> float | None:
        return self.crew.pace.get(self.assignments[client].job)

    def _suspect(self, clients: Sequence[int]) -> bool:
        return bool(self.deaths) and any(self.deaths[client] for client in clients)

    def _would_be_blamed(self, seat: Seat) -> bool:
        """Whether the next call and one that waits could be blamed for each other's death."""
        calls = seat.calls
        return bool(calls) and (self._suspect(calls[-1].clients) or self._suspect([seat.todo[0]]))

    def _take_over(self, seat: Seat) -> bool:
        """Let an idle actor have half of what the busiest has not begun, if it is worth it."""
        busiest = max(self.crew.seats, key=lambda s: len(s.todo))
        count = math.ceil(len(busiest.todo) / 2)
        pace = self._pace(busiest.todo[-1]) if count else None
        if pace is None or pace * count < WORTH_MOVING_S or seat.started is not None:
            return False
        for _ in range(count):
            client = busiest.todo.pop()
            self.crew.moved[client] = seat.number
            seat.todo.appendleft(client)
        return True

    def _send(self, seat: Seat, clients: tuple[int, ...], settle: bool) -> None:
        slip = self.shelf.slip({client: self.assignments[client] for client in clients})
        errand = None if "errand" in seat.told else self.errand
        needed = slip.volumes | (errand.volumes if errand is not None else set())
        new = {number: self.shelf.volumes[number] for number in needed - seat.told}
        seat.told |= {*new, "errand"}
        result = seat.actor.work.remote(self.number, new, errand, slip, settle)
        seat.calls.append(Call(result, clients, settle))

    def _arrived(self, seat: Seat) -> list[Any]:
        """What can be handed on once the oldest call of an actor has ended."""
        call = seat.calls[0]
        try:
            done: Done = unpack(ray.get(call.result))
        except LOST as why:
            return self._lost(seat, why)
        except ray.exceptions.RayTaskError as why:
            raise ActorsError(
                f"actor {seat.number} failed at clients {_some(call.clients)}: {shortly(why)}"
            ) from why
        seat.calls.popleft()
        seat.started = None
        if call.clients:
            pace = max(done.seconds / len(call.clients), 1e-9)
            self.crew.pace[self.assignments[call.clients[0]].job] = pace
        came = self._came(seat, call, done)
        self._feed(seat)  # before anybody takes time over what came
        self._tell(call.clients)
        return came

    def _came(self, seat: Seat, call: Call, done: Done) -> list[Any]:
        if self.errand is None:
            return list(done.answers)
        seat.folded += call.clients
        seat.failures += done.answers
        seat.folding_s += done.seconds
        if done.folded is None:
            return []
        settled = [*seat.failures, done.folded]
        seat.reckon()
        return settled

    def _tell(self, clients: tuple[int, ...]) -> None:
        for client in clients:
            if client not in self.seen:
                self.seen.add(client)
                self.progress(client)

    def _lost(self, seat: Seat, why: Exception) -> list[Any]:
        """Put another actor into the place of one that died, and do again what went with it.

        Returns:
            Who is given up.
        """
        if getattr(why, "actor_init_failed", False):
            raise not_started(seat, why) from why
        blamed, *later = [call.clients for call in seat.calls]
        self.deaths.update(blamed)
        self.restarts += 1
        if self.restarts > RESTARTS:
            raise ActorsError(
                f"actors died {self.restarts} times in one round, at last actor {seat.number} at "
                f"clients {_some(blamed)}: {shortly(why)}. If they lack memory, ask for fewer"
            )
        given_up = [client for client in blamed if self.deaths[client] >= DEATHS]
        again = [client for client in blamed if self.deaths[client] < DEATHS]
        again += [*seat.folded, *(client for clients in later for client in clients)]
        seat.reckon()
        seat.todo.extendleft(reversed(again))
        self.crew.fill(seat)
        self._tell(tuple(given_up))
        return [ClientFailure(client, self._why_given_up(client, why)) for client in given_up]

    def _why_given_up(self, client: int, why: Exception) -> str:
        return (
            f"{DEATHS} actors died at its work, so it may need more memory than there is: "
            f"{shortly(why)}"
        )


def _some(clients: tuple[int, ...]) -> str:
    names = [str(client) for client in clients[:8]]
    return ", ".join([*names, "..."] if len(clients) > 8 else names) or "none"
