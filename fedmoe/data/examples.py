"""What a client's data looks like to the rest of fedmoe: three parts, made when asked for.

Shape suffixes: N examples; the rest of an input's shape is the source's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe.data.partition import Indices, Parts, partition_hash
from fedmoe.types import ClientInfo


class Examples(NamedTuple):
    """N inputs and their labels: x (N, ...) float, or uint8 as stored; y (N,) int64."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's examples. The parts share no example; validation or test may be empty."""

    train: Examples
    validation: Examples
    test: Examples


@dataclass(frozen=True, eq=False)
class FederatedData:
    """A protocol's clients and their data, which are only made by `load`.

    `load(client)` gives float32 inputs, or uint8 where they are codes of symbols, the same ones at
    every call, and raises ValueError for a client that the protocol does not have. `groups` says
    which clients are of a kind. The server never sees it: it is for controls and for the report.
    """

    name: str
    clients: Sequence[ClientInfo]  # who trains; ids 0, 1, ...
    load: Callable[[int], ClientData]
    num_classes: int
    partition_hash: str  # which example is whose, see fedmoe.data.partition.partition_hash
    groups: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    # Who never trains and only comes afterwards; `load` has their data, and ids go on from those
    # of `clients`.
    unseen: Sequence[ClientInfo] = ()


@dataclass(frozen=True)
class InTurns(Mapping[int, str]):
    """Groups of so many clients, of whom client c is in group c modulo their number."""

    num_clients: int
    names: tuple[str, ...]

    def __getitem__(self, client: int) -> str:
        if not 0 <= client < self.num_clients:
            raise KeyError(client)
        return self.names[client % len(self.names)]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.num_clients))

    def __len__(self) -> int:
        return self.num_clients

    def number_of(self, client_C: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The places of these clients' groups among the names."""
        return client_C % len(self.names)


def share_out(
    name: str,
    parts: Sequence[Parts],
    take: Callable[[int, Indices], Examples],
    num_classes: int,
    *,
    groups: Mapping[int, str] | None = None,
    num_unseen: int = 0,
) -> FederatedData:
    """Clients 0, 1, ... over their parts, of whom the last `num_unseen` never train.

    Args:
        parts: for each client the indices of its train, validation and test examples.
        take: makes a client's examples from indices.
    """

    def load(client: int) -> ClientData:
        if not 0 <= client < len(parts):
            raise ValueError(f"client must be between 0 and {len(parts) - 1}, got {client}")
        data = ClientData(*(take(client, index_N) for index_N in parts[client]))
        check_client_data(client, data, num_classes)
        return data

    infos = tuple(ClientInfo(c, num_examples=len(train)) for c, (train, _, _) in enumerate(parts))
    num_seen = len(parts) - num_unseen
    return FederatedData(
        name,
        infos[:num_seen],
        load,
        num_classes,
        partition_hash(parts),
        MappingProxyType(dict(groups or {})),
        infos[num_seen:],
    )


def check_client_data(client: int, data: ClientData, num_classes: int) -> None:
    """Make sure that a client can train on what it has.

    Raises:
        ValueError: the train part is empty, x and y of a part differ in length, y is not int64,
            or a label is not in 0 .. num_classes - 1.
    """
    if len(data.train.y) == 0:
        raise ValueError(
            f"client {client}: the train part must have at least 1 example, got 0; give the "
            f"client more data, or leave it out of the clients"
        )
    for part in ("train", "validation", "test"):
        examples: Examples = getattr(data, part)
        _check_part(f"client {client}: {part}", examples, num_classes)


def _check_part(name: str, examples: Examples, num_classes: int) -> None:
    x, y = examples
    if len(x) != len(y):
        raise ValueError(
            f"{name} needs one label for each input, got {len(x)} inputs and {len(y)} labels; "
            f"cut both by the same indices"
        )
    if y.dtype != torch.int64:
        raise ValueError(f"{name} labels must be int64, got {y.dtype}; convert them with .long()")
    wrong = y[(y < 0) | (y >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"{name} labels must be between 0 and {num_classes - 1} (num_classes is "
            f"{num_classes}), got {int(wrong[0])} and {len(wrong) - 1} more outside; renumber "
            f"the labels, or raise num_classes"
        )
