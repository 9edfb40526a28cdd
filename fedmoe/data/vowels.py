"""Deterding's vowels: eleven English vowels, each said by fifteen people.

D. H. Deterding (1989), "Speaker Normalisation for Automatic Speech Recognition", PhD thesis,
Cambridge; UCI Machine Learning Repository, "Connectionist Bench (Vowel Recognition)". A row is
ten log area ratios of one window of speech. The six rows of a person and a vowel are windows of
one steady utterance, in order of time, so neighbours are much alike.

Shape suffixes: N rows, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmoe.data.files import read_published

NUM_CLASSES = 11
NUM_FEATURES = 10
REPETITIONS = 6  # rows of each speaker and vowel
FILE_NAME = "vowel-context.data"

_SHA256 = "2e95c7be6c5800583b16d15ad36fd21f9681030b69bf96aa6aeab6f4f2f0726d"
HOW_TO_GET_IT = (
    "It has 990 rows of split, speaker, sex, ten features and class, with commas, as in the GitHub "
    "repository Xammed/ECOC-Correlation-Testing."
)


class Vowels(NamedTuple):
    """Rows of all speakers, repetition by repetition, and all eleven vowels in each."""

    x_ND: Tensor  # features as published, float32
    y_N: Tensor  # vowels 0 to 10, int64
    speaker_N: Tensor  # int64
    woman_N: Tensor  # whether the speaker is one, bool


def load_vowels(folder: Path | None = None) -> Vowels:
    """All 990 rows: 15 speakers, 11 vowels, 6 repetitions.

    Reads `vowel-context.data` in `folder`, else in the folder that FEDMOE_DATA names, else in
    `../shared/data`.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is another file.
    """
    return parse_vowels(read_published(FILE_NAME, _SHA256, folder, HOW_TO_GET_IT))


def parse_vowels(text: str) -> Vowels:
    """The rows of a file like Deterding's.

    Raises:
        ValueError: a row has other columns, or a speaker lacks a vowel in one of six repetitions.
    """
    rows = [line.split(",") for line in text.splitlines() if line.strip()]
    wrong = next((i for i, row in enumerate(rows) if len(row) != NUM_FEATURES + 4), None)
    if not rows or wrong is not None:
        raise ValueError(
            f"each row must have {NUM_FEATURES + 4} numbers (split, speaker, sex, ten features, "
            f"class), got {'no rows' if wrong is None else f'{len(rows[wrong])} in row {wrong}'}"
        )
    value = np.array(rows, dtype=np.float64)
    speaker, woman, label = (value[:, i].astype(np.int64) for i in (1, 2, NUM_FEATURES + 3))
    for s in np.unique(speaker):
        got = label[speaker == s].tolist()
        if got != [*range(NUM_CLASSES)] * REPETITIONS:
            raise ValueError(
                f"speaker {s} must say the vowels 0 to {NUM_CLASSES - 1} in turn, {REPETITIONS} "
                f"times, got {len(got)} rows, starting {got[:NUM_CLASSES]}"
            )
    return Vowels(
        torch.from_numpy(value[:, 3:-1].astype(np.float32)),
        torch.from_numpy(label),
        torch.from_numpy(speaker),
        torch.from_numpy(woman == 1),
    )
