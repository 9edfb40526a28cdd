"""Any number of clients whose data are drawn when they are asked for: nothing grows with them.

Each client of `crowd` draws its images from Fashion-MNIST by a generator of its own, keyed by
(seed, client), so a million clients cost no more than the few that are looked at, and all their
sizes, which the server is told, are one array.

Shape suffixes: C clients, N examples.
"""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fedmoe.data.examples import ClientData, Examples, FederatedData, InTurns, check_client_data
from fedmoe.data.fashion import load_fashion_mnist
from fedmoe.data.idx import NUM_CLASSES
from fedmoe.data.partition import Indices
from fedmoe.data.protocols import DOMAINS, checked_source, normalised
from fedmoe.population import Population

VERSION = 1  # of how clients draw; raise it when the same settings give other data
TEST_SHARE = 0.2  # of each label's images; no client trains on them

# Each use of the seed draws from a stream of its own.
_POOLS, _SIZES, _LABEL_ORDERS, _CLIENTS = range(4)


def crowd(
    seed: int,
    *,
    num_clients: int = 1000,
    alpha: float = 1.0,
    median: int = 40,
    spread: float = 0.5,
    least: int = 10,
    most: int = 160,
    test: int = 40,
    folder: Path | None = None,
    source: Examples | None = None,
) -> FederatedData:
    """Clients in the four domains of `domains`, with few images each, and labels as they fall.

    Client c is in domain c modulo 4, where clothes look and are counted in that domain's way. Its
    share of each label is a draw from Dirichlet(`alpha`). It trains on a lognormal number of images
    (`median`, and `spread` the deviation of the logarithm, cut to `least` and `most`), and has a
    quarter as many more for validation and `test` for tests, of the same labels. Clients may share
    images, since a million have more than there are, but nobody trains on one that is for tests.
    The same client of the same seed has the same data among however many.

    `source` stands in for Fashion-MNIST: uint8 images (N, 28, 28) and labels 0 to 9.

    Raises:
        ValueError: a number is out of its range, or the source has too few images of a label.
    """
    counts = (("num_clients", num_clients, 1), ("least", least, 1), ("test", test, 0))
    for name, value, low in counts:
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    if not least <= median <= most:
        raise ValueError(f"median must be from least to most ({least} to {most}), got {median}")
    for name, number in (("alpha", alpha), ("spread", spread)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be a positive number, got {number}")
    source = checked_source(load_fashion_mnist(folder) if source is None else source)
    pools = _pools(seed, source.y.numpy())
    for part, wanted in ((0, most + _quarter(most)), (1, test)):
        if (fewest := min(len(pool[part]) for pool in pools)) < wanted:
            raise ValueError(
                f"most and test must leave a client {wanted} images of one label to draw from, got "
                f"{fewest}; lower {'most' if part == 0 else 'test'}"
            )
    normal_C = np.random.default_rng([seed, _SIZES]).standard_normal(num_clients)
    size_C = np.exp(math.log(median) + spread * normal_C).round().clip(least, most).astype(np.int32)
    rng = np.random.default_rng([seed, _LABEL_ORDERS])
    orders = [torch.from_numpy(rng.permutation(NUM_CLASSES).astype(np.int64)) for _ in DOMAINS]
    settings = (seed, num_clients, alpha, median, spread, least, most, test)
    return FederatedData(
        "crowd",
        Population(size_C),
        partial(_load, seed, alpha, test, source, pools, size_C, orders),
        NUM_CLASSES,
        _hash(settings, source),
        InTurns(num_clients, tuple(DOMAINS)),
    )


Pools = list[tuple[Indices, Indices]]  # by label: images to train on, and images for tests


def _load(
    seed: int,
    alpha: float,
    test: int,
    source: Examples,
    pools: Pools,
    size_C: np.typing.NDArray[np.int32],
    orders: list[torch.Tensor],
    client: int,
) -> ClientData:
    if not 0 <= client < len(size_C):
        raise ValueError(f"client must be between 0 and {len(size_C) - 1}, got {client}")
    rng = np.random.default_rng([seed, _CLIENTS, client])
    share_E = rng.dirichlet(np.full(NUM_CLASSES, alpha))
    num_train = int(size_C[client])
    number = client % len(DOMAINS)
    domain = DOMAINS[tuple(DOMAINS)[number]]

    def draw(part: int, count: int) -> Indices:
        wanted = rng.multinomial(count, share_E)
        drawn = [
            pool[part][rng.choice(len(pool[part]), n, replace=False)]
            for pool, n in zip(pools, wanted, strict=True)
        ]
        return rng.permutation(np.concatenate(drawn))

    def take(index_N: Indices) -> Examples:
        row_N = torch.from_numpy(index_N)
        return Examples(normalised(domain(source.x[row_N])), orders[number][source.y[row_N]])

    own_N = draw(0, num_train + _quarter(num_train))
    data = ClientData(take(own_N[:num_train]), take(own_N[num_train:]), take(draw(1, test)))
    check_client_data(client, data, NUM_CLASSES)
    return data


def _quarter(count: int) -> int:
    return -(-count // 4)


def _pools(seed: int, label_N: np.typing.NDArray[np.int64]) -> Pools:
    rng = np.random.default_rng([seed, _POOLS])
    pools = []
    for label in range(NUM_CLASSES):
        drawn = rng.permutation(np.flatnonzero(label_N == label))
        cut = round(TEST_SHARE * len(drawn))
        pools.append((drawn[cut:], drawn[:cut]))
    return pools


def _hash(settings: tuple[float, ...], source: Examples) -> str:
    """Names who has which images without looking at any client: they are drawn from these alone."""
    digest = hashlib.sha256(f"fedmoe crowd {VERSION} {settings}".encode())
    digest.update(source.y.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]
