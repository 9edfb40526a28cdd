"""Sets of 28 x 28 grey images in ten classes, published as four IDX files, as MNIST was first.

An `ImageSource` says where such a set may lie and what must be in it; its `load` finds, reads and
checks it.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedmoe.data.examples import Examples

NUM_CLASSES = 10
IMAGE = (28, 28)  # pixels

_HUB_TIMEOUT_S = 5.0
_PARTS = ("train", "t10k")
_HALF_NAMES = ("images-idx3-ubyte", "labels-idx1-ubyte")
_NAMES = tuple(f"{part}-{half}" for part in _PARTS for half in _HALF_NAMES)


@dataclass(frozen=True)
class ImageSource:
    """A published set of images: where it is looked for, and what shows that it is the right one.

    `load` merges the training and the test images, in that order: federated protocols cut their
    own test part for each client.
    """

    name: str
    variable: str  # an environment variable that may name a folder
    folders: tuple[Path, ...]  # looked into, in this order, where no folder is named
    hub_name: str
    how_to_get_it: str
    num_train: tuple[int, ...]  # images of each class
    num_test: tuple[int, ...]
    md5: tuple[str, ...] = ()  # of the four files, unpacked: images and labels, training first

    def load(self, folder: Path | None = None) -> Examples:
        """All images: x uint8 (N, 28, 28), y int64 (N,), training images first.

        Looks in `folder`, else in the folder that the variable names, else in `folders`, else on
        the Hugging Face hub. A folder that was named is the only one tried. The tensors are kept
        for the next call: do not write to them.

        Raises:
            FileNotFoundError: the named folder lacks a file, or the data is nowhere.
            ValueError: a file is damaged, or is of another set.
        """
        found = self.find(folder)
        return _from_hub(self) if found is None else _from_folder(self, found.resolve())

    def find(self, folder: Path | None = None) -> Path | None:
        """The folder that `load` reads; None if only the hub is left.

        Raises:
            FileNotFoundError: `folder`, or the one that the variable names, lacks a file.
        """
        variable = os.environ.get(self.variable)
        if folder is not None:
            return self._named(Path(folder), "the argument folder")
        if variable:
            return self._named(Path(variable), f"the environment variable {self.variable}")
        return next((place for place in self.folders if not _missing(place)), None)

    def _named(self, folder: Path, by: str) -> Path:
        missing = _missing(folder)
        if missing:
            raise FileNotFoundError(
                f"{by} names {folder}, which must hold the four files of {self.name}, plain or "
                f".gz; it lacks {', '.join(missing)}. Name another folder, or none at all.\n"
                f"{self.how_to_get_it}"
            )
        return folder


def say_where(source: ImageSource) -> None:
    """Print where a set is, having read it whole; exit with the ways to get it if nowhere."""
    try:
        found = source.find()
        x, _ = source.load()
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f"{source.name}: {len(x):,} images from {found or source.hub_name}")


def read_idx(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Read an IDX file of bytes, plain or .gz, that must hold an array of exactly `shape`.

    Never reads more than the wanted array and one byte, whatever the file says or unpacks to.

    Raises:
        ValueError: another format, another shape, too few bytes or too many.
    """
    num_bytes = math.prod(shape)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * len(shape))
            _check_header(path, header, shape)
            body = file.read(num_bytes)
            more = file.read(1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: wanted a whole gzip file, got a damaged one ({error}); fetch it again"
        ) from error
    if len(body) < num_bytes:
        raise ValueError(
            f"{path}: wanted {num_bytes:,} bytes behind the header, got {len(body):,}; the file "
            f"is cut short, fetch it again"
        )
    if more:
        raise ValueError(
            f"{path}: wanted {num_bytes:,} bytes behind the header, got more; fetch it again"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def idx_header(shape: tuple[int, ...]) -> bytes:
    """What stands before the bytes of an array of `shape`."""
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)


def _check_header(path: Path, header: bytes, shape: tuple[int, ...]) -> None:
    if len(header) < 4 or header[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path}: wanted an IDX file of bytes, which starts with 00 00 08, got "
            f"{header[:4].hex(' ') or 'an empty file'}; is it another file, or gzip without .gz "
            f"in its name?"
        )
    num_dims = header[3]
    if num_dims != len(shape):
        raise ValueError(
            f"{path}: wanted {len(shape)} dimensions {shape}, got {num_dims}; images and labels "
            f"may have changed places"
        )
    if len(header) < 4 + 4 * num_dims:
        raise ValueError(
            f"{path}: wanted a header of {4 + 4 * num_dims} bytes, got {len(header)}; the file "
            f"is cut short, fetch it again"
        )
    got = struct.unpack(f">{num_dims}I", header[4:])
    if got != shape:
        raise ValueError(f"{path}: wanted an array of shape {shape}, got {got}")


def _path_of(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}.gz", folder / name)
    return next((path for path in paths if path.is_file()), None)


def _missing(folder: Path) -> list[str]:
    return [name for name in _NAMES if _path_of(folder, name) is None]


@functools.lru_cache(maxsize=2)
def _from_folder(source: ImageSource, folder: Path) -> Examples:
    counts = (sum(source.num_train), sum(source.num_test))
    shapes = [shape for count in counts for shape in ((count, *IMAGE), (count,))]
    arrays = []
    for name, shape in zip(_NAMES, shapes, strict=True):
        # Asked for again, by name: the files may have gone since the folder was looked at.
        path = _path_of(folder, name)
        if path is None:
            raise FileNotFoundError(f"{folder} no longer has the file {name}")
        arrays.append(read_idx(path, shape))
    return _checked(source, arrays, str(folder))


@functools.lru_cache(maxsize=2)
def _from_hub(source: ImageSource) -> Examples:
    # Both are slow to import, and most runs read files.
    import datasets
    import httpx
    import huggingface_hub

    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            # load_dataset alone would try for minutes before it says that there is no network.
            huggingface_hub.HfApi().dataset_info(source.hub_name, timeout=_HUB_TIMEOUT_S)
        parts = datasets.load_dataset(source.hub_name)
    except (OSError, httpx.HTTPError) as error:
        places = "".join(f"not in {place.absolute()}, " for place in source.folders)
        raise FileNotFoundError(
            f"{source.name} is {places}and the Hugging Face hub does not answer "
            f"({type(error).__name__}).\n{source.how_to_get_it}"
        ) from error
    arrays = []
    for part, counts in (("train", source.num_train), ("test", source.num_test)):
        image = [np.asarray(im, np.uint8) for im in parts[part]["image"]]
        if len(image) != sum(counts) or any(im.shape != IMAGE for im in image):
            raise ValueError(
                f"{source.hub_name}: wanted {sum(counts):,} {part} images of 28 x 28, got "
                f"{len(image):,} images"
            )
        arrays += [np.stack(image), np.asarray(parts[part]["label"], np.uint8)]
    return _checked(source, arrays, source.hub_name)


def _checked(
    source: ImageSource, arrays: Sequence[npt.NDArray[np.uint8]], where: str
) -> Examples:
    """Training images, their labels, test images, theirs, merged once they are what they should."""
    for part, label, counts in (
        ("train", arrays[1], source.num_train),
        ("test", arrays[3], source.num_test),
    ):
        got = np.bincount(label, minlength=NUM_CLASSES).tolist()
        if got != list(counts):
            raise ValueError(
                f"{where}: wanted {list(counts)} {part} images of the {NUM_CLASSES} classes, got "
                f"{got}; this is not {source.name} as published"
            )
    if source.md5:
        _check_md5(source, arrays, where)
    image, label = np.concatenate(arrays[::2]), np.concatenate(arrays[1::2])
    return Examples(torch.from_numpy(image), torch.from_numpy(label.astype(np.int64)))


def _check_md5(
    source: ImageSource, arrays: Sequence[npt.NDArray[np.uint8]], where: str
) -> None:
    # Of the files as they would be, so that gzip and the hub change nothing.
    for name, array, wanted in zip(_NAMES, arrays, source.md5, strict=True):
        digest = hashlib.md5(idx_header(array.shape), usedforsecurity=False)
        digest.update(array.data)
        if digest.hexdigest() != wanted:
            raise ValueError(
                f"{where}: wanted {name} with md5 {wanted}, got {digest.hexdigest()}; this is not "
                f"{source.name} as published, fetch it again"
            )
