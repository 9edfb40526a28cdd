"""The exchange over Ray's actors: as in process, but clients are shared out over processes."""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmoe.data.examples import ClientData
from fedmoe.exchange.actors import Actors
from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.personal import PersonalStore
from fedmoe.exchange.ray.actor import MARK, Errand, Remembered
from fedmoe.exchange.ray.carrying import Carrying
from fedmoe.exchange.ray.cluster import connected
from fedmoe.exchange.ray.crew import Crew
from fedmoe.federated.cohort import Trainer
from fedmoe.federated.folding import Accept, Folded, Measure
from fedmoe.federated.local import LocalPlan
from fedmoe.types import Assignment, ClientFailure, ClientUpdate, Exchange, Terms


@contextmanager
def in_actors(
    factory: Callable[[], nn.Module],
    load_data: Callable[[int], ClientData],
    plan: LocalPlan,
    seed: int,
    actors: Actors,
    *,
    store: PersonalStore | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda client: None,
    trainer: Trainer = "one-by-one",
    data_bytes: int = 2**29,
) -> "Iterator[ActorExchange]":
    """As `in_process`, but the clients are shared out over actors.

    The bits are those of a process that computes with one thread. All that is given must be
    picklable, closures included.

    Args:
        store: on several machines, its folder must be on storage that they share.
        trainer: as for `in_process`. One whose bits depend on who is trained together with whom
            gives others here, where that depends on how fast actors are.
        data_bytes: of clients' data that each actor keeps in memory.

    Raises:
        ValueError: see `in_process`.
        ActorsError: an actor does not start.
    """
    if store is not None:
        store = replace(store, folder=store.folder.absolute())
    in_process(factory, load_data, plan, seed, store=store, trainer=trainer)  # to refuse it here
    make = partial(
        in_process,
        factory,
        Remembered(load_data, data_bytes),
        plan,
        seed,
        store=store,
        device=device,
        trainer=trainer,
    )
    folder = None if store is None else store.folder
    with over_actors(make, actors, folder=folder, progress=progress) as exchange:
        yield exchange


@contextmanager
def over_actors(
    make: Callable[[], Exchange],
    actors: Actors,
    *,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda client: None,
) -> "Iterator[ActorExchange]":
    """Any exchange, run in each actor for the clients that are there.

    Args:
        make: makes the exchange; picklable, called once in each actor. The same assignment must
            give the same answer whenever and in whichever actor it is carried.
        folder: where clients keep what is their own; every actor must see the same there.
        progress: told of each client that has answered.

    Raises:
        ActorsError: an actor does not start.
    """
    with connected(actors), _marked(folder) as mark:
        crew = Crew(make, actors, folder, mark)
        try:
            yield ActorExchange(crew, progress)
        finally:
            crew.close()


@contextmanager
def _marked(folder: Path | None) -> Iterator[str]:
    """What stands in a file of the folder, by which actors know that it is the same."""
    mark = secrets.token_hex(8)
    if folder is None:
        yield mark
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(mark, encoding="utf-8")
    try:
        yield mark
    finally:
        (folder / MARK).unlink(missing_ok=True)


class ActorExchange:
    """An exchange over actors that are there for as long as it is; see `over_actors`."""

    def __init__(self, crew: Crew, progress: Callable[[int], None]) -> None:
        self.crew, self.progress = crew, progress
        self.rounds = 0

    def __call__(
        self, assignments: Mapping[int, Assignment]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        return self._carry(assignments, None)

    def fold(
        self,
        assignments: Mapping[int, Assignment],
        terms: Terms,
        accept: Accept,
        measure: Measure,
    ) -> Iterator[Folded | ClientFailure]:
        """As called, but each actor folds its clients' updates and sends what they come to.

        See `federated.folding.FoldingExchange`. All that is given must be picklable.
        """
        return self._carry(assignments, Errand(terms, accept, measure))

    def _carry(self, assignments: Mapping[int, Assignment], errand: Errand | None) -> Iterator[Any]:
        """Carry one call's assignments.

        Raises:
            RuntimeError: while the answers to another are being read.
        """
        self.rounds += 1
        mine = self.rounds
        for answer in Carrying(self.crew, mine, assignments, errand, self.progress).answers():
            yield answer
            if mine != self.rounds:
                raise RuntimeError(
                    "an exchange over actors carries one round at a time: read all answers to one "
                    "before the next, or none that are left"
                )
