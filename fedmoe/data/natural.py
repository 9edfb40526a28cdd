"""Clients who are people, or roles: the data of each is what came from that one alone.

`motion`: 30 people's phones tell what they are doing. `vowels`: 15 people say eleven vowels.
`shakespeare`: the roles of plays, and the next character of what they say.

The parts of a client are stretches of time, or of text, one after another: what lies side by side
is alike, and parts drawn at random would test what was learned by heart.

Shape suffixes: N examples, T samples in time or characters, C channels, W windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedmoe.data.examples import Examples, FederatedData, share_out
from fedmoe.data.hapt import ACTIVITIES, Motion, load_hapt
from fedmoe.data.partition import Indices, Parts
from fedmoe.data.shakespeare import ALPHABET, encode, load_roles
from fedmoe.data.vowels import NUM_CLASSES as NUM_VOWELS
from fedmoe.data.vowels import REPETITIONS, Vowels, load_vowels

WINDOW = 128  # samples, 2.56 s
STEP = 64  # samples from one window to the next
CONTEXT = 16  # characters that a model sees

# Mean and standard deviation of HAPT's six channels, over all samples of the six activities.
_MOTION_MEAN = (0.814, 0.014, 0.079, 0.008, -0.003, -0.007)
_MOTION_STD = (0.412, 0.397, 0.344, 0.428, 0.399, 0.263)

# Mean and standard deviation of the ten features, over all of Deterding's rows.
_VOWEL_MEAN = (-3.204, 1.882, -0.508, 0.515, -0.306, 0.630, -0.004, 0.337, -0.303, -0.071)
_VOWEL_STD = (0.869, 1.175, 0.712, 0.759, 0.664, 0.604, 0.462, 0.573, 0.570, 0.604)


def motion(
    seed: int,
    *,
    train: int = 200,
    validation: int = 60,
    test: int = 120,
    folder: Path | None = None,
    source: Motion | None = None,
) -> FederatedData:
    """30 people, and which of six activities they are at: walking, up, down, sit, stand, lie.

    An example is 2.56 s of six channels, normalised by fixed constants, (6, 128) float32; windows
    overlap by half and have one activity only. In each recording the windows of an activity, in
    order of time, are cut in proportion to `train`, `validation` and `test`, and a window at a cut
    that shares samples with the part before is left out. (Cut as a whole, a recording would leave
    the activities that come last to the test.) Of what a person has, at most so many are drawn.

    `source` stands in for HAPT; its clients are its people, in order of their numbers.

    Raises:
        ValueError: a count is below its limit, or a person has no window to train on.
    """
    counts = _checked_counts(train, validation, test)
    data = load_hapt(folder) if source is None else source
    label_T, person_T, recording_T = (
        t.numpy().astype(np.int64) for t in (data.label_T, data.person_T, data.recording_T)
    )
    start_W = _windows(label_T, recording_T)
    kind_W = recording_T[start_W] * (len(ACTIVITIES) + 1) + label_T[start_W]
    share = np.cumsum(counts) / sum(counts)
    parts = []
    for client, person in enumerate(np.unique(person_T)):
        own_W = person_T[start_W] == person
        stretches = _in_stretches(start_W[own_W], kind_W[own_W], share)
        rng = np.random.default_rng([seed, client])
        parts.append(_drawn(f"person {person}", stretches, counts, rng))

    mean_C1, std_C1 = (torch.tensor(c)[:, None] for c in (_MOTION_MEAN, _MOTION_STD))

    def take(client: int, index_N: Indices) -> Examples:
        signal_NTC = data.signal_TC[torch.from_numpy(index_N)[:, None] + torch.arange(WINDOW)]
        x_NCT = (signal_NTC.transpose(1, 2) - mean_C1) / std_C1
        return Examples(x_NCT.contiguous(), data.label_T[torch.from_numpy(index_N)].long() - 1)

    return share_out("motion", parts, take, len(ACTIVITIES))


def vowels(
    seed: int, *, folder: Path | None = None, source: Vowels | None = None
) -> FederatedData:
    """15 speakers, and which of eleven vowels they say, from ten features of a moment of speech.

    The features are normalised by fixed constants, (10,) float32. Each speaker's six repetitions
    are three to train, one for validation and two to test, in order of time or the other way
    round, as the seed draws for each. So every vowel is in every part: 33, 11 and 22 rows.
    `groups` says whether the speaker is a man or a woman.

    `source` stands in for Deterding's rows; its clients are its speakers, in order.
    """
    data = load_vowels(folder) if source is None else source
    speaker_N = data.speaker_N.numpy()
    parts: list[Parts] = []
    groups = {}
    for client, speaker in enumerate(np.unique(speaker_N)):
        rng = np.random.default_rng([seed, client])
        row_RV = np.flatnonzero(speaker_N == speaker).reshape(REPETITIONS, NUM_VOWELS)
        if rng.integers(2):
            row_RV = row_RV[::-1]
        train, validation, test = (np.sort(rows, axis=None) for rows in np.split(row_RV, (3, 4)))
        parts.append((train, validation, test))
        groups[client] = "women" if data.woman_N[int(train[0])] else "men"

    def take(client: int, index_N: Indices) -> Examples:
        row_N = torch.from_numpy(index_N)
        x_ND = (data.x_ND[row_N] - torch.tensor(_VOWEL_MEAN)) / torch.tensor(_VOWEL_STD)
        return Examples(x_ND, data.y_N[row_N])

    return share_out("vowels", parts, take, NUM_VOWELS, groups=groups)


def shakespeare(
    seed: int,
    *,
    num_clients: int = 24,
    train: int = 2_000,
    validation: int = 300,
    test: int = 800,
    folder: Path | None = None,
    source: Mapping[str, str] | None = None,
) -> FederatedData:
    """The roles that say most, and the character that comes next after 16.

    An example is the 16 characters before it, as uint8 places in `shakespeare.ALPHABET`; the label
    is the next one's place. What a role says is cut once into stretches in proportion to `train`,
    `validation` and `test`, and no example reaches over a cut. Of what a stretch has, at most so
    many examples are drawn.

    `source` stands in for the roles of Tiny Shakespeare and what each says, longest first.

    Raises:
        ValueError: a count is below its limit, there are fewer roles, or a role says too little to
            train on.
    """
    counts = _checked_counts(train, validation, test)
    roles = load_roles(folder) if source is None else source
    if not 1 <= num_clients <= len(roles):
        raise ValueError(
            f"num_clients must be between 1 and the {len(roles)} roles, got {num_clients}"
        )
    chosen = dict(itertools.islice(roles.items(), num_clients))
    code_T = torch.from_numpy(np.concatenate([encode(said) for said in chosen.values()]))
    share = np.cumsum(counts) / sum(counts)
    parts, first = [], 0
    for client, (role, said) in enumerate(chosen.items()):
        cuts = [first, *(first + np.rint(share * len(said)).astype(np.int64))]
        stretches = [np.arange(a + CONTEXT, b) for a, b in itertools.pairwise(cuts)]
        rng = np.random.default_rng([seed, client])
        parts.append(_drawn(f"role {role!r}", stretches, counts, rng))
        first += len(said)

    def take(client: int, index_N: Indices) -> Examples:
        index = torch.from_numpy(index_N)
        return Examples(code_T[index[:, None] + torch.arange(-CONTEXT, 0)], code_T[index].long())

    return share_out("shakespeare", parts, take, len(ALPHABET))


def _windows(label_T: npt.NDArray[np.int64], recording_T: npt.NDArray[np.int64]) -> Indices:
    """Where windows of a single activity start: every STEP samples from where it was taken up."""
    change_T = (np.diff(label_T) != 0) | (np.diff(recording_T) != 0)
    bounds = [0, *(np.flatnonzero(change_T) + 1), len(label_T)]
    starts = [
        np.arange(a, b - WINDOW + 1, STEP)
        for a, b in itertools.pairwise(bounds)
        if 1 <= label_T[a] <= len(ACTIVITIES)
    ]
    return np.concatenate(starts) if starts else np.empty(0, np.int64)


def _in_stretches(
    start_W: Indices, kind_W: Indices, share: npt.NDArray[np.float64]
) -> list[Indices]:
    """Windows of each kind, in order of time, cut at these shares, but for those that reach back
    over a cut.
    """
    parts = [start_W[:0]] * len(share)
    for kind in np.unique(kind_W):
        of_kind = start_W[kind_W == kind]
        free = 0  # the first sample that no part has yet
        cuts = np.rint(share[:-1] * len(of_kind)).astype(np.int64)
        for i, stretch in enumerate(np.split(of_kind, cuts)):
            own = stretch[stretch >= free]
            free = own[-1] + WINDOW if len(own) else free
            parts[i] = np.concatenate([parts[i], own])
    return parts


def _drawn(
    who: str, stretches: list[Indices], counts: tuple[int, int, int], rng: np.random.Generator
) -> Parts:
    """At most so many of each stretch, ascending."""
    if not len(stretches[0]):
        raise ValueError(f"{who} has nothing to train on, not one example; leave it out of source")
    train, validation, test = (
        np.sort(rng.permutation(stretch)[:count])
        for stretch, count in zip(stretches, counts, strict=True)
    )
    return train, validation, test


def _checked_counts(train: int, validation: int, test: int) -> tuple[int, int, int]:
    for name, count in (("train", train), ("validation", validation), ("test", test)):
        least = 1 if name == "train" else 0
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")
    return train, validation, test
