"""Random numbers that depend on who draws them and when, and on nothing else.

Every draw of fedmoe comes from a generator keyed by (seed, round, client), so in-process, Ray and
Flower give the same result from the same seed, whatever the order in which clients run.
"""

import numpy as np
import torch

WORD = 2**32


def numpy_generator(seed: int, *key: int) -> np.random.Generator:
    """A generator for `key`, usually (round, client); different keys give independent streams."""
    return np.random.default_rng(np.random.SeedSequence(_entropy(seed, key)))


def torch_generator(seed: int, *key: int) -> torch.Generator:
    """As `numpy_generator`, for torch on the CPU (draw there, then move, on every device)."""
    [word] = np.random.SeedSequence(_entropy(seed, key)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(word) & (2**63 - 1))


def _entropy(seed: int, key: tuple[int, ...]) -> list[int]:
    # A larger number would be taken as two, and so meet another key.
    if not all(0 <= word < WORD for word in (seed, *key)):
        raise ValueError(
            f"seed and key must be 0 or more and below 2**32, got seed {seed} and key {key}"
        )
    return [seed, len(key), *key]
