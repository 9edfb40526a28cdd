"""A small model with experts for the next character of a text.

After Bengio et al. (2003), "A Neural Probabilistic Language Model" (JMLR 3): the embeddings of the
last few symbols, side by side, through one hidden layer. Ours has characters for words, and experts
for the output layer.

Shape suffixes: N examples, T characters of context, D embedding width.
"""

from torch import Tensor, nn

from fedmoe.nn.classifier import StemAndHead, moe_head
from fedmoe.nn.gates.topk import GateMass
from fedmoe.nn.init import seeded


def character_model(
    context: int = 16,
    embedding: int = 16,
    dim: int = 128,
    num_experts: int = 16,
    hidden: int = 64,
    k: int = 2,
    num_classes: int = 65,
    seed: int = 0,
    gate_mass: GateMass = "renormalise",
) -> StemAndHead:
    """Embeddings of `context` characters, a hidden layer, experts that give the next one.

    Takes (N, context) codes from 0 to `num_classes` - 1 of any integer type, and gives logits over
    the same codes. 235,680 parameters at the defaults.
    """

    def build() -> StemAndHead:
        head = moe_head(dim, hidden, num_classes, num_experts, k, gate_mass)
        return StemAndHead(CharacterStem(num_classes, context, embedding, dim), head)

    return seeded(build, seed)


class CharacterStem(nn.Module):
    """(N, T) codes -> (N, dim) features of all T characters and their places."""

    def __init__(self, num_codes: int, context: int, embedding: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_codes, embedding)
        self.mix = nn.Linear(context * embedding, dim)

    def forward(self, code_NT: Tensor) -> Tensor:
        x_NTD: Tensor = self.embed(code_NT.long())
        y_ND: Tensor = self.mix(x_NTD.flatten(1))
        return y_ND.relu()
