from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmoe.data import fashion, idx
from fedmoe.data.fashion import find_folder, load_fashion_mnist
from fedmoe.data.idx import idx_header

NAMES = [f"{p}-{h}" for p in ("train", "t10k") for h in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(idx_header(array.shape) + array.astype(np.uint8).tobytes())


def look_in(monkeypatch, debian: Path) -> None:
    places = (debian, fashion.LOCAL_FOLDER)
    monkeypatch.setattr(fashion, "SOURCE", replace(fashion.SOURCE, folders=places))


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path_factory):
    """No Fashion-MNIST but what a test puts somewhere, and nothing kept from another test."""
    monkeypatch.delenv(fashion.FOLDER_VARIABLE, raising=False)
    look_in(monkeypatch, Path("no-such-folder"))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    idx._from_folder.cache_clear()
    yield
    idx._from_folder.cache_clear()


def touch_four(folder: Path, suffix: str = "") -> Path:
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / (name + suffix)).touch()
    return folder


# --- where it is looked for


def test_the_argument_goes_before_the_variable_the_variable_before_debian_and_debian_before_here(
    tmp_path, monkeypatch
):
    argument, variable, debian = (touch_four(tmp_path / n) for n in ("arg", "var", "deb"))
    assert find_folder() is None
    touch_four(fashion.LOCAL_FOLDER)
    assert find_folder() == fashion.LOCAL_FOLDER
    look_in(monkeypatch, debian)
    assert find_folder() == debian
    monkeypatch.setenv("FEDMOE_FASHION_MNIST", str(variable))
    assert find_folder() == variable
    assert find_folder(argument) == argument


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_may_be_plain_or_gzipped(tmp_path, suffix):
    folder = touch_four(tmp_path / "f", suffix)
    assert find_folder(folder) == folder


def test_a_named_folder_that_lacks_a_file_is_an_error_even_if_the_data_is_elsewhere(
    tmp_path, monkeypatch
):
    touch_four(fashion.LOCAL_FOLDER)
    lacking = touch_four(tmp_path / "f")
    (lacking / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="argument folder .* lacks t10k-labels-idx1-ubyte"):
        load_fashion_mnist(lacking)
    monkeypatch.setenv("FEDMOE_FASHION_MNIST", str(lacking))
    with pytest.raises(FileNotFoundError, match="FEDMOE_FASHION_MNIST names .* lacks t10k-labels"):
        load_fashion_mnist()


def test_a_folder_here_that_lacks_a_file_is_passed_over():
    (touch_four(fashion.LOCAL_FOLDER) / "t10k-labels-idx1-ubyte").unlink()
    assert find_folder() is None


@pytest.mark.slow
def test_if_it_is_nowhere_the_error_says_every_way_to_get_it(monkeypatch, tmp_path):
    # The hub's client may keep files from an earlier day; it looks nowhere but in an empty home.
    code = (
        "from dataclasses import replace; from fedmoe.data import fashion;"
        "replace(fashion.SOURCE, folders=(fashion.LOCAL_FOLDER,)).load()"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(fashion.__file__).parents[2]))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    for way in (
        "FileNotFoundError: Fashion-MNIST is not in ",
        "apt-get install dataset-fashion-mnist",
        "make data",
        "FEDMOE_FASHION_MNIST",
        "Hugging Face hub (zalando-datasets/fashion_mnist)",
    ):
        assert way in run.stderr


def hub_parts(num_train: int) -> dict[str, dict[str, list]]:
    # One image object for all: 70,000 of them are only looked at.
    image = np.full((28, 28), 5, np.uint8)
    return {
        part: {"image": [image] * n, "label": [i % 10 for i in range(n)]}
        for part, n in (("train", num_train), ("test", 10_000))
    }


def test_from_the_hub_training_images_come_first_and_are_checked(monkeypatch):
    import datasets

    idx._from_hub.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda n: (asked.append(n), hub_parts(60_000))[1])
    x, y = load_fashion_mnist()
    idx._from_hub.cache_clear()
    assert asked == ["zalando-datasets/fashion_mnist"]
    assert (x.shape, x.dtype, int(x[0, 0, 0])) == ((70_000, 28, 28), torch.uint8, 5)
    assert y[:11].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_another_set_from_the_hub_is_refused(monkeypatch):
    import datasets

    idx._from_hub.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub_parts(50_000))
    with pytest.raises(ValueError, match="wanted 60,000 train images of 28 x 28, got 50,000"):
        load_fashion_mnist()


# --- the whole set


def write_whole(folder: Path, label_of) -> Path:
    folder.mkdir()
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        image = np.zeros((n, 28, 28), np.uint8)
        image[:, 0, 0] = np.arange(n) % 251
        image[:, 0, 1] = part == "t10k"
        write_idx(folder / f"{part}-images-idx3-ubyte", image)
        write_idx(folder / f"{part}-labels-idx1-ubyte", label_of(part, np.arange(n)))
    return folder


def test_all_70000_come_in_order_with_the_training_images_first(tmp_path):
    x, y = load_fashion_mnist(write_whole(tmp_path / "f", lambda part, n: n % 10))
    assert (x.shape, x.dtype, y.dtype) == ((70_000, 28, 28), torch.uint8, torch.int64)
    assert y.tolist() == [n % 10 for n in range(60_000)] + [n % 10 for n in range(10_000)]
    assert x[59_999, 0, :2].tolist() == [59_999 % 251, 0]
    assert x[60_000, 0, :2].tolist() == [0, 1]


def test_classes_that_do_not_count_6000_and_1000_are_refused(tmp_path):
    folder = write_whole(tmp_path / "f", lambda part, n: np.where(n == 0, 1, n % 10))
    with pytest.raises(ValueError, match=r"f: wanted \[6000.* train .* got \[5999, 6001, 6000"):
        load_fashion_mnist(folder)


def test_a_second_call_reads_nothing(tmp_path):
    folder = write_whole(tmp_path / "f", lambda part, n: n % 10)
    first = load_fashion_mnist(folder)
    assert load_fashion_mnist(folder).x is first.x


@pytest.mark.slow
def test_the_real_fashion_mnist_is_whole(fashion_mnist):
    x, y = fashion_mnist
    assert (x.shape, x.dtype) == ((70_000, 28, 28), torch.uint8)
    assert torch.bincount(y[:60_000]).tolist() == [6_000] * 10
    assert torch.bincount(y[60_000:]).tolist() == [1_000] * 10
    pixel = x[:60_000].double() / 255
    assert round(float(pixel.mean()), 4) == 0.2860  # as published for the training images
    assert round(float(pixel.std()), 4) == 0.3530
    assert y[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # an ankle boot comes first


@pytest.mark.slow
def test_importing_the_data_room_brings_no_slow_library():
    code = (
        "import sys, fedmoe.data.protocols;"
        "print([m for m in ('datasets', 'flwr_datasets', 'pandas', 'flwr') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(fashion.__file__).parents[2],
    )
    assert run.stdout.strip() == "[]"
