"""The frozen encoder of the experiments with clients who come later: trained where no client looks.

FedJETs (Dun et al. 2023, arXiv:2306.08586) begins with a "common expert" of the experts' own kind,
trained beforehand, and reports a weak and an average one. Ours trains a small CNN on images of
`heldout_encoder_images`, that no client of the protocol has; how good each is depends on how many
images it saw. A trained encoder lies on disk under a name made of all that it was made of.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedmoe.data.examples import Examples
from fedmoe.data.protocols import heldout_encoder_images
from fedmoe.experiments.definition import describe
from fedmoe.federated.local import LocalPlan, Phase, train
from fedmoe.nn.classifier import StemAndHead
from fedmoe.nn.encoder import Encoder
from fedmoe.nn.vision import dense_cnn
from fedmoe.rng import torch_generator
from fedmoe.types import State

Quality = Literal["weak", "average"]

CHANNELS, FEATURES = (16, 32), 128  # of the CNN: its two convolutions, its hidden layer
FOLDER = Path(".data/encoders")  # in the current directory, beside the data sets


@dataclass(frozen=True)
class Recipe:
    """How a common expert is trained."""

    images: int
    epochs: int
    lr: float = 0.05
    momentum: float = 0.9
    batch_size: int = 32
    clip: float = 1.0


# Test accuracies over ten labels: 67 to 70 % and 79 to 81 % (seeds 0, 1, 2 and 100).
RECIPES: Mapping[Quality, Recipe] = MappingProxyType(
    {"weak": Recipe(images=200, epochs=10), "average": Recipe(images=2_000, epochs=5)}
)


def small_cnn(seed: int = 0, start: State | None = None) -> StemAndHead:
    """The CNN of common expert, experts and baselines, 80,202 parameters; drawn, or as `start`.

    Raises:
        ValueError: `start` is of a CNN of another width.
    """
    model = dense_cnn(hidden=FEATURES, channels=CHANNELS, seed=seed)
    if start is not None:
        load_cnn(model, start)
    return model


def encoder_of(common_expert: State) -> Encoder:
    """The common expert up to its hidden layer.

    Raises:
        ValueError: it is a CNN of another width.
    """
    return Encoder(small_cnn(start=common_expert))


def common_expert(
    seed: int, quality: Quality, *, folder: Path = FOLDER, images: Examples | None = None
) -> State:
    """The parameters of a trained `small_cnn`, read from `folder` if it was made before.

    Args:
        images: to train on in place of those that the protocol puts aside; all are used.

    Raises:
        ValueError: there is no such quality.
    """
    if quality not in RECIPES:
        raise ValueError(f"quality must be among {', '.join(RECIPES)}, got {quality!r}")
    recipe = RECIPES[quality]
    if images is None:
        images = heldout_encoder_images(seed, recipe.images)
    made_of = describe((seed, recipe, CHANNELS, FEATURES, images.x, images.y))
    path = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        state = train_common_expert(images, recipe, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.part")
        save_file(dict(state), beside)
        beside.replace(path)
    return load_file(path)


def train_common_expert(images: Examples, recipe: Recipe, seed: int) -> State:
    """A `small_cnn` trained on these images, with nobody else; the same for the same seed."""
    plan = LocalPlan(
        (Phase(epochs=recipe.epochs),),
        lr=recipe.lr,
        momentum=recipe.momentum,
        batch_size=recipe.batch_size,
        clip=recipe.clip,
    )
    model = small_cnn(seed)
    train(model, images, plan, torch_generator(seed), torch.device("cpu"))
    return {n: t.contiguous() for n, t in model.state_dict().items()}


def load_cnn(model: nn.Module, values: State) -> None:
    """Put `values` into a `small_cnn`; not where that is on the meta device, without memory.

    Raises:
        ValueError: they are of a CNN of another width.
    """
    own = model.state_dict()
    for name in own.keys() | values.keys():
        shapes = [tuple(s[name].shape) if name in s else None for s in (own, values)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"start must be of a CNN with {FEATURES} features: {name!r} must have shape "
                f"{shapes[0]}, got {shapes[1]}"
            )
    if not next(model.parameters()).is_meta:
        model.load_state_dict(values)
