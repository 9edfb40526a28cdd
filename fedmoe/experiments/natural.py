"""FedMoE and what it is compared with, where clients are people or roles.

*motion*: what 30 people are doing, from their phones. *vowels*: which vowel 15 people say.
*shakespeare*: the next character of what 24 roles say. Every device holds a quarter of the experts.
"""

from functools import partial

from torch import nn

from fedmoe.data import natural
from fedmoe.experiments.methods import (
    Methods,
    OtherModels,
    all_methods,
    clusters_of,
    mixture_of,
    with_own_classifier,
)
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalPlan, Phase
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.classifier import dense_classifier
from fedmoe.nn.extractors import motion_extractors, vowel_extractors
from fedmoe.nn.sensors import MOTION_WIDTH, SignalStem, motion_cnn
from fedmoe.nn.tabular import vowel_mlp
from fedmoe.nn.text import CharacterStem, character_model

K = 2  # experts per token of the model that is no sub-MoE's
SHARES = (0.25,)
HELD = 4  # of 16 experts, by every device; of the eight of *vowels* 2
NUM_MODELS = 4  # of IFCA and FedMix; together as large as the model of experts


def motion(seed: int = 0, rounds: int = 20, *, lr: float = 0.2) -> Methods:
    """30 people with up to 200 windows of motion each."""
    data = natural.motion(seed)
    member = partial(dense_classifier, SignalStem, MOTION_WIDTH, 128, data.num_classes)
    shape = (6, natural.WINDOW)
    return all_methods(
        "motion",
        data,
        partial(motion_cnn, k=K, seed=seed),
        LocalPlan((Phase(epochs=2),), lr=lr, batch_size=20, balance=0.01, clip=1.0),
        Schedule(rounds, seed, evaluate_every=5),
        SHARES,
        FedMoE(min_experts=K, kinship=1.0, seed=seed),
        summed=partial(motion_cnn, k=HELD, seed=seed, gate_mass="sum"),
        others=OtherModels(
            clusters=partial(clusters_of, member, NUM_MODELS, data.num_classes, shape, seed),
            mixture=partial(mixture_of, member, NUM_MODELS, data.num_classes, shape, seed),
            extractors=partial(motion_extractors, seed=seed),
        ),
    )


def vowels(seed: int = 0, rounds: int = 20, *, lr: float = 0.6) -> Methods:
    """15 speakers with 33 rows of ten features each; groups are men and women.

    FedMoE, and the random sub-MoE like it, keep the experts' slices of the classifier on the
    client, as on skewed labels.
    """
    data = natural.vowels(seed)
    member = partial(dense_classifier, vowel_stem, 64, 64, data.num_classes)
    shape = (10,)
    runs = all_methods(
        "vowels",
        data,
        partial(vowel_mlp, k=K, seed=seed),
        LocalPlan((Phase(epochs=2),), lr=lr, batch_size=10, balance=0.01, clip=1.0),
        Schedule(rounds, seed, evaluate_every=5),
        SHARES,
        FedMoE(min_experts=K, kinship=1.0, seed=seed),
        summed=partial(vowel_mlp, k=2, seed=seed, gate_mass="sum"),
        others=OtherModels(
            clusters=partial(clusters_of, member, NUM_MODELS, data.num_classes, shape, seed),
            mixture=partial(mixture_of, member, NUM_MODELS, data.num_classes, shape, seed),
            extractors=partial(vowel_extractors, seed=seed),
        ),
    )
    return with_own_classifier(runs)


def shakespeare(seed: int = 0, rounds: int = 20, *, lr: float = 0.6) -> Methods:
    """24 roles with up to 2,000 characters to learn each.

    All speak one language, so FedMoE does not balance the demand for experts: an expert that all
    roles want learns from all, and nothing in their data pulls it apart.

    Without FedMix and pFedMoE: their gates look at the input, and codes of characters are no
    numbers to weigh.
    """
    data = natural.shakespeare(seed)
    member = partial(dense_classifier, character_stem, 128, 256, data.num_classes)
    shape = (natural.CONTEXT,)
    return all_methods(
        "shakespeare",
        data,
        partial(character_model, k=K, seed=seed),
        LocalPlan((Phase(epochs=1),), lr=lr, batch_size=20, balance=0.01, clip=1.0),
        Schedule(rounds, seed, evaluate_every=5),
        SHARES,
        FedMoE(min_experts=K, sharpness=0.0, seed=seed),
        summed=partial(character_model, k=HELD, seed=seed, gate_mass="sum"),
        others=OtherModels(
            clusters=partial(clusters_of, member, NUM_MODELS, data.num_classes, shape, seed)
        ),
    )


def vowel_stem() -> nn.Module:
    """The body of `vowel_mlp`."""
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU())


def character_stem() -> nn.Module:
    """The body of `character_model`."""
    return CharacterStem(65, natural.CONTEXT, 16, 128)
