"""HeteroFL and FedRolex: devices of different memory train slices of different size.

HeteroFL: Diao, Ding, Tarokh 2021, "HeteroFL: Computation and Communication Efficient Federated
Learning for Heterogeneous Clients", arXiv:2010.01264. A device gets the first part of every
layer's units, as many as fit, so that small models are nested in large ones.
FedRolex: Alam, Liu, Yan, Zhang 2022, "FedRolex: Model-Heterogeneous Federated Learning with
Rolling Sub-Model Extraction", arXiv:2212.01548. The part is a window that moves on by one unit a
round, so that in time all devices train all units.

How ours differs: a slice is an expert, some units of the one hidden layer that is cut into
experts; all other layers go whole to everybody, where the papers cut every layer. The gate stays,
and gives each token to the best of the slices that are held, so outputs keep their scale and
HeteroFL's scaler is not needed; its masked loss and static batch normalisation are left out.
FedRolex's window moves by one expert. Each slice is averaged over those who held it, as in both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmoe.federated.fedavg import FedAvg, ServerState
from fedmoe.federated.select import experts_that_fit
from fedmoe.types import Assignment, ClientInfo, ExpertId, MoEState, SubMoE


@dataclass(frozen=True)
class HeteroFL(FedAvg):
    """Each client holds the first experts of every layer, as many as its memory takes."""

    def assign(
        self, state: ServerState, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        """Raises ValueError for a client whose memory does not hold one expert per layer."""
        parts = {c.id: window(state.model, c, self.start(state.round)) for c in clients}
        return {
            k: Assignment(state.round, state.model.only(part), part) for k, part in parts.items()
        }

    def start(self, round: int) -> int:
        """Where the slices of a round begin."""
        return 0


@dataclass(frozen=True)
class FedRolex(HeteroFL):
    """As HeteroFL, but the slices begin one expert further on in each round, and go round."""

    def start(self, round: int) -> int:
        return round


def window(model: MoEState, client: ClientInfo, start: int) -> SubMoE:
    """Of every layer as many consecutive experts as fit the client's memory, cyclically."""
    count = experts_that_fit(model, client.memory_bytes)
    chosen: set[ExpertId] = set()
    for layer in {e.layer for e in model.experts}:
        experts = sorted(e for e in model.experts if e.layer == layer)
        shift = start % len(experts)
        chosen |= set((experts[shift:] + experts[:shift])[:count])
    return frozenset(chosen)
