import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.federated.average import (
    ByExpert,
    average_by_expert,
    averaged,
    by_examples,
    by_tokens,
    tokens_of,
)
from fedmoe.federated.sums import Sums
from fedmoe.nn.vision import small_vit
from fedmoe.state import ROW, split_state, state_hash
from fedmoe.types import ClientUpdate, ExpertId, MoEState, Term
from tests.tiny import number, one_layer, profile, ragged, tiny, update

E0, E1 = ExpertId(0, 0), ExpertId(0, 1)


def test_experts_weigh_by_tokens_and_the_rest_by_examples():
    model = one_layer(0.0, 0.0, 0.0)
    updates = [
        update(0, one_layer(1.0, 1.0, 1.0), [3, 1], num_examples=1),
        update(1, one_layer(5.0, 5.0, 5.0), [1, 3], num_examples=4),
    ]
    merged = average_by_expert(model, updates)
    assert merged.shared["w"].tolist() == [pytest.approx(4.2)]  # (1*1 + 4*5) / 5
    assert merged.experts[E0]["v"].tolist() == [2.0]  # (3*1 + 1*5) / 4
    assert merged.experts[E1]["v"].tolist() == [4.0]  # (1*1 + 3*5) / 4


def test_by_examples_everybody_who_used_an_expert_counts_with_all_examples():
    model = one_layer(0.0, 0.0, 7.0)
    updates = [
        update(0, one_layer(0.0, 1.0, 1.0), [1, 0], num_examples=3),
        update(1, one_layer(0.0, 5.0, 2.0), [9, 0], num_examples=1),
    ]
    merged = average_by_expert(model, updates, by_examples)
    assert merged.experts[E0]["v"].tolist() == [2.0]  # (3*1 + 1*5) / 4
    assert merged.experts[E1]["v"].tolist() == [7.0]  # nobody used it


def odd_state(seed, shape=(7,)):
    """Values that no grid holds: of every magnitude, with zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator)
    value = value * 10 ** (torch.rand(shape, generator=generator) * 20 - 18)
    value.view(-1)[0] = -0.0
    return {"v": value, "h": value.bfloat16(), "d": value.double() / 3}


def bits(t):
    return t.contiguous().view(torch.uint8).tolist()


def test_what_nobody_sent_or_used_stays_bit_for_bit():
    old = MoEState(odd_state(1), {E0: odd_state(2), E1: odd_state(3), ExpertId(1, 0): odd_state(4)})
    before = state_hash(old)
    assert state_hash(average_by_expert(old, [])) == before
    scouts = [update(k, MoEState({}, {}), [5, 5]) for k in range(3)]
    assert state_hash(average_by_expert(old, scouts)) == before
    # E1 is held by two clients whose data never went there, and nobody holds the other layer's.
    moved = MoEState(old.shared, {E0: odd_state(5), E1: odd_state(6)})
    merged = average_by_expert(old, [update(k, moved, [4, 0]) for k in range(2)])
    for e in (E1, ExpertId(1, 0)):
        assert {n: bits(t) for n, t in merged.experts[e].items()} == {
            n: bits(t) for n, t in old.experts[e].items()
        }
    assert bits(merged.experts[E0]["v"]) != bits(old.experts[E0]["v"])


def random_updates(num, seed):
    """Of clients that hold different sub-MoEs of a ragged model and sent tokens to some of them."""
    generator = torch.Generator().manual_seed(seed)
    base = split_state(ragged())
    updates = []
    for client in range(num):
        count_LE = torch.randint(0, 40, (2, 3), generator=generator)
        held = [e for e in sorted(base.experts) if torch.rand(1, generator=generator) < 0.6]

        def moved(part):
            return {
                n: t + torch.randn(t.shape, generator=generator) * 0.1
                if t.is_floating_point()
                else t + 5
                for n, t in part.items()
            }

        model = MoEState(moved(base.shared), {e: moved(base.experts[e]) for e in held})
        for e in base.experts:
            if e not in held:
                count_LE[e.layer, e.expert] = 0
        count_LE[1, 2] = 0  # the second layer has two experts
        size = int(torch.randint(1, 300, (1,), generator=generator))
        updates.append(ClientUpdate(client, size, model, profile(*count_LE.tolist()), {}))
    return updates


@given(st.data(), st.integers(0, 5), st.integers(1, 6), st.sampled_from([by_tokens, by_examples]))
def test_the_order_of_updates_does_not_change_a_bit(data, seed, num, weigh):
    base, updates = split_state(ragged()), random_updates(num, seed)
    shuffled = data.draw(st.permutations(updates))
    assert state_hash(average_by_expert(base, shuffled, weigh)) == state_hash(
        average_by_expert(base, updates, weigh)
    )


def slow_mean(pairs):
    total = sum(weight for _, weight in pairs)
    return sum(value.double() * weight for value, weight in pairs) / total


@pytest.mark.parametrize("weigh", [by_tokens, by_examples])
@pytest.mark.parametrize("seed", range(4))
def test_an_average_equals_its_definition(seed, weigh):
    base, updates = split_state(ragged()), random_updates(5, seed)
    merged = average_by_expert(base, updates, weigh)
    for name, value in merged.shared.items():
        wanted = slow_mean([(u.model.shared[name], u.num_examples) for u in updates])
        wanted = wanted if value.is_floating_point() else wanted.round()
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-6)
    for e, state in merged.experts.items():
        holders = [u for u in updates if e in u.model.experts and tokens_of(u.profile, e)]
        for name, value in state.items():
            if not holders:
                assert torch.equal(value, base.experts[e][name])
                continue
            pairs = [(u.model.experts[e][name], weigh(u, e)) for u in holders]
            torch.testing.assert_close(value.double(), slow_mean(pairs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [ragged, tiny, small_vit], ids=lambda m: m.__name__)
def test_merging_unchanged_parts_of_all_clients_changes_nothing(make):
    base = split_state(make())
    layers = 1 + max(e.layer for e in base.experts)
    width = 1 + max(e.expert for e in base.experts)
    updates = []
    for client in range(5):
        held = [e for e in base.experts if (e.expert + e.layer + client) % 3]
        count = [[17 * client + e + 1 for e in range(width)] for _ in range(layers)]
        part = base.only(frozenset(held))
        updates.append(ClientUpdate(client, 31 * client + 10, part, profile(*count), {}))
    merged = average_by_expert(base, updates)
    for name, value in base.shared.items():
        torch.testing.assert_close(merged.shared[name], value, rtol=0, atol=1e-7)
    for e, state in base.experts.items():
        for name, value in state.items():
            torch.testing.assert_close(merged.experts[e][name], value, rtol=0, atol=1e-7)


@given(st.integers(0, 10**6))
def test_a_row_moves_with_the_same_coefficients_as_its_expert(seed):
    # Put the same number into an expert and its row: it must come out the same.
    generator = torch.Generator().manual_seed(seed)
    base = MoEState({}, {e: {"v": number(0.0), ROW + "w": number(0.0)} for e in (E0, E1)})
    updates = []
    for client in range(4):
        values = torch.randn(2, generator=generator)
        count = torch.randint(0, 3, (2,), generator=generator).tolist()
        experts = {
            e: {"v": v.reshape(1), ROW + "w": v.reshape(1).clone()}
            for e, v in zip((E0, E1), values, strict=True)
        }
        updates.append(update(client, MoEState({}, experts), count))
    for state in average_by_expert(base, updates).experts.values():
        assert bits(state["v"]) == bits(state[ROW + "w"])


def test_a_profile_that_does_not_reach_an_expert_says_0_tokens():
    p = profile([1, 2], [3, 4])
    assert [tokens_of(p, ExpertId(*e)) for e in [(1, 1), (0, 1), (2, 0), (0, 2)]] == [4, 2, 0, 0]


def test_the_model_is_not_changed_by_averaging():
    base = split_state(ragged())
    before = state_hash(base)
    average_by_expert(base, random_updates(4, seed=0))
    assert state_hash(base) == before


def test_means_of_experts_that_the_model_has_not_are_refused():
    sums = Sums()
    sums.add([Term(ExpertId(7, 1), {"v": number(1.0)}, 1)])
    with pytest.raises(ValueError, match="expert 1 of layer 7 is not in the model"):
        averaged(one_layer(0.0, 0.0), sums)


@given(st.data(), st.integers(0, 3), st.integers(1, 3))
def test_updates_may_be_added_up_in_any_number_of_places(data, seed, num_places):
    base, updates = split_state(ragged()), random_updates(5, seed)
    places = [Sums() for _ in range(num_places)]
    for one in updates:
        places[data.draw(st.integers(0, num_places - 1))].add(ByExpert()(one))
    first, *rest = data.draw(st.permutations(places))
    for other in rest:
        first.merge(other)
    assert state_hash(averaged(base, first)) == state_hash(average_by_expert(base, updates))
