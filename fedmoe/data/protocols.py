"""The two ways in which fedmoe's experiments share Fashion-MNIST out over clients.

`domains`: clients of four kinds, each of which sees the clothes in its own way and counts the
classes in its own order, so that one model for all must fail and experts can tell them apart.
`published`: the setting of published leaderboards, skewed labels on all 70,000 images.

Shape suffixes: N examples; images are (N, 28, 28) as stored and (N, 1, 28, 28) as loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedmoe.data import partition as partitions
from fedmoe.data.examples import ClientData, Examples, FederatedData, check_client_data
from fedmoe.data.fashion import NUM_CLASSES, load_fashion_mnist
from fedmoe.data.partition import Indices, Parts
from fedmoe.types import ClientInfo

DOMAINS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "upright": lambda image_NHW: image_NHW,
        "flipped": lambda image_NHW: image_NHW.flip(1),  # upside down
        "transposed": lambda image_NHW: image_NHW.transpose(1, 2),
        "inverted": lambda image_NHW: 255 - image_NHW,
    }
)

# Mean and standard deviation of Fashion-MNIST's upright training pixels, of 1.
_MEAN, _STD = 0.286, 0.353

# So that a client's quarter for testing has at least 10 images.
_LEAST_PUBLISHED = 40

# Each use of the seed draws from a stream of its own.
_IMAGES, _LABEL_ORDERS, _PARTS = range(3)


def domains(
    seed: int,
    *,
    train: int = 200,
    validation: int = 100,
    test: int = 300,
    num_clients: int = 24,
    folder: Path | None = None,
    source: Examples | None = None,
) -> FederatedData:
    """Clients in four domains: upright, flipped, transposed and inverted clothes, in turns.

    Client c is in domain c modulo 4. In each domain the ten labels stand in an order of its own,
    drawn from the seed, so the same shirt has another number elsewhere. Images are drawn without
    replacement, so no image is on two clients. The server is not told the domain; `groups` knows.

    `source` stands in for Fashion-MNIST: uint8 images (N, 28, 28) and labels 0 to 9.

    Raises:
        ValueError: the clients need more images than there are, or a count is below its limit.
    """
    counts = {"train": train, "validation": validation, "test": test, "num_clients": num_clients}
    for name, count in counts.items():
        least = 1 if name in ("train", "num_clients") else 0
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")
    source = _checked_source(load_fashion_mnist(folder) if source is None else source)
    num_each = train + validation + test
    if num_each * num_clients > len(source.y):
        raise ValueError(
            f"num_clients must be at most {len(source.y) // num_each} ({len(source.y)} images, "
            f"{num_each} a client), got {num_clients}; lower it, or train, validation or test"
        )
    rng = np.random.default_rng([seed, _IMAGES])
    drawn = rng.permutation(len(source.y))[: num_each * num_clients].reshape(num_clients, -1)
    parts = tuple(partitions.split(row, (train, validation, test), rng) for row in drawn)
    order_rng = np.random.default_rng([seed, _LABEL_ORDERS])
    new_label = {
        domain: torch.from_numpy(order_rng.permutation(NUM_CLASSES).astype(np.int64))
        for domain in DOMAINS
    }
    groups = {c: tuple(DOMAINS)[c % len(DOMAINS)] for c in range(num_clients)}

    def take(client: int, index_N: Indices) -> Examples:
        domain = groups[client]
        row_N = torch.from_numpy(index_N)
        return Examples(
            _normalised(DOMAINS[domain](source.x[row_N])), new_label[domain][source.y[row_N]]
        )

    return _federated("domains", parts, take, groups)


def published(
    seed: int,
    *,
    partition: Literal["dirichlet", "pathological"],
    share: float = 1.0,
    num_clients: int = 20,
    folder: Path | None = None,
    source: Examples | None = None,
) -> FederatedData:
    """The published setting: all images over 20 clients, by Dirichlet(0.1) or 2 labels each.

    As in PFLlib (Zhang et al., 2023, arXiv:2312.04992): training and test images merged, client
    sizes as they fall, 75 % of each client's images to train and 25 % to test. Ours takes one
    tenth of the 75 % for validation, and flwr-datasets' partitioners differ in detail.

    `share` draws that share of each label's images first; 0.2 is the published fifth. `source`
    stands in for Fashion-MNIST: uint8 images (N, 28, 28) and labels 0 to 9.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    source = _checked_source(load_fashion_mnist(folder) if source is None else source)
    index_N = _stratified(source.y.numpy(), share, np.random.default_rng([seed, _IMAGES]))
    label_N = source.y.numpy()[index_N]
    match partition:
        case "dirichlet":
            held = partitions.dirichlet(label_N, num_clients, 0.1, seed, _LEAST_PUBLISHED)
        case "pathological":
            held = partitions.pathological(label_N, num_clients, 2, seed)
        case _:
            raise ValueError(f"partition must be 'dirichlet' or 'pathological', got {partition!r}")
    rng = np.random.default_rng([seed, _PARTS])
    parts = tuple(
        partitions.split(index_N[rows], (0.75 * 0.9, 0.75 * 0.1, 0.25), rng) for rows in held
    )

    def take(client: int, index_N: Indices) -> Examples:
        row_N = torch.from_numpy(index_N)
        return Examples(_normalised(source.x[row_N]), source.y[row_N])

    size = "" if share == 1 else f"{share:g}-"
    return _federated(f"published-{size}{partition}", parts, take, {})


def _federated(
    name: str,
    parts: tuple[Parts, ...],
    take: Callable[[int, Indices], Examples],
    groups: Mapping[int, str],
) -> FederatedData:
    """Clients 0, 1, ... over their parts; `take` makes a client's examples from indices."""

    def load(client: int) -> ClientData:
        if not 0 <= client < len(parts):
            raise ValueError(f"client must be between 0 and {len(parts) - 1}, got {client}")
        data = ClientData(*(take(client, index_N) for index_N in parts[client]))
        check_client_data(client, data, NUM_CLASSES)
        return data

    clients = tuple(ClientInfo(c, num_examples=len(train)) for c, (train, _, _) in enumerate(parts))
    return FederatedData(
        name,
        clients,
        load,
        NUM_CLASSES,
        partitions.partition_hash(parts),
        MappingProxyType(dict(groups)),
    )


def _normalised(image_NHW: Tensor) -> Tensor:
    """uint8 images as float32 (N, 1, H, W), with mean near 0 and deviation near 1."""
    return ((image_NHW.float() / 255 - _MEAN) / _STD).unsqueeze(1).contiguous()


def _stratified(
    label_N: np.typing.NDArray[np.int64], share: float, rng: np.random.Generator
) -> Indices:
    """Ascending indices of the same share of each label's examples, rounded label by label."""
    if share == 1:
        return np.arange(len(label_N))
    kept = []
    for label in np.unique(label_N):
        rows = np.flatnonzero(label_N == label)
        kept.append(rng.choice(rows, size=round(share * len(rows)), replace=False))
    return np.sort(np.concatenate(kept))


def _checked_source(source: Examples) -> Examples:
    x, y = source
    if x.dtype != torch.uint8 or x.shape[1:] != (28, 28) or len(x) != len(y):
        raise ValueError(
            f"source must hold uint8 images (N, 28, 28) and N labels, got {x.dtype} "
            f"{tuple(x.shape)} and {len(y)} labels"
        )
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < NUM_CLASSES:
        raise ValueError(
            f"source labels must be between 0 and {NUM_CLASSES - 1}, got {int(y.min())} to "
            f"{int(y.max())}"
        )
    return source
