"""Which example belongs to which client: flwr-datasets' partitioners, on labels alone.

The partitioners get a table of (index, label) and never a pixel, so they run offline, in
seconds, and give the same indices for every source with the same labels. Every option that
decides the result is set here, so that a new default in flwr-datasets changes nothing.

Each function returns one array of example indices for each client, ascending.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Indices = npt.NDArray[np.int64]
Parts = tuple[Indices, Indices, Indices]  # train, validation, test


def dirichlet(
    labels: npt.ArrayLike, num_clients: int, alpha: float, seed: int, min_examples: int = 10
) -> tuple[Indices, ...]:
    """Each label is shared out over the clients by a draw from Dirichlet(alpha).

    Complete. Client sizes are as they fall (no balancing). Hsu, Qi, Brown (2019),
    arXiv:1909.06335; in the form of Li et al. (2022), arXiv:2102.02079.

    Raises:
        ValueError: also where no draw of eleven gives every client `min_examples`.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    label_N = _checked_labels(labels, num_clients, seed)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive number, got {alpha}")
    if not 0 <= min_examples <= len(label_N) // num_clients:
        raise ValueError(
            f"min_examples must be between 0 and {len(label_N) // num_clients} ({len(label_N)} "
            f"examples over {num_clients} clients), got {min_examples}"
        )
    partitioner = DirichletPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        alpha=float(alpha),
        min_partition_size=min_examples,
        self_balancing=False,
        shuffle=False,
        seed=seed,
    )
    with warnings.catch_warnings():
        # It warns at each draw that it throws away; what counts is whether one holds.
        warnings.filterwarnings("ignore", message="The specified min_partition_size")
        try:
            return _run(partitioner, label_N, num_clients)
        except ValueError as error:
            raise ValueError(
                f"no draw of eleven gave each of the {num_clients} clients min_examples="
                f"{min_examples} of {len(label_N)} examples at alpha={alpha}; raise alpha, or "
                f"lower min_examples or num_clients"
            ) from error


def pathological(
    labels: npt.ArrayLike, num_clients: int, labels_per_client: int, seed: int
) -> tuple[Indices, ...]:
    """Each client holds exactly `labels_per_client` labels, each shared evenly by its holders.

    A client's first label goes round (client c has label c modulo their number), the others are
    drawn; so it is complete if there are at least as many clients as labels, and else a label
    that nobody drew is left out, with a warning.
    """
    from flwr_datasets.partitioner import PathologicalPartitioner

    label_N = _checked_labels(labels, num_clients, seed)
    num_labels = len(np.unique(label_N))
    if not 1 <= labels_per_client <= num_labels:
        raise ValueError(
            f"labels_per_client must be between 1 and the {num_labels} labels, got "
            f"{labels_per_client}"
        )
    partitioner = PathologicalPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        num_classes_per_partition=labels_per_client,
        class_assignment_mode="first-deterministic",
        shuffle=False,
        seed=seed,
    )
    return _run(partitioner, label_N, num_clients)


def shards(
    labels: npt.ArrayLike, num_clients: int, shards_per_client: int, seed: int
) -> tuple[Indices, ...]:
    """Examples sorted by label are cut into equal shards, and each client draws as many.

    McMahan et al. (2017), arXiv:1602.05629. Shards are equal, so fewer examples than there are
    shards may be left out: none if `num_clients * shards_per_client` divides their number.
    """
    from flwr_datasets.partitioner import ShardPartitioner

    label_N = _checked_labels(labels, num_clients, seed)
    if not 1 <= shards_per_client <= len(label_N) // num_clients:
        raise ValueError(
            f"shards_per_client must be between 1 and {len(label_N) // num_clients} "
            f"({len(label_N)} examples over {num_clients} clients), got {shards_per_client}"
        )
    partitioner = ShardPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        num_shards_per_partition=shards_per_client,
        shard_size=len(label_N) // (num_clients * shards_per_client),
        keep_incomplete_shard=False,
        shuffle=False,
        seed=seed,
    )
    # Sorted here, by a sort that keeps the order of equals, so that no other has a say in it.
    order_N = np.argsort(label_N, kind="stable")
    return _run(partitioner, label_N[order_N], num_clients, order_N)


def iid(labels_or_n: npt.ArrayLike, num_clients: int, seed: int) -> tuple[Indices, ...]:
    """Each client holds an equal random share; sizes differ by one at most. Complete.

    `labels_or_n` is the number of examples, or their labels, of which only the number counts.
    """
    from flwr_datasets.partitioner import IidPartitioner

    given = np.asarray(labels_or_n)
    label_N = _checked_labels(
        given if given.ndim else np.zeros(int(given), np.int64), num_clients, seed
    )
    # The partitioner cuts in the order it is given, and draws nothing itself.
    order_N = np.random.default_rng(seed).permutation(len(label_N))
    return _run(IidPartitioner(num_partitions=num_clients), label_N, num_clients, order_N)


def natural(ids: Sequence[str | int] | npt.NDArray[np.generic]) -> tuple[Indices, ...]:
    """One client for each distinct id, in the ids' sorted order. Complete."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    id_N = np.asarray(ids)
    if id_N.ndim != 1 or len(id_N) == 0:
        raise ValueError(f"ids must be a list of at least one id, got shape {id_N.shape}")
    _, number_N = np.unique(id_N, return_inverse=True)
    return _run(NaturalIdPartitioner(partition_by="label"), number_N, int(number_N.max()) + 1)


def split(
    indices: npt.ArrayLike,
    counts_or_shares: tuple[int, int, int] | tuple[float, float, float],
    rng: np.random.Generator,
) -> Parts:
    """Draw a client's train, validation and test part from its examples, without overlap.

    Three ints are counts, and what they leave over is not used; three floats are shares that
    sum to 1 and use every example, rounded at the two cuts. Each part is ascending.
    """
    index_N = np.asarray(indices, dtype=np.int64)
    n = len(index_N)
    if len(counts_or_shares) != 3 or min(counts_or_shares) < 0:
        raise ValueError(
            f"counts_or_shares must be three numbers (train, validation, test) of at least 0, "
            f"got {counts_or_shares}"
        )
    if all(isinstance(c, (int, np.integer)) for c in counts_or_shares):
        cut = np.cumsum(counts_or_shares)
        if cut[-1] > n:
            raise ValueError(
                f"counts_or_shares asks for {cut[-1]} examples, more than the {n} there are, got "
                f"{counts_or_shares}; ask for fewer, or give the client more"
            )
    else:
        if abs(sum(counts_or_shares) - 1) > 1e-9:
            raise ValueError(
                f"counts_or_shares must be three ints, or three shares that sum to 1, got "
                f"{counts_or_shares}, which sums to {sum(counts_or_shares)}"
            )
        cut = np.rint(np.cumsum(counts_or_shares) * n).astype(np.int64)
    drawn_N = rng.permutation(index_N)
    first, second, end = (int(c) for c in cut)
    return (
        np.sort(drawn_N[:first]),
        np.sort(drawn_N[first:second]),
        np.sort(drawn_N[second:end]),
    )


def partition_hash(parts: Sequence[Sequence[npt.ArrayLike]]) -> str:
    """16 hex digits that name a partition: equal exactly if every index is in the same place.

    `parts` has, client by client, index arrays (train, validation, test). The first 16 digits
    of a SHA-256 over lengths and indices as little-endian int64, so it is the same everywhere.
    """
    digest = hashlib.sha256(b"fedmoe partition")
    digest.update(np.array([len(parts)], "<i8").tobytes())
    for client in parts:
        digest.update(np.array([len(client)], "<i8").tobytes())
        for part in client:
            index_N = np.asarray(part, dtype="<i8")
            digest.update(np.array([len(index_N)], "<i8").tobytes())
            digest.update(index_N.tobytes())
    return digest.hexdigest()[:16]


def _checked_labels(labels: npt.ArrayLike, num_clients: int, seed: int) -> npt.NDArray[np.int64]:
    label_N = np.asarray(labels)
    if label_N.ndim != 1 or len(label_N) == 0 or not np.issubdtype(label_N.dtype, np.integer):
        raise ValueError(
            f"labels must be a list of at least one integer, got shape {label_N.shape} of "
            f"{label_N.dtype}"
        )
    if not 1 <= num_clients <= len(label_N):
        raise ValueError(
            f"num_clients must be between 1 and the {len(label_N)} examples, got {num_clients}"
        )
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return label_N.astype(np.int64)


def _run(
    partitioner: Partitioner,
    label_N: npt.NDArray[np.int64],
    num_clients: int,
    index_N: Indices | None = None,
) -> tuple[Indices, ...]:
    """The indices that each of a partitioner's clients receives; `index_N` renames the rows."""
    from datasets import Dataset

    index_N = np.arange(len(label_N)) if index_N is None else index_N
    # One partitioner draws a progress bar on stderr, whatever the settings say.
    with contextlib.redirect_stderr(io.StringIO()):
        partitioner.dataset = Dataset.from_dict({"index": index_N, "label": label_N})
        return tuple(
            np.sort(np.asarray(partitioner.load_partition(k)["index"][:], dtype=np.int64))
            for k in range(num_clients)
        )
