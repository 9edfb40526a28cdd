import pytest
import torch
from torch import nn

from fedmoe.nn.classifier import StemAndHead
from fedmoe.nn.encoder import Encoded, Encoder, PrototypeHead, of_encoder
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.init import seeded

N, D, F, C = 8, 3, 4, 3


def classifier(seed=0):
    return seeded(lambda: StemAndHead(nn.Linear(D, D), FFN(D, F, C)), seed)


@pytest.fixture
def x_ND():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(2))


def test_an_encoder_is_its_classifier_without_the_last_layer_to_mean_0_and_deviation_1(x_ND):
    model = classifier()
    encoder = Encoder(model)
    assert encoder.out_dim == F
    hidden_NF = model.head.up(model.stem(x_ND)).relu()
    torch.testing.assert_close(model.head.down(hidden_NF), model(x_ND))
    centred_NF = hidden_NF - hidden_NF.mean(1, keepdim=True)
    deviation_N1 = (centred_NF.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(encoder(x_ND), centred_NF / deviation_N1)
    assert {n.split(".")[0] for n in encoder.state_dict()} == {"stem", "up"}
    with pytest.raises(ValueError, match="head must be an FFN, got Linear"):
        Encoder(StemAndHead(nn.Linear(D, D), nn.Linear(D, C)))


def test_a_head_learns_and_its_encoder_does_not(x_ND):
    model = Encoded(Encoder(classifier()), F, nn.Linear(F, C), (D,))
    model(x_ND).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == of_encoder(name), name
    torch.testing.assert_close(model(model.rows(x_ND)), model(x_ND))


def test_widths_that_do_not_match_are_both_named(x_ND):
    with pytest.raises(ValueError, match="the encoder must give 7 features, got 4"):
        Encoded(Encoder(classifier()), 7, nn.Linear(7, C), (D,))
    silent = Encoded(nn.Linear(D, F), 7, nn.Linear(7, C), (D,))  # tells its width only when it runs
    with pytest.raises(ValueError, match="the encoder must give 7 features, got 4"):
        silent(x_ND)


def test_inputs_and_features_are_told_apart_by_their_shapes_alone(x_ND):
    model = Encoded(Encoder(classifier()), F, nn.Linear(F, C), (D,))
    feature_NF = model.features(x_ND)
    assert torch.equal(model.rows(feature_NF), feature_NF)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3\), or be their 4 features"):
        model(torch.zeros(N, D + F))
    flat = StemAndHead(nn.Linear(F, D), FFN(D, F, C))  # takes rows as wide as its features
    with pytest.raises(ValueError, match=r"input_shape must differ .* got \(4,\)"):
        Encoded(Encoder(flat), F, nn.Linear(F, C), (F,))
    upright = Encoded(Encoder(StemAndHead(nn.Sequential(nn.Flatten(), flat.stem), flat.head)), F,
                      nn.Linear(F, C), (1, F))  # fmt: skip
    x_N1F = torch.randn(N, 1, F)
    assert not torch.equal(upright.rows(x_N1F), x_N1F.flatten(1))


def test_prototypes_worked_by_hand():
    head = PrototypeHead(2, 3)
    head.fit(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 8.0]]), torch.tensor([0, 0, 2]))
    assert head.count_C.tolist() == [2.0, 0.0, 1.0]
    logit_NC = head(torch.tensor([[1.0, 2.0], [0.0, 7.0]]))
    # means are (1, 0) and (0, 8), class 1 has none; squared distances over 2 numbers
    expected_NC = [[-4 / 2, -torch.inf, -37 / 2], [-50 / 2, -torch.inf, -1 / 2]]
    torch.testing.assert_close(logit_NC, torch.tensor(expected_NC))


def test_the_mean_of_clients_heads_is_the_head_of_all_their_examples():
    generator = torch.Generator().manual_seed(0)
    x_NF = torch.randn(30, F, generator=generator)
    y_N = torch.randint(0, C, (30,), generator=generator)
    whole, parts = PrototypeHead(F, C), [PrototypeHead(F, C) for _ in range(2)]
    whole.fit(x_NF, y_N)
    for part, rows in zip(parts, (slice(0, 25), slice(25, 30)), strict=True):
        part.fit(x_NF[rows], y_N[rows])
    merged = PrototypeHead(F, C)
    for name, p in merged.named_parameters():
        p.data = torch.stack([part.get_parameter(name).data for part in parts]).mean(0)
    torch.testing.assert_close(merged(x_NF), whole(x_NF))
