from __future__ import annotations

import pytest
import torch

from fedmoe.data import fashion, mnist
from fedmoe.data.mnist import load_mnist

NAMES = [f"{p}-{h}" for p in ("train", "t10k") for h in ("images-idx3-ubyte", "labels-idx1-ubyte")]


@pytest.fixture
def four(tmp_path, monkeypatch):
    """Makes folders with four empty files; nothing else is anywhere."""
    monkeypatch.delenv("FEDMOE_MNIST", raising=False)
    monkeypatch.chdir(tmp_path)

    def touch(name):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file in NAMES:
            (folder / file).touch()
        return folder

    return touch


def test_the_argument_goes_before_the_variable_and_the_variable_before_here(four, monkeypatch):
    assert mnist.SOURCE.find() is None
    four(".data/mnist")
    assert mnist.SOURCE.find() == mnist.LOCAL_FOLDER
    variable, argument = four("variable"), four("argument")
    monkeypatch.setenv("FEDMOE_MNIST", str(variable))
    assert mnist.SOURCE.find() == variable
    assert mnist.SOURCE.find(argument) == argument


def test_the_error_where_a_file_lacks_says_every_way_to_get_it(four):
    folder = four("argument")
    (folder / NAMES[1]).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_mnist(folder)
    for said in (
        "four files of MNIST",
        "lacks train-labels-idx1-ubyte",
        "make data-more",
        "set FEDMOE_MNIST",
        "Hugging Face hub (ylecun/mnist)",
    ):
        assert said in str(error.value)


def test_mnist_and_fashion_mnist_are_told_apart_by_their_counts():
    assert sum(mnist.SOURCE.num_train) == sum(fashion.SOURCE.num_train) == 60_000
    assert sum(mnist.SOURCE.num_test) == sum(fashion.SOURCE.num_test) == 10_000
    assert mnist.SOURCE.num_train != fashion.SOURCE.num_train
    assert len(set(mnist.SOURCE.md5)) == 4


@pytest.mark.slow
def test_the_real_mnist_is_whole(real_mnist):
    x, y = real_mnist
    assert (x.shape, x.dtype) == ((70_000, 28, 28), torch.uint8)
    pixel = x[:60_000].double() / 255
    assert round(float(pixel.mean()), 4) == 0.1307  # as published for the training images
    assert round(float(pixel.std()), 4) == 0.3081
    assert y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


@pytest.mark.slow
def test_fashion_mnist_in_place_of_mnist_is_refused(fashion_mnist):
    folder = fashion.find_folder()
    if folder is None:
        pytest.skip("Fashion-MNIST is not in a folder")
    with pytest.raises(ValueError, match="not MNIST as published"):
        load_mnist(folder)
