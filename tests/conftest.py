"""What every test relies on: one thread, no network, and data or a browser if they are there.

In CI (CI=true) nothing may be missing; elsewhere a test that lacks something is skipped, and
says what it lacks.
"""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

# Before torch, Flower or the hub's client is imported anywhere: they read these only then.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

import hypothesis
import pytest
import torch

from fedmoe.data.examples import Examples
from fedmoe.data.fashion import find_folder, load_fashion_mnist

IN_CI = os.environ.get("CI") == "true"

# The machine may be busy, so no deadline; the same examples in every run.
hypothesis.settings.register_profile("fedmoe", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("fedmoe")


def _lacks(what: str) -> NoReturn:
    if IN_CI:
        pytest.fail(f"in CI nothing may be missing, and there is no {what}")
    pytest.skip(f"there is no {what} here")


@pytest.fixture(autouse=True)
def _marked_needs(request: pytest.FixtureRequest) -> None:
    """Skip a test marked gpu where there is none; no CI machine is asked to have one."""
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device here")


@pytest.fixture(scope="session")
def fashion_mnist() -> Examples:
    """The real Fashion-MNIST; `make data` brings it."""
    if find_folder() is None:
        _lacks("Fashion-MNIST (make data)")
    return load_fashion_mnist()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium for playwright's executable_path; `make browser` brings it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        _lacks("Chromium (make browser)")
    return path


def pytest_make_parametrize_id(val: object) -> str | None:
    """Ids that are the same in every process: test processes must agree on them."""
    if isinstance(val, set | frozenset):
        return ",".join(sorted(map(str, val))) or "empty"
    if " at 0x" in repr(val):
        return getattr(val, "__name__", type(val).__name__)
    return None


@pytest.fixture(autouse=True)
def usual_arithmetic():
    """Where clients work, denormals count as 0 from then on; another test shall not notice."""
    yield
    torch.set_flush_denormal(False)
