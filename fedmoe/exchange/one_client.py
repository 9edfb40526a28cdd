"""One client's work in a round, with what it keeps to itself: the same for every exchange."""

from collections.abc import Callable

import torch
from torch import nn

from fedmoe.data.examples import ClientData
from fedmoe.exchange.personal import PersonalStore
from fedmoe.federated.local import LocalPlan, work
from fedmoe.types import Assignment, ClientUpdate, Job


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
    if store is not None and mine is not None and mine is not own:
        # What came with a question must be there for the same round's work.
        trained = assignment.job is Job.TRAIN
        store.save(client, assignment.round if trained else assignment.round - 1, mine)
    return update
