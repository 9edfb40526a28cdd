"""Fashion-MNIST, whole: 70,000 grey images of clothes in ten classes, from wherever it lies.

Xiao, Rasul, Vollgraf (2017), "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms", arXiv:1708.07747. Ours merges the original 60,000 training and 10,000 test
images, in that order: federated protocols cut their own test part for each client.
"""

from __future__ import annotations

import functools
import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedmoe.data.examples import Examples

NUM_CLASSES = 10
FOLDER_VARIABLE = "FEDMOE_FASHION_MNIST"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
LOCAL_FOLDER = Path(".data/fashion-mnist")  # in the current directory, as `make data` leaves it
HUB_NAME = "zalando-datasets/fashion_mnist"

_HUB_TIMEOUT_S = 5.0
_PARTS = (("train", 60_000), ("t10k", 10_000))
_HALF_NAMES = ("images-idx3-ubyte", "labels-idx1-ubyte")

HOW_TO_GET_IT = (
    f"Get it in one of these ways:\n"
    f"  1. as root on Debian or Ubuntu: apt-get install dataset-fashion-mnist\n"
    f"     (`make data` does this, and without root unpacks the package into {LOCAL_FOLDER});\n"
    f"  2. set {FOLDER_VARIABLE} to a folder with the four files train-images-idx3-ubyte,\n"
    f"     train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, plain or "
    f".gz;\n"
    f"  3. with network: let it come from the Hugging Face hub ({HUB_NAME});\n"
    f"     unset HF_HUB_OFFLINE for that."
)


def load_fashion_mnist(folder: Path | None = None) -> Examples:
    """All 70,000 images: x uint8 (70000, 28, 28), y int64 (70000,), training images first.

    Looks in `folder`, else in the folder that FEDMOE_FASHION_MNIST names, else in the Debian
    package's folder, else in `.data/fashion-mnist`, else on the Hugging Face hub. A folder that
    was named is the only one tried. The tensors are kept for the next call: do not write to them.

    Raises:
        FileNotFoundError: the named folder lacks a file, or the data is nowhere.
        ValueError: a file is damaged, or is not Fashion-MNIST.
    """
    found = find_folder(folder)
    if found is None:
        return _from_hub()
    return _from_folder(found.resolve())


def find_folder(folder: Path | None = None) -> Path | None:
    """The folder that `load_fashion_mnist` reads; None if only the hub is left.

    Raises:
        FileNotFoundError: `folder`, or the one in FEDMOE_FASHION_MNIST, lacks a file.
    """
    variable = os.environ.get(FOLDER_VARIABLE)
    if folder is not None:
        return _named(Path(folder), "the argument folder")
    if variable:
        return _named(Path(variable), f"the environment variable {FOLDER_VARIABLE}")
    for candidate in (DEBIAN_FOLDER, LOCAL_FOLDER):
        if not _missing(candidate):
            return candidate
    return None


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


def _path_of(folder: Path, part: str, half: str) -> Path | None:
    paths = (folder / f"{part}-{half}.gz", folder / f"{part}-{half}")
    return next((path for path in paths if path.is_file()), None)


def _missing(folder: Path) -> list[str]:
    names = [(part, half) for part, _ in _PARTS for half in _HALF_NAMES]
    return [f"{part}-{half}" for part, half in names if _path_of(folder, part, half) is None]


def _named(folder: Path, by: str) -> Path:
    missing = _missing(folder)
    if missing:
        raise FileNotFoundError(
            f"{by} names {folder}, which must hold the four files of Fashion-MNIST, plain or "
            f".gz; it lacks {', '.join(missing)}. Name another folder, or none at all.\n"
            f"{HOW_TO_GET_IT}"
        )
    return folder


@functools.lru_cache(maxsize=1)
def _from_folder(folder: Path) -> Examples:
    images, labels = [], []
    for part, count in _PARTS:
        # Asked for again, by name: the files may have gone since the folder was looked at.
        image_path, label_path = (_path_of(folder, part, half) for half in _HALF_NAMES)
        if image_path is None or label_path is None:
            raise FileNotFoundError(f"{folder} no longer has the files of {part}")
        images.append(read_idx(image_path, (count, 28, 28)))
        labels.append(read_idx(label_path, (count,)))
    return _checked(np.concatenate(images), np.concatenate(labels), str(folder))


def _checked(image: npt.NDArray[np.uint8], label: npt.NDArray[np.uint8], where: str) -> Examples:
    """Merged arrays as Examples, once every class counts 6,000 and 1,000."""
    start = 0
    for part, count in _PARTS:
        got = np.bincount(label[start : start + count], minlength=NUM_CLASSES).tolist()
        wanted = [count // NUM_CLASSES] * NUM_CLASSES
        if got != wanted:
            raise ValueError(
                f"{where}: wanted {wanted[0]:,} {part} images of each of the {NUM_CLASSES} "
                f"classes, got {got}; this is not Fashion-MNIST as published"
            )
        start += count
    return Examples(torch.from_numpy(image), torch.from_numpy(label.astype(np.int64)))


@functools.lru_cache(maxsize=1)
def _from_hub() -> Examples:
    # Both are slow to import, and most runs read files.
    import datasets
    import httpx
    import huggingface_hub

    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            # load_dataset alone would try for minutes before it says that there is no network.
            huggingface_hub.HfApi().dataset_info(HUB_NAME, timeout=_HUB_TIMEOUT_S)
        parts = datasets.load_dataset(HUB_NAME)
    except (OSError, httpx.HTTPError) as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {DEBIAN_FOLDER}, not in {LOCAL_FOLDER.absolute()}, and the "
            f"Hugging Face hub does not answer ({type(error).__name__}).\n{HOW_TO_GET_IT}"
        ) from error
    image = [np.asarray(im, np.uint8) for part in ("train", "test") for im in parts[part]["image"]]
    label = [y for part in ("train", "test") for y in parts[part]["label"]]
    if len(image) != 70_000 or any(im.shape != (28, 28) for im in image):
        raise ValueError(f"{HUB_NAME}: wanted 70,000 images of 28 x 28, got {len(image):,} images")
    return _checked(np.stack(image), np.asarray(label, np.uint8), HUB_NAME)


def main() -> None:
    """Say where Fashion-MNIST is, having read it whole; exit with the ways to get it if nowhere."""
    try:
        found = find_folder()
        x, _ = load_fashion_mnist()
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f"Fashion-MNIST: {len(x):,} images from {found or HUB_NAME}")


if __name__ == "__main__":
    main()
