"""Fashion-MNIST, whole: 70,000 grey images of clothes in ten classes, from wherever it lies.

Xiao, Rasul, Vollgraf (2017), "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms", arXiv:1708.07747. Ours merges the original 60,000 training and 10,000 test
images, in that order: federated protocols cut their own test part for each client.
"""

from __future__ import annotations

from pathlib import Path

from fedmoe.data import idx
from fedmoe.data.examples import Examples
from fedmoe.data.idx import NUM_CLASSES as NUM_CLASSES

FOLDER_VARIABLE = "FEDMOE_FASHION_MNIST"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
LOCAL_FOLDER = Path(".data/fashion-mnist")  # in the current directory, as `make data` leaves it
HUB_NAME = "zalando-datasets/fashion_mnist"

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

SOURCE = idx.ImageSource(
    "Fashion-MNIST",
    FOLDER_VARIABLE,
    (DEBIAN_FOLDER, LOCAL_FOLDER),
    HUB_NAME,
    HOW_TO_GET_IT,
    num_train=(6_000,) * NUM_CLASSES,
    num_test=(1_000,) * NUM_CLASSES,
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
    return SOURCE.load(folder)


def find_folder(folder: Path | None = None) -> Path | None:
    """The folder that `load_fashion_mnist` reads; None if only the hub is left.

    Raises:
        FileNotFoundError: `folder`, or the one in FEDMOE_FASHION_MNIST, lacks a file.
    """
    return SOURCE.find(folder)


if __name__ == "__main__":
    idx.say_where(SOURCE)
