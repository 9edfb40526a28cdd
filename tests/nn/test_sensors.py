import torch

from fedmoe.nn.sensors import MOTION_WIDTH, SignalStem, motion_cnn


def test_it_has_the_parameters_that_its_docstring_says():
    # 6*32*9 + 32, 32*64*7 + 64, a gate of 384*16, 16 experts of 384*32 + 32 + 32*6 + 6
    stem = 1_760 + 14_400
    assert sum(p.numel() for p in motion_cnn().parameters()) == stem + 6_144 + 16 * 12_518
    assert stem + 6_144 + 16 * 12_518 == 222_592


def test_six_channels_of_128_samples_become_384_features():
    signal_NCT = torch.randn(3, 6, 128, generator=torch.Generator().manual_seed(0))
    feature_ND = SignalStem()(signal_NCT)
    assert feature_ND.shape == (3, MOTION_WIDTH)


def test_a_feature_sees_a_stretch_of_time():
    """The first of six places in time sees the first 9 - 1 + 4 * (7 + 4 - 1) = 48 samples."""
    stem = SignalStem()
    signal_NCT = torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(0))
    changed_NCT = signal_NCT.clone()
    changed_NCT[..., 48:] += 1
    same = (stem(signal_NCT) == stem(changed_NCT)).view(64, 6)
    assert same[:, 0].all()
    assert not same[:, 1:].all()
    changed_NCT = signal_NCT.clone()
    changed_NCT[..., 47] += 10
    assert not (stem(signal_NCT) == stem(changed_NCT)).view(64, 6)[:, 0].all()
