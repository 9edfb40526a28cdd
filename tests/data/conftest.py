"""Data that `make data-more` brings, or that a user has: even in CI it may be missing."""

from __future__ import annotations

import pytest

from fedmoe.data import mnist
from fedmoe.data.examples import Examples
from fedmoe.data.hapt import Motion, load_hapt
from fedmoe.data.shakespeare import load_roles
from fedmoe.data.vowels import Vowels, load_vowels


@pytest.fixture(scope="session")
def real_mnist() -> Examples:
    if mnist.SOURCE.find() is None:
        pytest.skip("there is no MNIST here (make data-more)")
    return mnist.load_mnist()


@pytest.fixture(scope="session")
def real_hapt() -> Motion:
    try:
        return load_hapt()
    except FileNotFoundError:
        pytest.skip("there is no HAPT here (make data-more)")


@pytest.fixture(scope="session")
def real_vowels() -> Vowels:
    try:
        return load_vowels()
    except FileNotFoundError:
        pytest.skip("there is no vowel-context.data here (FEDMOE_DATA)")


@pytest.fixture(scope="session")
def real_roles() -> dict[str, str]:
    try:
        return load_roles()
    except FileNotFoundError:
        pytest.skip("there is no tinyshakespeare.txt here (FEDMOE_DATA)")
