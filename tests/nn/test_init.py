import torch
from torch import nn

from fedmoe.nn.init import seeded


def build():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 200), nn.Conv1d(3, 5, 2), nn.Embedding(90, 8)
    )


def test_the_seed_alone_decides_every_value():
    a, b, c = seeded(build, 1), seeded(build, 1), seeded(build, 2)
    for p, q, r in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q) and not torch.equal(p, r)


def test_the_global_generator_is_not_moved():
    before = torch.get_rng_state()
    seeded(build, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_values_fill_torchs_default_range():
    weight = seeded(build, 0)[2].weight  # 4 inputs: within 1/2
    assert 0.49 < weight.max() <= 0.5 and -0.5 <= weight.min() < -0.49


def test_embeddings_are_standard_normal():
    weight = seeded(build, 0)[4].weight  # 720 draws: the mean's deviation is 0.04
    assert abs(weight.mean()) < 0.15 and abs(weight.std() - 1) < 0.15
    assert weight.abs().max() > 2


def test_a_convolution_over_time_fills_torchs_default_range():
    weight = seeded(lambda: nn.Conv1d(2, 100, 2), 0).weight  # 4 inputs: within 1/2
    assert 0.49 < weight.max() <= 0.5 and -0.5 <= weight.min() < -0.49
