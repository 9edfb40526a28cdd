"""The feed-forward expert: two linear maps around a ReLU or a GELU.

Shape suffixes: N tokens of this expert, D width, F hidden width, O output width.
"""

from typing import Literal

from torch import Tensor, nn

Activation = Literal["relu", "gelu"]


class FFN(nn.Module):
    """(N, dim) -> (N, out); `out` is `dim` unless given. Most language models have no `bias`."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        out: int | None = None,
        activation: Activation = "relu",
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ("relu", "gelu"):
            raise ValueError(f'activation must be "relu" or "gelu", got {activation!r}')
        self.dim, self.hidden, self.activation = dim, hidden, activation
        self.out_dim = dim if out is None else out
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, self.out_dim, bias=bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        y_NO: Tensor = self.down(activate(self.up(x_ND), self.activation))
        return y_NO


def activate(a_NF: Tensor, activation: Activation) -> Tensor:
    return a_NF.relu() if activation == "relu" else nn.functional.gelu(a_NF)
