"""A frozen encoder's features, computed once for each part of each client's data.

The encoder never changes, so neither does what it says of an example: a client that trains for a
hundred rounds encodes its images once.

Shape suffixes: N examples, F features.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fedmoe.data.examples import ClientData, Examples
from fedmoe.federated.local import EVALUATION_BATCH
from fedmoe.state import state_hash
from fedmoe.types import MoEState

Key = tuple[str, int, str, int]  # encoder's hash, client, part and its number of examples


class Encodes(Protocol):
    """A model with an encoder, as `fedmoe.nn.encoder.Encoded` and `nn.members.Members` are."""

    encoder: nn.Module

    def features(self, x: Tensor) -> Tensor:
        """Inputs to features (N, F)."""
        ...

    def joined(self, x: Tensor, feature_NF: Tensor) -> Tensor:
        """What the model takes in place of the inputs, so that it need not encode them."""
        ...


@dataclass(frozen=True)
class Features:
    """A `LocalPlan.prepare`: gives each part of a client's data the features of its examples.

    They are kept by client, part and the encoder's content, those used longest ago go first.
    A client's examples must be the same at each call, as those of `FederatedData.load` are.
    """

    max_bytes: int = 2**28  # of all features together

    def __post_init__(self) -> None:
        # No field: what was computed already does not make another plan of it.
        object.__setattr__(self, "_kept", OrderedDict())

    def __call__(self, client: int, model: nn.Module, data: ClientData) -> ClientData:
        encodes = cast(Encodes, model)
        digest = state_hash(MoEState(encodes.encoder.state_dict(), {}))
        parts = {}
        for name in ("train", "validation", "test"):
            x, y = getattr(data, name)
            feature_NF = self._features((digest, client, name, len(y)), encodes, x)
            parts[name] = Examples(encodes.joined(x, feature_NF), y)
        return replace(data, **parts)

    def _features(self, key: Key, model: Encodes, x: Tensor) -> Tensor:
        kept = cast("OrderedDict[Key, Tensor]", self._kept)  # type: ignore[attr-defined]
        if key not in kept:
            device = next(model.encoder.parameters()).device
            batches = torch.split(x, EVALUATION_BATCH)
            kept[key] = torch.cat([model.features(x_B.to(device)).cpu() for x_B in batches])
        kept.move_to_end(key)
        used = sum(feature_NF.nbytes for feature_NF in kept.values())
        while used > self.max_bytes and len(kept) > 1:
            used -= kept.popitem(last=False)[1].nbytes
        return kept[key]
