"""Actors that are played in this process and die as they may, for tests without Ray."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import ray
import torch

from fedmoe.exchange.ray import carrying, crew
from fedmoe.exchange.ray.actor import Errand, Worker
from fedmoe.exchange.ray.crew import Call, Seat
from fedmoe.exchange.ray.packing import Slip
from fedmoe.federated.check import RefusedUpdateError
from fedmoe.types import Assignment, ClientFailure, ClientUpdate, ExpertId, MoEState, Term
from tests.tiny import one_layer, update

FAILS, REFUSED = 3, 4  # a client without an update, and one whose update is not accepted


def terms(u: ClientUpdate) -> Iterator[Term]:
    yield Term("shared", u.model.shared, u.num_examples)


def accept(u: ClientUpdate, assignment: Assignment) -> None:
    if u.client == REFUSED:
        raise RefusedUpdateError("not this one")


def measure(message: object) -> int:
    return 7


ERRAND = Errand(terms, accept, measure)


def exchange(assignments: Mapping[int, Assignment]) -> Iterator[ClientUpdate | ClientFailure]:
    for client, a in assignments.items():
        if client == FAILS:
            yield ClientFailure(client, "no")
        else:
            value = float(a.model.shared["w"]) + client / 7
            yield update(client, one_layer(value, 1.0), num_examples=client + 1)


def assignments(num_clients: int) -> dict[int, Assignment]:
    model = MoEState({"w": torch.tensor(2.0)}, {})
    return {k: Assignment(0, model, frozenset({ExpertId(0, 0)})) for k in range(num_clients)}


class PlayedActor:
    """Does what it was asked for when somebody looks, and may die, with all that it was to do."""

    def __init__(self, dies: Callable[[Slip], bool]) -> None:
        self.worker = object.__new__(Worker)
        self.worker.exchange, self.worker.round = exchange, -1
        self.dies, self.dead = dies, False
        self.work = SimpleNamespace(remote=lambda *args: lambda: self.do(*args))
        self.ready = SimpleNamespace(remote=lambda: self.worker.ready)

    def do(self, round: int, new: Any, errand: Slip | None, slip: Slip, settle: bool) -> Any:
        self.dead = self.dead or self.dies(slip)
        if self.dead:
            raise ray.exceptions.ActorDiedError
        return self.worker.work(round, new, errand, slip, settle)


class PlayedCrew(crew.Crew):
    """`draw` says who is looked at first."""

    def __init__(self, count: int, dies: Callable[[Slip], bool], draw: Random) -> None:
        self.seats = [Seat(number) for number in range(count)]
        self.moved, self.pace, self.dies, self.draw = {}, {}, dies, draw
        for seat in self.seats:
            self.fill(seat)
            seat.calls.clear()

    def fill(self, seat: Seat) -> None:
        seat.actor = PlayedActor(self.dies)
        seat.told.clear()
        seat.calls.clear()
        seat.calls.append(Call(seat.actor.ready.remote(), (), True))

    def first_of(self, seats: list[Seat]) -> Seat:
        return self.draw.choice([seat for seat in seats if seat.calls])


def result_of(thing: Any) -> Any:
    return thing() if callable(thing) else thing


@contextmanager
def played(**limits: float) -> Iterator[None]:
    """Without Ray, and with these limits in place of the usual ones."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(ray, "put", lambda thing: thing))
        stack.enter_context(patch.object(ray, "get", result_of))
        for name, value in limits.items():
            stack.enter_context(patch.object(carrying, name, value))
        yield
