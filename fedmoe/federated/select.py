"""Which experts a client gets: the sub-MoE of largest coverage that its memory holds.

FedMoE (Mei et al. 2024, arXiv:2408.11304), Eq. 3: maximise theta so that in every MoE layer the
chosen experts receive at least the share theta of the client's activations, and all parts fit the
client's memory. The paper bisects theta; theta only matters where a layer's prefix of experts
grows, so here those breakpoints are searched and the result is exact.

Shape suffixes: L MoE layers, E experts in a layer.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedmoe.state import parameter_bytes
from fedmoe.types import ClientInfo, ExpertId, MoEState, SubMoE


def largest_coverage(
    p_LE: Tensor,
    expert_bytes: Mapping[ExpertId, int],
    memory_bytes: int | None,
    *,
    shared_bytes: int = 0,
    min_experts: int = 1,
    theta_cap: float = 1.0,
) -> tuple[SubMoE, float]:
    """The sub-MoE for the largest theta that fits, and that theta.

    Of each layer it takes the shortest prefix of experts, by falling p, whose sum reaches theta,
    and at least `min_experts`. Equal p are ordered by expert number.

    Args:
        p_LE: share of the client's activations per expert; every layer sums to 1 (or is all 0,
            then the layer is covered by its minimum).
        expert_bytes: memory of each expert that exists.
        memory_bytes: limit for shared parts and experts together; None for no limit.
        theta_cap: coverage that is enough; less than 1 saves memory and traffic.

    Raises:
        ValueError: not even the minimum fits, or an argument is out of range.
    """
    if min_experts < 1:
        raise ValueError(f"min_experts must be at least 1 per layer, got {min_experts}")
    if not 0 <= theta_cap <= 1:
        raise ValueError(f"theta_cap must be between 0 and 1, got {theta_cap}")
    layers = sorted({e.layer for e in expert_bytes})
    orders = {
        layer: sorted(
            (e for e in expert_bytes if e.layer == layer),
            key=lambda e: (-float(p_LE[e.layer, e.expert]), e.expert),
        )
        for layer in layers
    }
    for layer, order in orders.items():
        if len(order) < min_experts:
            raise ValueError(
                f"min_experts must be at most the {len(order)} experts of layer {layer}, "
                f"got {min_experts}"
            )
    sums = {layer: _cumulative(p_LE, order) for layer, order in orders.items()}

    def prefix(theta: float) -> SubMoE:
        return frozenset(
            e
            for layer, order in orders.items()
            for e in order[: max(min_experts, _first_reaching(sums[layer], theta))]
        )

    def fits(sub_moe: SubMoE) -> bool:
        if memory_bytes is None:
            return True
        return shared_bytes + sum(expert_bytes[e] for e in sub_moe) <= memory_bytes

    minimum = prefix(0.0)
    if not fits(minimum):
        needed = shared_bytes + sum(expert_bytes[e] for e in minimum)
        raise ValueError(
            f"memory_bytes must be at least {needed} for the shared part and {min_experts} "
            f"expert(s) in each of {len(layers)} MoE layer(s), got {memory_bytes}; give the "
            f"client more memory, or make the model's experts smaller"
        )
    # Memory grows with theta, so the largest that fits is found by bisecting the breakpoints.
    steps = sorted({s for layer in layers for s in sums[layer] if s <= theta_cap} | {0.0})
    if theta_cap not in steps:
        steps.append(theta_cap)
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(prefix(steps[middle])) else (low, middle - 1)
    return prefix(steps[low]), steps[low]


def experts_that_fit(model: MoEState, memory_bytes: int | None) -> int:
    """How many experts per MoE layer fit beside the shared part, the same in every layer.

    Raises:
        ValueError: not even one per layer fits.
    """
    sizes = expert_bytes_of(model)
    layers = sorted({e.layer for e in sizes})
    most = max(sum(e.layer == layer for e in sizes) for layer in layers) if layers else 0
    if memory_bytes is None:
        return most
    per_layer = sum(max(b for e, b in sizes.items() if e.layer == layer) for layer in layers)
    room = memory_bytes - parameter_bytes(model.shared)
    if layers and room < per_layer:
        raise ValueError(
            f"memory_bytes must be at least {memory_bytes - room + per_layer} for the shared part "
            f"and one expert in each of {len(layers)} MoE layer(s), got {memory_bytes}"
        )
    return min(most, room // per_layer) if layers else 0


def expert_bytes_of(model: MoEState) -> dict[ExpertId, int]:
    """Memory of each expert's parameters, its gate rows included."""
    return {e: parameter_bytes(state) for e, state in model.experts.items()}


def memory_for(model: MoEState, share: float) -> int:
    """Bytes of the shared part and of this share of the experts, 0 to 1.

    Raises:
        ValueError: share out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1 of the experts, got {share}")
    total = sum(expert_bytes_of(model).values())
    return parameter_bytes(model.shared) + int(share * total + 0.5)


def fits_whole(client: ClientInfo, model: MoEState) -> bool:
    """Whether the client can hold every expert at once."""
    return client.memory_bytes is None or client.memory_bytes >= memory_for(model, 1.0)


def _cumulative(p_LE: Tensor, order: Sequence[ExpertId]) -> list[float]:
    sums, total = [], 0.0
    for e in order:
        total += float(p_LE[e.layer, e.expert])
        sums.append(total)
    return sums


def _first_reaching(sums: Sequence[float], theta: float) -> int:
    """Length of the shortest prefix whose sum is at least theta; all, if none is.

    0 where nothing was activated at all: such a layer has no say in theta.
    """
    if theta <= 0 or sums[-1] <= 0:
        return 0
    # One part in 1e12 of slack: a full prefix sums to 1 only up to rounding.
    return min(len(sums), bisect_left(sums, theta * (1 - 1e-12) - 1e-15) + 1)
