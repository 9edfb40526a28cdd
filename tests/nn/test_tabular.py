import torch

from fedmoe.nn.tabular import vowel_mlp


def test_it_has_the_parameters_that_its_docstring_says():
    # 10*64 + 64, a gate of 64*8, 8 experts of 64*32 + 32 + 32*11 + 11
    assert sum(p.numel() for p in vowel_mlp().parameters()) == 704 + 512 + 8 * 2443 == 20_760


def test_the_stem_cuts_features_off_at_0():
    x_ND = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    assert (vowel_mlp().stem(x_ND) == 0).any() and vowel_mlp().stem(x_ND).min() == 0
