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
    """The corners of what the clients' means span: those that are no mixture of others.

    The mean of a client with several kinds of data is a mixture of those of the kinds, so clients
    of one kind alone are corners, and where there is one of each kind they are found, however many
    others there are between them. First comes the client farthest from the mean of all, and then
    each time the one farthest from the flat through those found: successive projection (Gillis,
    Vavasis 2014, "Fast and Robust Recursive Algorithms for Separable Nonnegative Matrix
    Factorization", arXiv:1208.1237), here from the first corner and not from 0. Where all that is
    left lies in that flat, the farthest from its nearest corner comes next. Nothing is drawn.

    Raises:
        ValueError: there are fewer clients than experts.
    """
    clients = sorted(mean_F)
    _check_enough(clients, num_experts)
    x_KF = torch.stack([mean_F[k].double() for k in clients])
    rows = [int((x_KF - x_KF.mean(0)).norm(dim=1).argmax())]
    left_KF = x_KF - x_KF[rows[0]]  # from the flat through the corners
    least = 1e-9 * float(left_KF.norm(dim=1).max())
    while len(rows) < num_experts:
        far_K = left_KF.norm(dim=1)
        if float(far_K.max()) <= least:
            far_K = torch.cdist(x_KF, x_KF[rows]).min(1).values
            far_K[rows] = -1
        row = int(far_K.argmax())
        rows.append(row)
        if (length := left_KF[row].norm()) > least:
            unit_F = left_KF[row] / length
            left_KF = left_KF - (left_KF @ unit_F)[:, None] * unit_F
    return {clients[row]: e for e, row in enumerate(sorted(rows))}


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
