import pytest
import torch

from fedmoe.nn.extractors import (
    PRIVATE,
    SHARED,
    fashion_extractors,
    motion_extractors,
    vowel_extractors,
)
from fedmoe.profile import watch_gates

MODELS = {
    "fashion": (fashion_extractors, (1, 28, 28), 10),
    "motion": (motion_extractors, (6, 128), 6),
    "vowels": (vowel_extractors, (10,), 11),
}


def inputs(shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("make, shape, classes", MODELS.values(), ids=MODELS)
def test_the_header_sees_the_gates_mixture_of_both_features(make, shape, classes):
    model, x = make(seed=1), inputs(shape)
    private, shared = (model.mixture.experts[str(e)][1] for e in (PRIVATE, SHARED))
    share_N2 = (x.flatten(1) @ model.mixture.gate.proj.weight.T).softmax(-1)
    feature = share_N2[:, :1] * private(x) + share_N2[:, 1:] * shared(x)
    torch.testing.assert_close(model(x), model.header(feature))
    assert model(x).shape == (3, classes)


@pytest.mark.parametrize("make, shape, classes", MODELS.values(), ids=MODELS)
def test_every_example_runs_both_and_every_part_learns(make, shape, classes):
    model = make()
    with watch_gates(model) as routings:
        model(inputs(shape)).square().sum().backward()
    assert (routings[0].weight_TE > 0).all()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("make, shape, classes", MODELS.values(), ids=MODELS)
def test_the_shared_extractor_is_the_small_one(make, shape, classes):
    experts = make().mixture.experts
    assert 4 * count(experts[str(SHARED)]) < count(experts[str(PRIVATE)])


@pytest.mark.parametrize("make, shape, classes", MODELS.values(), ids=MODELS)
def test_models_are_made_of_their_seed_alone(make, shape, classes):
    before = torch.get_rng_state()
    a, b, c = make(seed=1).state_dict(), make(seed=1).state_dict(), make(seed=2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)
