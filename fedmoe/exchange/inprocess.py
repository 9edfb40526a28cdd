"""The exchange within one process, without Ray and Flower: clients one after another, or by a
faster way to the same result.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from fedmoe.data.examples import ClientData
from fedmoe.exchange.one_client import work_many_with_store
from fedmoe.exchange.personal import PersonalStore
from fedmoe.federated.cohort import Trainer, check_trainer
from fedmoe.federated.local import LocalPlan
from fedmoe.types import Assignment, ClientFailure, ClientUpdate, Exchange


def in_process(
    factory: Callable[[], nn.Module],
    load_data: Callable[[int], ClientData],
    plan: LocalPlan,
    seed: int,
    *,
    store: PersonalStore | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda client: None,
    trainer: Trainer = "one-by-one",
) -> Exchange:
    """An exchange that does each client's work when its update is asked for.

    Args:
        store: where clients keep what is their own; needed where the plan has any of that.
        progress: told of each client that has answered.
        trainer: see `federated.cohort`; the same all through a run.

    Raises:
        ValueError: clients keep something under this plan, and there is no store for it; or there
            is no such trainer.
    """
    check_trainer(trainer)
    if store is None and plan.stores:
        raise ValueError("store must not be None for a plan under which clients keep anything")

    def exchange(assignments: Mapping[int, Assignment]) -> Iterator[ClientUpdate | ClientFailure]:
        for answer in work_many_with_store(
            assignments.items(), factory, load_data, plan, store, seed, device, trainer
        ):
            yield answer
            progress(answer.client)

    return exchange
