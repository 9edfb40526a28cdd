"""Whose random numbers: those of the server's process, and those of its clients beside it."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np

State = tuple[Any, Any, Any]


def seed_draws(*key: int) -> None:
    """Seed Python's, NumPy's and torch's global generators by a key, as its only cause."""
    word = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest())
    random.seed(word)
    np.random.seed([word >> 32, word & 0xFFFFFFFF])
    if torch := sys.modules.get("torch"):
        torch.manual_seed(word >> 1)


class Apart:
    """Global generators that clients have to themselves, though they share a process.

    Where clients have processes of their own, what they draw or seed changes nothing in the server.
    Within `with apart():` the same holds here.
    """

    def __init__(self) -> None:
        self._clients: State | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        server = _state()
        if self._clients is None:
            random.seed()
            np.random.seed()
            if torch := sys.modules.get("torch"):
                torch.seed()
        else:
            _set(self._clients)
        try:
            yield
        finally:
            self._clients = _state()
            _set(server)


def _state() -> State:
    torch = sys.modules.get("torch")
    return random.getstate(), np.random.get_state(), torch.get_rng_state() if torch else None


def _set(state: State) -> None:
    pythons, numpys, torchs = state
    random.setstate(pythons)
    np.random.set_state(numpys)
    if torchs is not None:
        sys.modules["torch"].set_rng_state(torchs)
