"""Who is an anchor: the clients that stand for one expert each, from the first round on.

In FedJETs (Dun et al. 2023, arXiv:2306.08586) the data of anchors differ from each other, and the
server knows whose differ: it knows their labels (`by_labels`). No server knows them; `by_means`
finds anchors among clients by what each sends once, before the first round: the mean of the
encoder's features over its training examples, F numbers. That tells about a client's data, though
of no single example. `at_random` is the control.

All give a mapping from client to expert, one client for each expert.

Shape suffixes: K clients, M experts, F features.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmoe.rng import numpy_generator

Anchors = Mapping[int, int]  # the expert of each client that is an anchor


def by_labels(labels: Mapping[int, frozenset[int]], num_experts: int) -> Anchors:
    """The first clients whose labels do not overlap, those of fewest labels first (the paper's).

    Raises:
        ValueError: there are not so many, or a client has no labels.
    """
    if unknown := sorted(k for k, own in labels.items() if not own):
        raise ValueError(
            f"labels must have at least 1 label of each client, got none of client {unknown[0]}; "
            f"find anchors by_means where labels are not known"
        )
    chosen: list[int] = []
    taken: frozenset[int] = frozenset()
    for k in sorted(labels, key=lambda k: (len(labels[k]), k)):
        if len(chosen) < num_experts and not taken & labels[k]:
            chosen.append(k)
            taken |= labels[k]
    if len(chosen) < num_experts:
        raise ValueError(
            f"labels must have {num_experts} clients that share none, one for each expert, got "
            f"{len(chosen)}; take fewer experts, or find anchors by_means"
        )
    return {k: e for e, k in enumerate(sorted(chosen))}


def by_means(mean_F: Mapping[int, Tensor], num_experts: int) -> Anchors:
    """Cluster the clients' means; the anchor of each cluster is the client nearest its centre.

    K-means (Lloyd 1982) from centres that begin far apart: at the client farthest from the mean of
    all, and then each time at the one farthest from the centres so far. Nothing is drawn.

    Raises:
        ValueError: there are fewer clients than experts.
    """
    clients = sorted(mean_F)
    _check_enough(clients, num_experts)
    x_KF = torch.stack([mean_F[k].double() for k in clients])
    apart_K = (x_KF - x_KF.mean(0)).norm(dim=1)
    rows: list[int] = []
    for _ in range(num_experts):
        row = int(apart_K.argmax())
        rows.append(row)
        from_all_K = (x_KF - x_KF[row]).norm(dim=1)
        apart_K = from_all_K if len(rows) == 1 else torch.minimum(apart_K, from_all_K)
    centre_MF = x_KF[rows]
    while True:
        own_K = torch.cdist(x_KF, centre_MF).argmin(1)
        new_MF = torch.stack([
            x_KF[own_K == m].mean(0) if bool((own_K == m).any()) else centre_MF[m]
            for m in range(num_experts)
        ])
        if torch.equal(new_MF, centre_MF):
            break
        centre_MF = new_MF
    anchors: dict[int, int] = {}
    for m in range(num_experts):
        nearest = torch.cdist(centre_MF[m : m + 1], x_KF)[0].argsort(stable=True).tolist()
        row = next(row for row in nearest if clients[row] not in anchors)
        anchors[clients[row]] = m
    return anchors


def at_random(clients: Sequence[int], num_experts: int, seed: int) -> Anchors:
    """Clients drawn without preference.

    Raises:
        ValueError: there are fewer clients than experts.
    """
    _check_enough(clients, num_experts)
    drawn = numpy_generator(seed).choice(sorted(clients), num_experts, replace=False)
    return {int(k): e for e, k in enumerate(drawn)}


def _check_enough(clients: Sequence[int], num_experts: int) -> None:
    if num_experts > len(clients):
        raise ValueError(
            f"num_experts must be at most the {len(clients)} clients, one of them an anchor for "
            f"each expert, got {num_experts}"
        )
