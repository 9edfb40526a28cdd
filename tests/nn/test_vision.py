import pytest
import torch

from fedmoe.nn.moe import MoE
from fedmoe.nn.vision import dense_cnn, fashion_cnn, small_vit

MODELS = {"fashion_cnn": fashion_cnn, "dense_cnn": dense_cnn, "small_vit": small_vit}


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def image_NCHW():
    return torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_the_dense_cnn_has_582026_parameters():
    assert count(dense_cnn()) == 582_026


def test_the_experts_of_the_cnn_share_out_the_dense_hidden_layer():
    moe, dense = fashion_cnn().head, dense_cnn().head
    assert isinstance(moe, MoE)
    # The same, but for a bias of the classifier (10) in each of 16 experts.
    assert count(moe.experts) == count(dense) + 15 * 10


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_images_become_logits(model, image_NCHW):
    assert model()(image_NCHW).shape == (2, 10)
    assert model(num_classes=7)(image_NCHW).shape == (2, 7)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_models_are_made_of_their_seed_alone(model):
    before = torch.get_rng_state()
    a, b, c = model(seed=1).state_dict(), model(seed=1).state_dict(), model(seed=2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_models_can_be_made_without_memory(model):
    with torch.device("meta"):
        meta = model()
    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in model().named_parameters()
    }


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_stem_and_head_are_parts_with_parameters(model):
    assert count(model().stem) > 0 and count(model().head) > 0


def test_a_vit_cuts_its_image_into_16_tokens(image_NCHW):
    assert small_vit().stem(image_NCHW).shape == (2, 16, 64)


def test_a_patch_is_a_square_of_the_image():
    stem = small_vit().stem
    image_NCHW = torch.zeros(1, 1, 28, 28)
    nothing_PD = stem(image_NCHW)[0]
    image_NCHW[0, 0, 7:14, 14:21] = 1.0  # second row, third column: patch 1*4 + 2
    changed_P = (stem(image_NCHW)[0] != nothing_PD).any(-1)
    assert changed_P.nonzero().flatten().tolist() == [6]


def test_every_layer_of_a_vit_is_reached_by_gradient(image_NCHW):
    vit = small_vit(num_experts=2, k=2)
    vit(image_NCHW).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in vit.parameters())


def test_an_image_that_patches_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="multiple of the patch width 8, got 28"):
        small_vit(patch=8)
