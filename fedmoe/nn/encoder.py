"""Encoders that never train, and heads on their features.

FedJETs (Dun et al. 2023, arXiv:2306.08586) has one: the "common expert", trained beforehand on
other data. A head on it is the plainest use of an encoder, and so what FedJETs must beat: a linear
one, prototypes, the means of each class (Snell et al. 2017, arXiv:1703.05175), or a discriminant.

Shape suffixes: N examples, F features, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedmoe.nn.classifier import StemAndHead
from fedmoe.nn.discriminant import Moments, discriminant, moments_of
from fedmoe.nn.experts.ffn import FFN, activate


class Encoder(nn.Module):
    """A classifier with one hidden layer behind its stem, up to that layer: (N, ...) -> (N, F).

    Each example's features have mean 0 and deviation 1, so that what reads them learns alike from
    a weak and from a good encoder.
    """

    def __init__(self, classifier: StemAndHead) -> None:
        """Raises ValueError where the head is no feed-forward one."""
        super().__init__()
        head = classifier.head
        if not isinstance(head, FFN):
            raise ValueError(f"the classifier's head must be an FFN, got {type(head).__name__}")
        self.stem, self.up, self.activation = classifier.stem, head.up, head.activation
        self.out_dim = head.hidden

    def forward(self, x: Tensor) -> Tensor:
        feature_NF = activate(self.up(self.stem(x)), self.activation)
        return nn.functional.layer_norm(feature_NF, (self.out_dim,))


class PrototypeHead(nn.Module):
    """The class whose mean feature is nearest: logits are negative squared distances over F.

    Its parameters are sums and counts over examples, so the mean of several clients' parameters,
    every client weighing the same, is the head of all their examples together. A class without
    examples is never predicted.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.sum_CF = nn.Parameter(torch.zeros(num_classes, num_features))
        self.count_C = nn.Parameter(torch.zeros(num_classes))

    def forward(self, feature_NF: Tensor) -> Tensor:
        known_C = self.count_C > 0
        mean_CF = self.sum_CF / self.count_C.where(known_C, 1.0)[:, None]
        distance_NC = torch.cdist(feature_NF, mean_CF).square() / feature_NF.shape[1]
        return -distance_NC.masked_fill(~known_C, torch.inf)

    @torch.no_grad()
    def fit(self, feature_NF: Tensor, y_N: Tensor) -> None:
        """Set the head to that of these examples alone."""
        self.count_C.copy_(y_N.bincount(minlength=len(self.count_C)))
        self.sum_CF.zero_().index_add_(0, y_N, feature_NF.to(self.sum_CF.dtype))


class DiscriminantHead(nn.Module):
    """The linear discriminant of the classes (`nn.discriminant`), all of them alike likely.

    As `PrototypeHead`, whose distances it measures in units of how much the features of one class
    vary, in each direction: its parameters are sums over examples too, and clients' are averaged.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.sum_CF = nn.Parameter(torch.zeros(num_classes, num_features))
        self.count_C = nn.Parameter(torch.zeros(num_classes))
        self.second_FF = nn.Parameter(torch.zeros(num_features, num_features))

    def forward(self, feature_NF: Tensor) -> Tensor:
        weight_CF, bias_C = discriminant(Moments(self.count_C, self.sum_CF, self.second_FF))
        dtype = feature_NF.dtype
        return nn.functional.linear(feature_NF, weight_CF.to(dtype), bias_C.to(dtype))

    @torch.no_grad()
    def fit(self, feature_NF: Tensor, y_N: Tensor) -> None:
        """Set the head to that of these examples alone."""
        own = moments_of(feature_NF.to(self.sum_CF.dtype), y_N, len(self.count_C))
        self.count_C.copy_(own.count_C)
        self.sum_CF.copy_(own.sum_CF)
        self.second_FF.copy_(own.second_FF)


class Encoded(nn.Module):
    """A head on the features of an encoder that never trains: the plainest use of one.

    It takes inputs (N, *input_shape), or in their place features (N, F) computed before. Which of
    the two they are is told by their shape, so the shapes must differ.
    """

    def __init__(
        self, encoder: nn.Module, num_features: int, head: nn.Module, input_shape: Sequence[int]
    ) -> None:
        """Raises ValueError where the encoder's features are not `num_features` wide, or inputs
        look like them.
        """
        super().__init__()
        check_widths(encoder, num_features)
        self.encoder, self.num_features, self.head = encoder, num_features, head
        self.input_shape = tuple(input_shape)
        if self.input_shape == (num_features,):
            raise ValueError(
                f"input_shape must differ from that of the {num_features} features, got "
                f"{self.input_shape}: give inputs another shape, such as (1, {num_features})"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Inputs, or what `rows` made of them, to what the head gives, (N, C)."""
        y_NC: Tensor = self.head(self.rows(x))
        return y_NC

    def rows(self, x: Tensor) -> Tensor:
        """Inputs, or their features, to features (N, F).

        Raises:
            ValueError: `x` is neither, or the encoder gives another width than `num_features`.
        """
        if self.is_row(x):
            return x
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(
                f"x must have shape (N, {', '.join(map(str, self.input_shape))}), or be their "
                f"{self.num_features} features, got {tuple(x.shape)}"
            )
        return self.features(x)

    def features(self, x: Tensor) -> Tensor:
        return encoded(self.encoder, x, self.num_features)

    def joined(self, x: Tensor, feature_NF: Tensor) -> Tensor:
        return feature_NF

    def is_row(self, x: Tensor) -> bool:
        """Whether these are features already."""
        return tuple(x.shape[1:]) == (self.num_features,)


def encoded(encoder: nn.Module, x: Tensor, num_features: int) -> Tensor:
    """The encoder's features (N, `num_features`), without a gradient and in evaluation mode.

    Raises:
        ValueError: they have another width.
    """
    encoder.eval()
    with torch.no_grad():
        feature_NF: Tensor = encoder(x)
    check_widths(encoder, num_features, got=feature_NF.shape[-1])
    return feature_NF


def check_widths(
    encoder: nn.Module | None,
    num_features: int,
    gate: int | None = None,
    got: int | None = None,
) -> None:
    """Raise ValueError where encoder and reader do not agree on the width of features.

    Args:
        num_features: what is expected of the encoder.
        gate: the width that a gate reads; None: it does not say.
        got: the width that the encoder gave; None: the one that it tells, if it does.
    """
    if encoder is None:
        return
    told = getattr(encoder, "out_dim", None) if got is None else got
    if told is not None and told != num_features:
        raise ValueError(f"the encoder must give {num_features} features, got {told}")
    if gate is not None and gate != num_features:
        raise ValueError(f"the gate must read the encoder's {num_features} features, got {gate}")


def of_encoder(name: str) -> bool:
    """True of the parameters of an `encoder` of `Encoded` and of `members.Members`."""
    return name.startswith("encoder.")
