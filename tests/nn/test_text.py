import pytest
import torch

from fedmoe.nn.text import CharacterStem, character_model

CODES_NT = torch.arange(3 * 16).view(3, 16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_codes_may_be_of_any_integer_type(dtype):
    model = character_model()
    assert torch.equal(model(CODES_NT.to(dtype)), model(CODES_NT))


def test_every_character_and_its_place_has_a_say():
    stem = CharacterStem(num_codes=65, context=16, embedding=4, dim=8)
    feature_ND = stem(CODES_NT[:1])
    for place in range(16):
        changed_NT = CODES_NT[:1].clone()
        changed_NT[0, place] = 64
        assert not torch.equal(stem(changed_NT), feature_ND)
    swapped_NT = CODES_NT[:1].roll(1, dims=1)
    assert not torch.equal(stem(swapped_NT), feature_ND)


def test_a_feature_is_a_rectified_map_of_the_embeddings_side_by_side():
    stem = CharacterStem(num_codes=3, context=2, embedding=1, dim=2)
    with torch.no_grad():
        stem.embed.weight.copy_(torch.tensor([[1.0], [10.0], [100.0]]))
        stem.mix.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        stem.mix.bias.copy_(torch.tensor([0.5, 0.5]))
    # 10 + 2*100 + 0.5; -100 + 0.5 < 0
    assert stem(torch.tensor([[1, 2]], dtype=torch.uint8)).tolist() == [[210.5, 0.0]]
