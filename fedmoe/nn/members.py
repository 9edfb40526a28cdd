"""A mixture whose experts are whole models: one MoE layer with a model in each place.

`Members` is what a server of several models and its clients hold. Its gate makes the method:
- FedJETs (Dun et al. 2023, arXiv:2306.08586): a `RankingGate`, averaged over clients, on the
  features of a frozen encoder;
- FedMix (Reisser et al. 2021, arXiv:2107.06724): a `RankingGate` on the input itself, which the
  client keeps (`of_gate` names its parameters);
- IFCA (Ghosh et al. 2020, arXiv:2006.04088): a `ChosenGate`, set from outside.

A client holds any of the members, as it holds experts of any MoE layer: absent ones take no memory,
`fedmoe.profile.watch_gates` sees the routing, and a gate may rank members that are not here.

An example travels through the layer as one row of numbers: its input, flattened, and behind it the
encoder's features, if there is an encoder. A gate reads the last columns, as many as it wants.

Shape suffixes: N examples, D numbers of a row, F features, E members, C classes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedmoe.nn.encoder import check_widths, encoded
from fedmoe.nn.moe import MoE
from fedmoe.types import Routing

Mixes = Literal["probabilities", "logits"]
Reads = Literal["input", "features"]


class Members(nn.Module):
    """Models of one task, mixed by a gate, with or without an encoder that never trains.

    What is mixed are the members' class probabilities; the result is the logarithm of the mixture,
    so its cross-entropy is the mixture's. Weight that no held member received, because a gate gave
    it to absent ones, goes to all classes evenly. With `mixes="logits"` the weighted sum of the
    members' logits is the result, as it is.
    """

    def __init__(
        self,
        gate: nn.Module,
        members: Sequence[nn.Module],
        num_classes: int,
        input_shape: Sequence[int],
        *,
        encoder: nn.Module | None = None,
        num_features: int = 0,
        mixes: Mixes = "probabilities",
        reads: Reads = "input",
    ) -> None:
        """
        Args:
            members: each from (N, *input_shape) to logits (N, C).
            encoder: from (N, *input_shape) to (N, `num_features`); it gets no gradient.
            reads: what members are shown: the input, or the features in its place, so that the
                encoder is a trunk that all share, and each is from (N, F) to (N, C).

        Raises:
            ValueError: an argument is out of range, or gate and encoder disagree on the width.
        """
        super().__init__()
        if mixes not in ("probabilities", "logits"):
            raise ValueError(f'mixes must be "probabilities" or "logits", got {mixes!r}')
        if reads not in ("input", "features"):
            raise ValueError(f'reads must be "input" or "features", got {reads!r}')
        if (encoder is None) != (num_features == 0):
            raise ValueError(
                f"num_features must be the width of the encoder's output, and 0 without an "
                f"encoder, got {num_features} {'without' if encoder is None else 'with'} one"
            )
        if reads == "features" and encoder is None:
            raise ValueError('reads must be "input" where there is no encoder, got "features"')
        check_widths(encoder, num_features, getattr(gate, "width", None))
        self.num_classes, self.num_features, self.mixes = num_classes, num_features, mixes
        self.input_shape = tuple(input_shape)
        self.num_inputs = math.prod(self.input_shape)
        self.encoder = encoder
        seen = (0, self.input_shape) if reads == "input" else (self.num_inputs, (num_features,))
        self.mixture = MoE(
            gate,
            {e: Member(model, *seen, num_classes, mixes) for e, model in enumerate(members)},
            len(members),
            num_classes,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (N, *input_shape), or what `rows` made of them, to log-probabilities (N, C), or
        logits."""
        y_NC: Tensor = self.mixture(self.rows(x))
        if self.mixes == "logits":
            return y_NC
        missing_N1 = (1 - y_NC.sum(-1, keepdim=True)).clamp_min(0)
        p_NC = y_NC + missing_N1 / self.num_classes
        return p_NC.clamp_min(torch.finfo(p_NC.dtype).tiny).log()

    def rows(self, x: Tensor) -> Tensor:
        """Inputs, as they are or as rows already, to rows (N, D), the encoder's features behind.

        Raises:
            ValueError: `x` is neither, or the encoder gives another width than `num_features`.
        """
        if self.is_row(x):
            return x
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(
                f"x must have shape (N, {', '.join(map(str, self.input_shape))}), or be rows of "
                f"{self.num_inputs + self.num_features} numbers, got {tuple(x.shape)}"
            )
        return self.joined(x, self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the encoder says of inputs, (N, F), without a gradient; (N, 0) without encoder."""
        if self.encoder is None:
            return torch.empty(len(x), 0, device=x.device)
        return encoded(self.encoder, x, self.num_features)

    def joined(self, x: Tensor, feature_NF: Tensor) -> Tensor:
        """Inputs and their features as rows, (N, D) float32."""
        return torch.cat([x.flatten(1).float(), feature_NF.float()], 1)

    def is_row(self, x: Tensor) -> bool:
        """Whether these are rows already; without an encoder, flat inputs are their own rows."""
        width = self.num_inputs + self.num_features
        return x.dim() == 2 and x.shape[1] == width and x.is_floating_point()


class Member(nn.Module):
    """One model of a mixture, on rows: it reads its columns, and gives what is to be mixed."""

    def __init__(
        self,
        model: nn.Module,
        start: int,
        shape: Sequence[int],
        num_classes: int,
        mixes: Mixes,
    ) -> None:
        super().__init__()
        self.model, self.start, self.shape = model, start, tuple(shape)
        self.stop = start + math.prod(self.shape)
        self.out_dim, self.mixes = num_classes, mixes

    def forward(self, row_ND: Tensor) -> Tensor:
        x = row_ND[:, self.start : self.stop].reshape(-1, *self.shape)
        logit_NC: Tensor = self.model(x)
        return logit_NC.float().softmax(-1) if self.mixes == "probabilities" else logit_NC


class ChosenGate(nn.Module):
    """Every example goes to the one member that `member` names; to none where it is absent.

    While nobody has chosen (None), it goes to all that are present, evenly.
    """

    row_names: tuple[str, ...] = ()

    def __init__(self, num_experts: int, member: int | None = None) -> None:
        super().__init__()
        self.num_experts, self.member = num_experts, member

    def forward(self, x_TD: Tensor, present_E: Tensor) -> Routing:
        weight_E = present_E.float()
        if self.member is None:
            weight_E = weight_E / weight_E.sum().clamp_min(1.0)
        else:
            weight_E = weight_E * (torch.arange(self.num_experts) == self.member).to(weight_E)
        weight_TE = weight_E.expand(len(x_TD), -1)
        return Routing(weight_TE, weight_TE)


def of_gate(name: str) -> bool:
    """True of the parameters of a gate of `Members` that has no row for each of them."""
    return name.startswith("mixture.gate.")
