"""The ways in which fedmoe's experiments share images out over clients.

`domains`: clients of four kinds, each of which sees the clothes in its own way and counts the
classes in its own order, so that one model for all must fail and experts can tell them apart.
`two_domains`: clients with digits and clients with clothes, where a label means one or the other.
`published`: the setting of published leaderboards, skewed labels on all 70,000 images.
`dirichlet`: the same for any skew and number of clients.
`heldout`: clients with a few labels each, and others who come later with labels in combinations
that nobody had.

Shape suffixes: N examples; images are (N, 28, 28) as stored and (N, 1, 28, 28) as loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedmoe.data import partition as partitions
from fedmoe.data.examples import Examples, FederatedData, share_out
from fedmoe.data.fashion import load_fashion_mnist
from fedmoe.data.idx import NUM_CLASSES
from fedmoe.data.mnist import load_mnist
from fedmoe.data.partition import Indices, Parts

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

# Of each label's images; `heldout` gives them to no client.
_ENCODER_SHARE = 0.3

# Each use of the seed draws from a stream of its own.
_IMAGES, _LABEL_ORDERS, _PARTS, _LABEL_SETS = range(4)


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
    counts = _checked_counts(train, validation, test, num_clients)
    source = checked_source(load_fashion_mnist(folder) if source is None else source)
    rng = np.random.default_rng([seed, _IMAGES])
    parts = _equal_parts(len(source.y), num_clients, counts, rng)
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
            normalised(DOMAINS[domain](source.x[row_N])), new_label[domain][source.y[row_N]]
        )

    return share_out("domains", parts, take, NUM_CLASSES, groups=groups)


def two_domains(
    seed: int,
    *,
    train: int = 200,
    validation: int = 100,
    test: int = 300,
    num_clients: int = 24,
    sources: Mapping[str, Examples] | None = None,
) -> FederatedData:
    """Clients with MNIST's digits and clients with Fashion-MNIST's clothes, in turns.

    Even clients have digits, odd ones clothes. Both count their classes from 0 to 9, so label 3
    is the digit 3 for one half and a dress for the other, which needs no drawn order of labels.
    Images are drawn without replacement, and normalised alike: the client does not say which
    domain it is in. `groups` knows.

    `sources` stands in for "mnist" and "fashion-mnist": uint8 images (N, 28, 28) and labels 0 to 9.

    Raises:
        ValueError: the clients need more images than there are, or a count is below its limit.
    """
    counts = _checked_counts(train, validation, test, num_clients)
    if sources is None:
        sources = {"mnist": load_mnist(), "fashion-mnist": load_fashion_mnist()}
    checked = {name: checked_source(source) for name, source in sources.items()}
    groups = {c: tuple(checked)[c % len(checked)] for c in range(num_clients)}
    drawn = {}
    for d, (name, source) in enumerate(checked.items()):
        num_members = len(range(d, num_clients, len(checked)))
        rng = np.random.default_rng([seed, _IMAGES, d])
        drawn[name] = iter(_equal_parts(len(source.y), num_members, counts, rng))
    parts = tuple(next(drawn[groups[c]]) for c in range(num_clients))

    def take(client: int, index_N: Indices) -> Examples:
        return _as_stored(checked[groups[client]], index_N)

    return share_out("two-domains", parts, take, NUM_CLASSES, groups=groups)


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
    match partition:
        case "dirichlet":
            cut = _dirichlet_cut(seed, num_clients, 0.1, _LEAST_PUBLISHED)
        case "pathological":
            cut = partial(
                partitions.pathological, num_clients=num_clients, labels_per_client=2, seed=seed
            )
        case _:
            raise ValueError(f"partition must be 'dirichlet' or 'pathological', got {partition!r}")
    size = "" if share == 1 else f"{share:g}-"
    return _skewed(f"published-{size}{partition}", seed, cut, share, folder, source)


def dirichlet(
    seed: int,
    alpha: float,
    *,
    num_clients: int = 20,
    share: float = 1.0,
    min_examples: int | None = None,
    folder: Path | None = None,
    source: Examples | None = None,
) -> FederatedData:
    """As `published`, for any number of clients and any skew of labels: a small alpha is strong.

    Every client has at least `min_examples` images: as published 40, but 10 with more than 20
    clients, since a strong skew over many leaves some with little.

    Raises:
        ValueError: also where no draw of eleven gives every client so many.
    """
    if min_examples is None:
        min_examples = _LEAST_PUBLISHED if num_clients <= 20 else 10
    cut = _dirichlet_cut(seed, num_clients, alpha, min_examples)
    size = "" if share == 1 else f"{share:g}-"
    name = f"{size}dirichlet-{alpha:g}-over-{num_clients}"
    return _skewed(name, seed, cut, share, folder, source)


def heldout(
    seed: int,
    *,
    num_clients: int = 30,
    unseen: int = 10,
    labels: int = 4,
    anchors: int = 5,
    train: int = 300,
    validation: int = 60,
    test: int = 240,
    folder: Path | None = None,
    source: Examples | None = None,
) -> FederatedData:
    """Clients with a few labels each; the unseen ones' combinations of labels are nobody else's.

    The question of FedJETs (arXiv:2306.08586, partition A). Clients 0 to `anchors` - 1 have
    10 / `anchors` labels each, and together every label once. All others have `labels` each,
    drawn from the seed, in combinations that all differ. The `unseen` clients, whose numbers go on
    from the last of the `num_clients`, never train. Labels have equal shares of each part, to one
    image. The paper draws images with replacement, so that clients may share them; here no two do,
    nor does the set of `heldout_encoder_images`. `groups` has each client's labels, as "0+3+5+9",
    which the server never sees.

    Raises:
        ValueError: there are too few combinations or images, or a count is below its limit.
    """
    counts = _checked_counts(train, validation, test, num_clients)
    source = checked_source(load_fashion_mnist(folder) if source is None else source)
    label_sets = _label_sets(seed, num_clients, unseen, labels, anchors)
    rows = {label: iter(own) for label, (_, own) in _label_pools(seed, source.y).items()}

    def draw(label_set: tuple[int, ...], count: int) -> Indices:
        drawn: list[int] = []
        for i, label in enumerate(label_set):
            wanted = (count + len(label_set) - 1 - i) // len(label_set)
            taken = list(itertools.islice(rows[label], wanted))
            if len(taken) < wanted:
                raise ValueError(
                    f"train, validation and test ({train}, {validation}, {test}) ask for more "
                    f"images of label {label} than clients can have; lower them, num_clients "
                    f"({num_clients}) or unseen ({unseen})"
                )
            drawn += taken
        return np.sort(np.array(drawn, dtype=np.int64))

    parts: list[Parts] = []
    for label_set in label_sets:
        first, second, third = (draw(label_set, count) for count in counts)
        parts.append((first, second, third))

    def take(client: int, index_N: Indices) -> Examples:
        return _as_stored(source, index_N)

    groups = {c: "+".join(map(str, label_set)) for c, label_set in enumerate(label_sets)}
    return share_out("heldout", parts, take, NUM_CLASSES, groups=groups, num_unseen=unseen)


def heldout_encoder_images(
    seed: int, count: int, *, folder: Path | None = None, source: Examples | None = None
) -> Examples:
    """Images that no client of `heldout(seed)` has, whatever else it is asked: for an encoder.

    They are three tenths of each label's. The first `count` in an order drawn from the seed, so
    that fewer are a part of more; normalised float32 (count, 1, 28, 28), labels 0 to 9.

    Raises:
        ValueError: `count` is more than there are.
    """
    source = checked_source(load_fashion_mnist(folder) if source is None else source)
    kept = np.concatenate([put_aside for put_aside, _ in _label_pools(seed, source.y).values()])
    if not 1 <= count <= len(kept):
        raise ValueError(
            f"count must be between 1 and the {len(kept)} images that no client has, got {count}"
        )
    order = np.random.default_rng([seed, _PARTS]).permutation(kept)
    return _as_stored(source, order[:count])


def _label_sets(
    seed: int, num_clients: int, unseen: int, labels: int, anchors: int
) -> list[tuple[int, ...]]:
    """Each client's labels, ascending: anchors, other training clients, unseen clients."""
    if not 1 <= anchors <= min(num_clients, NUM_CLASSES) or NUM_CLASSES % anchors:
        raise ValueError(
            f"anchors must divide the {NUM_CLASSES} labels and be at most num_clients "
            f"({num_clients}), got {anchors}"
        )
    if not 1 <= labels <= NUM_CLASSES:
        raise ValueError(f"labels must be between 1 and {NUM_CLASSES}, got {labels}")
    if unseen < 0:
        raise ValueError(f"unseen must be at least 0, got {unseen}")
    rng = np.random.default_rng([seed, _LABEL_SETS])
    tiles = np.sort(rng.permutation(NUM_CLASSES).reshape(anchors, -1), axis=1)
    anchor_sets = [tuple(int(label) for label in tile) for tile in tiles]
    others = [s for s in itertools.combinations(range(NUM_CLASSES), labels) if s not in anchor_sets]
    num_others = num_clients - anchors + unseen
    if num_others > len(others):
        raise ValueError(
            f"num_clients - anchors + unseen must be at most {len(others)}, the combinations of "
            f"{labels} labels that no anchor has, got {num_others}; lower num_clients or unseen, "
            f"or change labels"
        )
    return anchor_sets + [others[i] for i in rng.permutation(len(others))[:num_others]]


def _label_pools(seed: int, label_N: Tensor) -> dict[int, tuple[Indices, Indices]]:
    """For each label, the images put aside for an encoder and those for clients, in drawn order."""
    rng = np.random.default_rng([seed, _IMAGES])
    pools = {}
    for label in range(NUM_CLASSES):
        drawn = rng.permutation(np.flatnonzero(label_N.numpy() == label))
        cut = round(_ENCODER_SHARE * len(drawn))
        pools[label] = drawn[:cut], drawn[cut:]
    return pools


def _equal_parts(
    num_images: int, num_clients: int, counts: tuple[int, int, int], rng: np.random.Generator
) -> tuple[Parts, ...]:
    """Images drawn without replacement, as many for each client and part."""
    num_each = sum(counts)
    if num_each * num_clients > num_images:
        raise ValueError(
            f"num_clients must be at most {num_images // num_each} ({num_images} images, "
            f"{num_each} a client), got {num_clients}; lower it, or train, validation or test"
        )
    drawn = rng.permutation(num_images)[: num_each * num_clients].reshape(num_clients, num_each)
    return tuple(partitions.split(row, counts, rng) for row in drawn)


def _dirichlet_cut(
    seed: int, num_clients: int, alpha: float, min_examples: int
) -> Callable[[Indices], tuple[Indices, ...]]:
    return partial(
        partitions.dirichlet,
        num_clients=num_clients,
        alpha=alpha,
        seed=seed,
        min_examples=min_examples,
    )


def _skewed(
    name: str,
    seed: int,
    cut: Callable[[Indices], tuple[Indices, ...]],
    share: float,
    folder: Path | None,
    source: Examples | None,
) -> FederatedData:
    """A share of all images over clients as `cut` has it by label, then each client's parts."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    source = checked_source(load_fashion_mnist(folder) if source is None else source)
    index_N = _stratified(source.y.numpy(), share, np.random.default_rng([seed, _IMAGES]))
    rng = np.random.default_rng([seed, _PARTS])
    parts = tuple(
        partitions.split(index_N[rows], (0.75 * 0.9, 0.75 * 0.1, 0.25), rng)
        for rows in cut(source.y.numpy()[index_N])
    )

    def take(client: int, index_N: Indices) -> Examples:
        return _as_stored(source, index_N)

    return share_out(name, parts, take, NUM_CLASSES)


def _as_stored(source: Examples, index_N: Indices) -> Examples:
    """These images, normalised, under the labels that they have in the source."""
    row_N = torch.from_numpy(index_N)
    return Examples(normalised(source.x[row_N]), source.y[row_N])


def normalised(image_NHW: Tensor) -> Tensor:
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


def _checked_counts(
    train: int, validation: int, test: int, num_clients: int
) -> tuple[int, int, int]:
    counts = {"train": train, "validation": validation, "test": test, "num_clients": num_clients}
    for name, count in counts.items():
        least = 1 if name in ("train", "num_clients") else 0
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")
    return train, validation, test


def checked_source(source: Examples) -> Examples:
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
