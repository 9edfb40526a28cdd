from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmoe.device import peak_memory
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.moe import MoE
from fedmoe.nn.vision import dense_cnn, fashion_cnn, small_vit
from fedmoe.state import (
    ROW,
    build_part,
    everything,
    is_expert,
    is_gate,
    layer_sizes,
    load_state,
    moe_layers,
    named_by_role,
    nothing,
    other_than,
    overlay,
    parameter_bytes,
    rows_of,
    split_state,
    state_hash,
    take_names,
)
from fedmoe.types import ExpertId, MoEState
from tests.tiny import ragged, tiny


def small_cnn(seed=0):
    return fashion_cnn(num_experts=4, hidden=8, seed=seed)


def tiny_vit(seed=0):
    return small_vit(
        image=8, patch=4, dim=8, depth=2, heads=2, hidden=6, num_experts=3, num_classes=5, seed=seed
    )


class Rowless(nn.Module):
    """A gate without a row for each expert: its parameters are everybody's."""

    def __init__(self):
        super().__init__()
        self.inner = TopKGate(3, 2, 1)

    def forward(self, x_TD, present_E):
        return self.inner(x_TD, present_E)


def rowless(seed=0):
    del seed
    return nn.Sequential(MoE(Rowless(), {0: FFN(3, 2), 1: FFN(3, 2)}, 2))


def bare(seed=0):
    """A MoE layer that is the whole model, so that its path is empty."""
    return tiny(seed=seed).head


MODELS = {
    "cnn": small_cnn,
    "vit": tiny_vit,
    "ragged": ragged,
    "tiny": lambda seed=0: tiny(seed=seed),
    "bare": bare,
    "rowless": rowless,
    "dense": lambda seed=0: dense_cnn(hidden=4, seed=seed),
}
INPUTS = {
    "cnn": (1, 28, 28),
    "vit": (1, 8, 8),
    "ragged": (3,),
    "tiny": (3,),
    "bare": (4,),
    "rowless": (3,),
    "dense": (1, 28, 28),
}
WITH_ROWS = [name for name in MODELS if name not in ("rowless", "dense")]


def all_experts(model):
    return frozenset(
        ExpertId(i, e) for i, (_, moe) in enumerate(moe_layers(model)) for e in moe.held
    )


def some_input(name):
    return torch.randn(5, *INPUTS[name], generator=torch.Generator().manual_seed(9))


def count_numbers(state):
    return sum(t.numel() for part in (state.shared, *state.experts.values()) for t in part.values())


@pytest.fixture(params=MODELS, ids=str)
def name(request):
    return request.param


def test_split_and_load_carry_every_bit(name):
    model, other = MODELS[name](seed=1), MODELS[name](seed=2)
    load_state(other, split_state(model))
    assert state_hash(split_state(other)) == state_hash(split_state(model))
    for (n, a), (m, b) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert n == m and torch.equal(a, b)
    torch.testing.assert_close(other.eval()(some_input(name)), model.eval()(some_input(name)))


def test_no_number_is_in_a_state_twice_or_missing(name):
    model = MODELS[name]()
    assert count_numbers(split_state(model)) == sum(t.numel() for t in model.state_dict().values())


@given(st.data())
def test_any_sub_moe_travels_without_a_bit_lost_and_no_more_of_the_model_with_it(data):
    # Counts per layer differ, and may be 0.
    make = MODELS[data.draw(st.sampled_from(["ragged", "vit", "bare", "rowless"]))]
    whole = split_state(make(seed=3))
    sub_moe = frozenset(data.draw(st.sets(st.sampled_from(sorted(whole.experts)))))
    part = build_part(make, sub_moe)
    load_state(part, whole.only(sub_moe))
    back = split_state(part)
    assert set(back.experts) == sub_moe
    assert state_hash(back) == state_hash(whole.only(sub_moe))
    assert overlay(whole, back).experts.keys() == whole.experts.keys()
    assert state_hash(overlay(whole, back)) == state_hash(whole)


@pytest.mark.parametrize("name", ["cnn", "vit", "ragged"])
def test_a_part_computes_what_the_whole_model_does_with_the_other_experts_closed(name):
    whole = MODELS[name](seed=3)
    sub_moe = frozenset(e for e in all_experts(whole) if e.expert != 1)
    part = build_part(MODELS[name], sub_moe)
    load_state(part, split_state(whole).only(sub_moe))
    for layer, (_, moe) in enumerate(moe_layers(whole)):
        moe.hold([e.expert for e in sub_moe if e.layer == layer])
    x = some_input(name)
    torch.testing.assert_close(part.eval()(x), whole.eval()(x))


@pytest.mark.parametrize("name", WITH_ROWS)
def test_a_gates_row_travels_with_its_expert_and_other_rows_are_zero_and_unknown(name):
    whole = MODELS[name](seed=3)
    state = split_state(whole)
    sub_moe = frozenset(e for e in all_experts(whole) if (e.layer + e.expert) % 2 == 0)
    part = build_part(MODELS[name], sub_moe)
    load_state(part, state.only(sub_moe))
    for layer, ((_, moe), (_, full)) in enumerate(
        zip(moe_layers(part), moe_layers(whole), strict=True)
    ):
        for e in range(moe.num_experts):
            held = ExpertId(layer, e) in sub_moe
            row_D = moe.gate.proj.weight[e]
            assert bool(moe.gate.known_E[e]) == bool(moe.present_E[e]) == held
            assert torch.equal(row_D, full.gate.proj.weight[e] * held)
            if held:
                sent_D = state.experts[ExpertId(layer, e)][f"{ROW}proj.weight"]
                assert torch.equal(row_D, sent_D)


def test_rows_of_absent_experts_are_known_but_not_open():
    state, held = split_state(tiny(seed=3)), ExpertId(0, 2)
    absent = frozenset(state.experts) - {held}
    part = build_part(tiny, frozenset({held}))
    load_state(part, state.only(frozenset({held})), rows_of(state, absent))
    assert part.head.gate.known_E.all()
    assert part.head.present_E.tolist() == [False, False, True, False]
    assert torch.equal(part.head.gate.proj.weight, tiny(seed=3).head.gate.proj.weight)
    assert set(split_state(part).experts) == {held}  # rows alone are nobody's to send


def test_loading_again_forgets_what_was_loaded_before():
    state, model = split_state(tiny(seed=3)), tiny(seed=4)
    absent = frozenset({ExpertId(0, 3)})
    load_state(model, state.only(frozenset(state.experts) - absent), rows_of(state, absent))
    load_state(model, state.only(frozenset({ExpertId(0, 0)})))
    assert model.head.held == (0,)
    assert model.head.gate.known_E.tolist() == [True, False, False, False]
    assert not model.head.gate.proj.weight[1:].any()


def test_absent_experts_take_no_memory():
    make = partial(fashion_cnn, num_experts=64, hidden=32)
    sub_moe = frozenset({ExpertId(0, 5)})
    wanted = parameter_bytes(dict(build_part(make, sub_moe).state_dict()))
    whole = parameter_bytes(dict(make().state_dict()))
    part = build_part(make, sub_moe)
    # One expert of 1024 x 32 + 32 x 10 weights and biases, and the gate's 64 rows.
    assert sum(p.numel() for p in part.head.parameters()) == 33_130 + 64 * 1024
    peak = peak_memory(lambda: build_part(make, sub_moe), torch.device("cpu"))
    assert peak < 1.1 * wanted < whole / 10


def test_the_full_model_is_made_on_the_meta_device():
    where = []

    def make():
        where.append(torch.empty(0).device.type)
        return tiny()

    part = build_part(make, frozenset({ExpertId(0, 1)}))
    assert where == ["meta"]
    assert all(t.device.type == "cpu" for t in (*part.parameters(), *part.buffers()))


def test_a_model_with_buffers_that_no_state_carries_is_made_for_real_and_keeps_them():
    def make():
        model = tiny()
        model.register_buffer("scale", torch.full((2,), 7.0), persistent=False)
        return model

    part = build_part(make, frozenset({ExpertId(0, 1)}))
    assert part.scale.tolist() == [7.0, 7.0]
    assert part.head.held == (1,)


@pytest.mark.parametrize("e", [ExpertId(0, 4), ExpertId(1, 0), ExpertId(-1, 0), ExpertId(0, -1)])
def test_a_part_with_an_expert_that_the_model_lacks_is_refused(e):
    with pytest.raises(ValueError, match=f"expert {e.expert} of layer {e.layer} is not in"):
        build_part(tiny, frozenset({ExpertId(0, 0), e}))


def test_a_state_does_not_change_with_the_model():
    model = ragged()
    model.train()
    state = split_state(model)
    before = state_hash(state)
    model(some_input("ragged"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert state_hash(state) == before != state_hash(split_state(model))


def test_a_counting_buffer_is_shared_and_stays_a_whole_number():
    model = ragged()
    model.train()
    model(some_input("ragged"))
    counter = split_state(model).shared["norm.num_batches_tracked"]
    assert counter.dtype == torch.int64 and counter.item() == 1


E0 = ExpertId(0, 0)


def changed(state, shared=None, expert=None, e=E0):
    """`state` with names put in place, or taken away where the value is None."""

    def patched(part, patch):
        return {n: t for n, t in {**part, **(patch or {})}.items() if t is not None}

    experts = {**state.experts, e: patched(state.experts.get(e, {}), expert)}
    return MoEState(patched(state.shared, shared), {k: s for k, s in experts.items() if s})


ZERO = torch.zeros(4, 3)
WRONG = {
    "a shared parameter is missing": (
        lambda s: changed(s, shared={"stem.weight": None}),
        "shared parameter 'stem.weight' is missing",
    ),
    "a shared parameter is one too many": (
        lambda s: changed(s, shared={"stem.scale": ZERO}),
        "shared parameter 'stem.scale' is not in the model",
    ),
    "a shared parameter has another shape": (
        lambda s: changed(s, shared={"stem.weight": ZERO.T}),
        r"'stem.weight' must have shape \(4, 3\), got \(3, 4\)",
    ),
    "a shared parameter has another dtype": (
        lambda s: changed(s, shared={"stem.weight": ZERO.double()}),
        "'stem.weight' must be torch.float32, got torch.float64",
    ),
    "an expert's parameter is missing": (
        lambda s: changed(s, expert={"up.bias": None}),
        "expert 0 of layer 0: parameter 'up.bias' is missing",
    ),
    "an expert's parameter is one too many": (
        lambda s: changed(s, expert={"scale": ZERO}),
        "expert 0 of layer 0: parameter 'scale' is not in the model",
    ),
    "an expert's parameter has another shape": (
        lambda s: changed(s, expert={"up.bias": torch.zeros(4)}),
        r"'up.bias' must have shape \(3,\), got \(4,\)",
    ),
    "an expert's row is missing": (
        lambda s: changed(s, expert={"gate:proj.weight": None}),
        "expert 0 of layer 0: parameter 'gate:proj.weight' is missing",
    ),
    "an expert's row has another dtype": (
        lambda s: changed(s, expert={"gate:proj.weight": torch.zeros(4).half()}),
        "'gate:proj.weight' must be torch.float32, got torch.float16",
    ),
    "an expert's number is too high": (
        lambda s: changed(s, expert={"x": ZERO}, e=ExpertId(0, 4)),
        "expert 4 of layer 0 is not in the model, which has layer 0: 0, 1, 2, 3",
    ),
    "a layer's number is too high": (
        lambda s: changed(s, expert={"x": ZERO}, e=ExpertId(1, 0)),
        "expert 0 of layer 1 is not in the model",
    ),
    "a layer's number is negative": (
        lambda s: changed(s, expert=dict(s.experts[E0]), e=ExpertId(-1, 0)),
        "expert 0 of layer -1 is not in the model",
    ),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(case):
    make_wrong, message = WRONG[case]
    model = tiny(seed=1)
    before = state_hash(split_state(model))
    with pytest.raises(ValueError, match=message):
        load_state(model, make_wrong(split_state(tiny(seed=2))))
    assert model.head.held == (0, 1, 2, 3)
    assert state_hash(split_state(model)) == before


@pytest.mark.parametrize(
    "e, rows, message",
    [
        (ExpertId(0, 4), {}, "gate rows of expert 4 of layer 0: the model has"),
        (ExpertId(1, 0), {}, "gate rows of expert 0 of layer 1: the model has"),
        (ExpertId(-1, 0), {}, "gate rows of expert 0 of layer -1: the model has"),
        (ExpertId(0, 3), {}, "row 'gate:proj.weight' is missing"),
        (ExpertId(0, 3), {"gate:proj.weight": torch.zeros(5)}, "must have shape"),
        (ExpertId(0, 3), {"gate:proj.weight": torch.zeros(4), "up.bias": ZERO}, "not in the model"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused_and_change_nothing(e, rows, message):
    model = tiny(seed=1)
    before = state_hash(split_state(model))
    with pytest.raises(ValueError, match=message):
        load_state(model, split_state(tiny(seed=2)).only(frozenset({E0})), {e: rows})
    assert state_hash(split_state(model)) == before


def test_an_expert_that_a_part_has_dropped_cannot_come_back():
    state = split_state(tiny())
    part = build_part(tiny, frozenset({E0}))
    with pytest.raises(ValueError, match="expert 1 of layer 0 is not in the model, .* 0: 0$"):
        load_state(part, state)


def test_roles_name_every_parameter_once_and_without_its_place_in_the_model(name):
    model = MODELS[name]()
    roles = [n for n, _ in named_by_role(model)]
    assert len(roles) == len(set(roles)) == len(list(model.parameters()))
    assert {id(p) for _, p in named_by_role(model)} == {id(p) for p in model.parameters()}


def test_the_roles_of_a_model_of_two_layers():
    roles = [n for n, _ in named_by_role(ragged())]
    assert [n for n in roles if is_gate(n)] == ["gates.0.proj.weight", "gates.1.proj.weight"]
    assert [n for n in roles if is_expert(n) and n.endswith("up.bias")] == [
        "experts.0.0.up.bias",
        "experts.0.1.up.bias",
        "experts.0.2.up.bias",
        "experts.1.0.up.bias",
        "experts.1.1.up.bias",
    ]
    assert [n for n in roles if not is_gate(n) and not is_expert(n)] == ["norm.weight", "norm.bias"]
    assert layer_sizes(ragged()) == (3, 2)


@pytest.mark.parametrize(
    "test",
    [everything, nothing, is_gate, is_expert, lambda n: "bias" in n],
    ids=["everything", "nothing", "gates", "experts", "biases"],
)
def test_what_passes_a_test_of_names_and_what_does_not_make_up_the_whole(name, test):
    state = split_state(MODELS[name](seed=3))
    yes, no = take_names(state, test), take_names(state, other_than(test))
    assert count_numbers(yes) + count_numbers(no) == count_numbers(state)
    assert state_hash(overlay(yes, no)) == state_hash(overlay(no, yes)) == state_hash(state)


def test_a_test_of_names_sees_parameters_of_a_model_and_of_a_state_alike():
    model = ragged()
    state = split_state(model)
    for test in (is_gate, is_expert, lambda n: n.startswith("experts.1.0.")):
        of_model = sum(p.numel() for n, p in named_by_role(model) if test(n))
        assert 0 < count_numbers(take_names(state, test)) == of_model


def test_the_top_of_an_overlay_wins():
    base = MoEState({"a": torch.tensor(1), "b": torch.tensor(2)}, {E0: {"v": torch.tensor(3)}})
    top = MoEState({"b": torch.tensor(4)}, {E0: {"w": torch.tensor(5)}})
    both = overlay(base, top)
    assert {n: int(t) for n, t in both.shared.items()} == {"a": 1, "b": 4}
    assert {n: int(t) for n, t in both.experts[E0].items()} == {"v": 3, "w": 5}


@given(st.integers(0, 10_000), st.integers(0, 31))
def test_a_single_bit_changes_the_hash(place, bit):
    state = split_state(tiny())
    parts = [state.shared, *state.experts.values()]
    tensors = [t for part in parts for t in part.values()]
    flat = tensors[place % len(tensors)].view(-1).view(torch.int32)
    before = state_hash(state)
    flat[place % len(flat)] ^= torch.tensor(1 << bit).to(torch.int32)
    assert state_hash(state) != before


def test_names_shapes_dtypes_and_owners_are_in_the_hash_but_order_and_layout_are_not():
    x = torch.arange(6.0)
    states = [
        MoEState({"a": x}, {}),
        MoEState({"b": x}, {}),
        MoEState({"a": x.reshape(2, 3)}, {}),
        MoEState({"a": x.reshape(3, 2)}, {}),
        MoEState({"a": x.view(torch.int32)}, {}),
        MoEState({}, {E0: {"a": x}}),
        MoEState({}, {ExpertId(0, 1): {"a": x}}),
        MoEState({}, {ExpertId(1, 0): {"a": x}}),
        MoEState({"a": x[:0]}, {}),
        MoEState({}, {}),
    ]
    assert len({state_hash(s) for s in states}) == len(states)
    one, other = torch.ones(2, 3), torch.zeros(2)
    a = MoEState({"a": one, "b": other}, {E0: {"v": one}, ExpertId(0, 1): {"v": one}})
    b = MoEState(
        {"b": other, "a": one.t().contiguous().t()}, {ExpertId(0, 1): {"v": one}, E0: {"v": one}}
    )
    assert state_hash(a) == state_hash(b)


def test_only_names_an_expert_that_is_not_there():
    with pytest.raises(KeyError, match="expert=7"):
        split_state(tiny()).only(frozenset({ExpertId(0, 7)}))
