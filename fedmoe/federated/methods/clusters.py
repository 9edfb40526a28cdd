"""Several models for all clients, each client with its own use of them: IFCA and FedMix.

Both train a `nn.members.Members`, M whole models as the experts of one layer, and every client is
sent all M each round, whatever its memory. M times the model on the wire is what they cost.

IFCA: Ghosh, Chung, Yin, Ramchandran 2020, "An Efficient Framework for Clustered Federated
Learning", arXiv:2006.04088. A client takes the model with the lowest loss on its training data,
trains it and sends back that one alone. Ours is the paper's variant that averages models; the gate
of the model is a `ChosenGate`, and the strategy FedAvg. Who never trained is served by all models
alike, since without labels there is no loss to choose by.

FedMix: Reisser, Louizos, Gavves, Welling 2021, "Federated Mixture of Experts", arXiv:2107.06724. A
client mixes the outputs of all models by a gate of its own, trains all of them and the gate, and
sends back the models. That is FedAvg with a personal gate; weights by gate mass are how we read
that clients with like data shall share a model.
"""

import math
from dataclasses import dataclass

from fedmoe.federated.local import LocalMethod, LocalTask, loss_on
from fedmoe.state import moe_layers
from fedmoe.types import ClientUpdate, ExpertId

SCALE = 2**8  # steps of gate mass within one token: sums of weights must be whole numbers


@dataclass(frozen=True)
class BestMember(LocalMethod):
    """IFCA's client: it uses and trains the one model that fits its training data best."""

    def begin(self, task: LocalTask) -> None:
        """Set the gate to the model of the lowest mean loss; of equals, to the first.

        Raises:
            ValueError: the task's model is no mixture of whole models with a gate to be set.
        """
        layers = moe_layers(task.model)
        if len(layers) != 1 or not hasattr(layers[0][1].gate, "member"):
            raise ValueError(
                f"the model must have 1 MoE layer with a gate that is set from outside, as Members "
                f"with a ChosenGate has, got {len(layers)} MoE layer(s) in a "
                f"{type(task.model).__name__}"
            )
        [(_, moe)] = layers
        losses = {}
        for member in moe.held:
            moe.gate.member = member  # type: ignore[assignment]
            loss = loss_on(task.model, task.examples, task.device)
            losses[member] = loss if math.isfinite(loss) else math.inf
        moe.gate.member = min(losses, key=lambda e: (losses[e], e))  # type: ignore[assignment]


def by_mass(update: ClientUpdate, expert: ExpertId) -> int:
    """Tokens that the client sent this expert, each counted by its gate weight, on a fixed grid."""
    mass = float(update.profile.weight_LE[expert.layer, expert.expert])
    return round(SCALE * mass)
