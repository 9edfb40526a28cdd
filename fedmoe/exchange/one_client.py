"""Clients' work in a round, with what they keep to themselves: the same for every exchange."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from fedmoe.data.examples import ClientData
from fedmoe.exchange.personal import PersonalStore
from fedmoe.federated.cohort import Trainer, work_many
from fedmoe.federated.local import LocalPlan, work
from fedmoe.types import Assignment, ClientFailure, ClientUpdate, Job, MoEState


def work_with_store(
    client: int,
    assignment: Assignment,
    factory: Callable[[], nn.Module],
    data: ClientData,
    plan: LocalPlan,
    store: PersonalStore | None,
    seed: int,
    device: torch.device | str = "cpu",
) -> ClientUpdate:
    """As `federated.local.work`, from what the client stored before this round, and into it.

    Raises:
        ValueError: see `work`; or what was stored is damaged.
    """
    own = None if store is None else store.load(client, assignment.round)
    update, mine = work(client, assignment, factory, data, plan, own, seed, device)
    _keep(store, client, assignment, own, mine)
    return update


def work_many_with_store(
    assignments: Iterable[tuple[int, Assignment]],
    factory: Callable[[], nn.Module],
    load_data: Callable[[int], ClientData],
    plan: LocalPlan,
    store: PersonalStore | None,
    seed: int,
    device: torch.device | str = "cpu",
    trainer: Trainer = "one-by-one",
) -> Iterator[ClientUpdate | ClientFailure]:
    """Each client's work, in the order of `assignments`; whatever goes wrong on a client is that
    client's failure.

    Raises:
        ValueError: there is no such trainer.
    """
    asked: dict[int, tuple[Assignment, MoEState | None]] = {}

    def load(client: int, assignment: Assignment) -> tuple[ClientData, MoEState | None]:
        data = load_data(client)
        own = None if store is None else store.load(client, assignment.round)
        asked[client] = assignment, own
        return data, own

    for client, done in work_many(assignments, factory, load, plan, seed, device, trainer):
        try:
            if isinstance(done, Exception):
                raise done
            update, mine = done
            _keep(store, client, *asked.pop(client), mine)
        except Exception as why:
            yield ClientFailure(client, f"{type(why).__name__}: {why}")
        else:
            yield update


def _keep(
    store: PersonalStore | None,
    client: int,
    assignment: Assignment,
    own: MoEState | None,
    mine: MoEState | None,
) -> None:
    if store is not None and mine is not None and mine is not own:
        # What came with a question must be there for the same round's work.
        trained = assignment.job is Job.TRAIN
        store.save(client, assignment.round if trained else assignment.round - 1, mine)
