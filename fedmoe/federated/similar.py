"""What similar clients know: FedMoE's Eq. 4 to 6, and balanced demand for experts (ours).

Mei et al. 2024, arXiv:2408.11304. Shape suffixes: K clients, L MoE layers, E experts in a layer,
N = L * E.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


def similarity(
    p_KLE: Tensor, *, centred: bool = False, error_K: Tensor | None = None
) -> Tensor:
    """Cosine of every two clients' activation shares, over all layers and experts (Eq. 4).

    Args:
        centred: first subtract the mean client (ours). Where gates are still undecided all
            shares are alike and every plain cosine is near 1; what differs is left after this.
        error_K: how far shares are expected to be, squared and summed, from those that endless
            data would have shown (ours). The result is then an estimate of the cosine of those:
            errors make every client longer and no two alike, so that a plain cosine of few
            examples is too small (Spearman 1904, "The Proof and Measurement of Association between
            Two Things": attenuation). No client counts as more than half error, whatever it says,
            so that what one client tells of itself cannot move the others far.

    Returns:
        (K, K), symmetric, from -1 to 1. A client whose shares are all 0 (or just the mean) is
        similar to none.
    """
    p_KN = p_KLE.double().flatten(1)
    if centred:
        p_KN = p_KN - p_KN.mean(0)
    if error_K is not None:
        return _without_error(p_KN, error_K.double(), centred)
    norm_K1 = p_KN.norm(dim=1, keepdim=True)
    unit_KN = torch.where(norm_K1 > 1e-12, p_KN / norm_K1.clamp_min(1e-12), 0.0)
    return unit_KN @ unit_KN.T


def _without_error(p_KN: Tensor, error_K: Tensor, centred: bool) -> Tensor:
    gram_KK = p_KN @ p_KN.T
    half_K = gram_KK.diagonal() / 2
    error_K = torch.minimum(error_K.clamp_min(0), half_K)
    error_KK = error_K.diag()
    if centred:  # as of the clients' shares, of their errors' too
        error_KK = error_KK - error_K[:, None] / len(error_K) - error_K / len(error_K)
        error_KK = error_KK + error_K.sum() / len(error_K) ** 2
    gram_KK = gram_KK - error_KK
    norm_K = torch.maximum(gram_KK.diagonal(), half_K).sqrt()
    unit_K = torch.where(norm_K > 1e-12, 1 / norm_K.clamp_min(1e-12), 0.0)
    sim_KK = (unit_K[:, None] * gram_KK * unit_K).clamp(-1, 1)
    return sim_KK.diagonal_scatter((unit_K > 0).double())


def neighbours(sim_KK: Tensor, client: int, count: int, among: Sequence[int]) -> list[int]:
    """The `count` positions most similar to `client`, itself left out; ties by position (Eq. 5)."""
    row = sim_KK[client].tolist()
    return heapq.nsmallest(count, (k for k in among if k != client), key=lambda k: (-row[k], k))


def advice(
    p_KLE: Tensor, sim_KK: Tensor, client: int, near: Sequence[int], weight_K: Tensor | None = None
) -> Tensor | None:
    """The near clients' shares, averaged by their similarity (Eq. 6), shape (L, E).

    Args:
        weight_K: further weights, for instance data sizes (stage one's prediction).

    Returns:
        None when no near client has a similarity above 0: then there is no advice.
    """
    trust_K = torch.zeros(len(sim_KK), dtype=torch.float64)
    for k in near:
        trust_K[k] = sim_KK[client, k].clamp_min(0.0)
    if weight_K is not None:
        trust_K = trust_K * weight_K.double()
    if trust_K.sum() <= 0:
        return None
    return torch.einsum("k,kle->le", trust_K, p_KLE.double()) / trust_K.sum()


def smoothed(p_KLE: Tensor, sim_KK: Tensor, count: int) -> Tensor:
    """Each client's shares averaged with those of its `count` most similar clients (ours).

    A client itself has similarity 1. A few examples measure shares badly; similar clients' help.
    """
    out_KLE = p_KLE.double().clone()
    everyone = range(len(p_KLE))
    for k in everyone:
        near = neighbours(sim_KK, k, count, everyone)
        mean_LE = advice(p_KLE, sim_KK, k, [k, *near])
        if mean_LE is not None:
            out_KLE[k] = mean_LE
    return out_KLE


def smoothed_in_groups(
    p_KLE: Tensor, otherwise_KLE: Tensor, group_K: Tensor, count: int
) -> Tensor:
    """The mean shares of each client's group, where it has `count` others in it or more (ours).

    Where it has not, `otherwise_KLE`.
    """
    out_KLE = otherwise_KLE.clone()
    for group in sorted(set(group_K.tolist())):
        here_K = group_K == group
        if int(here_K.sum()) - 1 >= count:
            out_KLE[here_K] = p_KLE[here_K].mean(0).to(out_KLE)
    return out_KLE


def alike_groups(sim_KK: Tensor, least: float) -> list[int]:
    """Groups of clients that are alike: agglomerative clustering with average linkage (ours).

    The two groups with the highest mean similarity between their members are joined, again and
    again, while that mean is at least `least`.

    Returns:
        For each client its group's number; groups are numbered by their first member.
    """
    groups = [[k] for k in range(len(sim_KK))]
    link_GG = sim_KK.double().clone().fill_diagonal_(-torch.inf)
    while len(groups) > 1:
        best = int(link_GG.argmax())
        a, b = sorted(divmod(best, len(groups)))
        if link_GG[a, b] < least:
            break
        size_a, size_b = len(groups[a]), len(groups[b])
        joined_G = (size_a * link_GG[a] + size_b * link_GG[b]) / (size_a + size_b)
        link_GG[a], link_GG[:, a] = joined_G, joined_G
        link_GG[a, a] = -torch.inf
        keep = [g for g in range(len(groups)) if g != b]
        link_GG = link_GG[keep][:, keep]
        groups[a] += groups.pop(b)
    number = {k: g for g, members in enumerate(sorted(map(sorted, groups))) for k in members}
    return [number[k] for k in range(len(sim_KK))]


def balanced_demand(p_KLE: Tensor, room_K: Tensor, sharpness: float, steps: int = 200) -> Tensor:
    """Shares that ask for every expert equally often over all clients, preferences kept (ours).

    Greedy choice by frequency sends everybody to the experts that the gate likes anyway: all
    clients hold the same few, which then serve contradicting data, and the others lie idle. Here
    each expert's share is first compared with what other clients give it (a standard score over
    clients), then a Sinkhorn iteration scales the table so that in each layer every expert is
    asked for equally, and every client asks in proportion to the experts it has room for.
    Balanced assignment in federated MoEs is argued for by FLEX-MoE, which solves a linear
    programme; entropic transport (Cuturi 2013, arXiv:1306.0895) is the smooth form of it.

    Args:
        p_KLE: shares; a layer's sum to 1, columns that are 0 for all clients are experts that do
            not exist and stay 0.
        room_K: experts per layer that each client can hold.
        sharpness: how strongly preferences count, above 0; standard scores times this are
            log-demands.

    Returns:
        (K, L, E), every layer of every client sums to 1.
    """
    if not sharpness > 0:
        raise ValueError(f"sharpness must be above 0, got {sharpness}")
    if bool((room_K < 1).any()):
        raise ValueError(f"room_K must be at least 1 expert per client, got {room_K.tolist()}")
    mean_LE, std_LE = p_KLE.double().mean(0), p_KLE.double().std(0, correction=0)
    exists_LE = mean_LE > 0
    score_KLE = (p_KLE.double() - mean_LE) / std_LE.clamp_min(1e-12)
    log_KLE = (sharpness * score_KLE).masked_fill(~exists_LE, -torch.inf)
    row_K1 = (room_K.double() / room_K.double().sum()).log()[:, None]
    out_KLE = torch.zeros_like(log_KLE)
    for layer in range(log_KLE.shape[1]):
        exists_E = exists_LE[layer]
        log_KE = log_KLE[:, layer, exists_E]
        column = -torch.tensor(float(log_KE.shape[1])).double().log()
        for _ in range(steps):
            log_KE = log_KE - log_KE.logsumexp(0, keepdim=True) + column
            log_KE = log_KE - log_KE.logsumexp(1, keepdim=True) + row_K1
        out_KLE[:, layer, exists_E] = log_KE.softmax(1)
    return out_KLE
