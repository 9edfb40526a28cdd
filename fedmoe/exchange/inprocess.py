"""The exchange within one process: clients one after another, without Ray and Flower."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from fedmoe.data.examples import ClientData
from fedmoe.exchange.one_client import work_with_store
from fedmoe.exchange.personal import PersonalStore
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
) -> Exchange:
    """An exchange that does each client's work when its update is asked for.

    Args:
        store: where clients keep what is their own; needed where the plan has any of that.
        progress: told of each client that has answered.

    Raises:
        ValueError: clients keep something under this plan, and there is no store for it.
    """
    if store is None and plan.stores:
        raise ValueError("store must not be None for a plan under which clients keep anything")

    def exchange(assignments: Mapping[int, Assignment]) -> Iterator[ClientUpdate | ClientFailure]:
        for client, assignment in assignments.items():
            try:
                data = load_data(client)
                update = work_with_store(
                    client, assignment, factory, data, plan, store, seed, device
                )
            except Exception as why:  # whatever goes wrong on a client is that client's failure
                yield ClientFailure(client, f"{type(why).__name__}: {why}")
            else:
                yield update
            progress(client)

    return exchange
