import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def tiny_target(monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny experiment, as a user would name their own; found by worker processes too."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{HERE.parents[1]}")
    sys.modules.pop("tiny", None)
    return "tiny:tiny"
