import pytest

from fedmoe.federated.average import average_by_expert, by_examples
from fedmoe.federated.methods.flame import SCALE, frequency_power
from fedmoe.state import state_hash
from fedmoe.types import ActivationProfile, ClientUpdate, ExpertId
from tests.tiny import one_layer, profile, update

FIRST, SECOND = ExpertId(0, 0), ExpertId(0, 1)


def updates():
    return [
        update(0, one_layer(1.0, 1.0, 2.0), [6, 2], num_examples=8),
        update(1, one_layer(3.0, 5.0, 7.0), [0, 4], num_examples=4),
    ]


def test_with_power_0_it_is_by_examples():
    weigh = frequency_power(0)
    assert [[weigh(u, e) for e in (FIRST, SECOND)] for u in updates()] == [[8, 8], [0, 4]]
    model = one_layer(0.0, 0.0, 0.0)
    assert state_hash(average_by_expert(model, updates(), weigh)) == state_hash(
        average_by_expert(model, updates(), by_examples)
    )


@pytest.mark.parametrize("power, share", [(1, 2 / 8), (2, (2 / 8) ** 2), (4, (2 / 8) ** 4)])
def test_weights_are_examples_times_a_power_of_the_frequency(power, share):
    weigh = frequency_power(power)
    one, other = updates()
    assert weigh(one, SECOND) == SCALE * 8 * share
    assert weigh(other, SECOND) == SCALE * 4  # all of its tokens
    assert weigh(other, FIRST) == 0


def test_an_average_by_hand():
    model = average_by_expert(one_layer(0.0, 0.0, 0.0), updates(), frequency_power(1))
    # 8 * 2/8 = 2 and 4 * 4/4 = 4 examples' worth: (2*2 + 4*7) / 6
    assert model.experts[SECOND]["v"].item() == pytest.approx(32 / 6)
    assert model.experts[FIRST]["v"].item() == 1.0


def test_a_copy_that_saw_any_token_counts():
    rare = ClientUpdate(0, 10, one_layer(0.0, 1.0), profile([1, 9_999]), {})
    assert frequency_power(4)(rare, FIRST) == 1


def test_with_several_experts_a_token_the_frequency_is_still_a_share_of_tokens():
    p = profile([8, 8])  # each of 8 tokens ran both
    both = ActivationProfile(p.count_LE, p.weight_LE, p.score_LE, p.token_L // 2)
    assert frequency_power(3)(ClientUpdate(0, 5, one_layer(0.0), both, {}), FIRST) == SCALE * 5


def test_a_negative_power_is_refused():
    with pytest.raises(ValueError, match="power must be 0 or more, got -1"):
        frequency_power(-1)
