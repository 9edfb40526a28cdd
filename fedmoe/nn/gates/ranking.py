"""A gate that ranks whole models: two linear maps and a softmax, on an encoder's features.

The expert ranker of FedJETs (Dun et al. 2023, arXiv:2306.08586). The paper trains with the scores
of the held experts and uses the best one alone; whether those scores are rescaled to sum to 1
cannot be read from it, so here `gate_mass` says (see `fedmoe.nn.ranking.Ranking`).

Shape suffixes: T tokens, F features, E experts.
"""

from torch import Tensor, nn

from fedmoe.nn.ranking import GateMass, Ranking, Use, linear


class RankingGate(Ranking):
    """The paper's: softmax over all experts of a two-layer perceptron, trained with the experts."""

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        *,
        use: Use = "best",
        gate_mass: GateMass = "renormalise",
    ) -> None:
        """`use` and `gate_mass` are those of `Ranking`."""
        super().__init__(width, num_experts, use, gate_mass)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, num_experts)

    def rank(self, feature_TF: Tensor) -> Tensor:
        return linear(self.down, linear(self.up, feature_TF).relu())
