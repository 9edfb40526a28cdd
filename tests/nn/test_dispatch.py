"""Every way of mixing experts gives what the plain loop gives: outputs and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmoe.native.ffns import available as compiled_ffns
from fedmoe.native.ffns import run_ffns
from fedmoe.nn import dispatch
from fedmoe.nn.dispatch import mix, mix_loop, run_segments, sort_rows
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.grouped import grouped_fits, plain_ffns, run_grouped
from fedmoe.nn.init import seeded


def grouped(x_RD, experts, counts, out_dim):
    ffns = plain_ffns(experts.values(), x_RD)
    assert ffns is not None
    return run_grouped(x_RD, ffns, counts)


WAYS = {"segments": run_segments, "grouped": grouped}
needs_a_compiler = pytest.mark.skipif(not compiled_ffns(), reason="no compiled kernels here")


@pytest.fixture(params=[*WAYS, pytest.param("compiled", marks=needs_a_compiler)])
def way(request, monkeypatch):
    if request.param in WAYS:
        in_torch(monkeypatch)
        monkeypatch.setattr(dispatch, "run_rows", WAYS[request.param])


def in_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "run_ffns", lambda *_: None)


def routing_weights(T, E, k, seed, skew=0.0):
    """Each token weighs k experts; with `skew` the lower-numbered ones are chosen more."""
    g = torch.Generator().manual_seed(seed)
    wish_TE = torch.rand(T, E, generator=g) - skew * torch.arange(E)
    best_TK = wish_TE.topk(min(k, E)).indices
    return torch.zeros(T, E).scatter(1, best_TK, torch.rand(T, min(k, E), generator=g) + 0.1)


def ffns(numbers, D, F, out, activation="relu", bias=True):
    def build():
        return nn.ModuleDict({str(e): FFN(D, F, out, activation, bias=bias) for e in numbers})

    return seeded(build, 0)


def results(mixer, x_TD, weight_TE, modules, out, grad_TO=None):
    """The output, then the gradients of tokens, weights and each parameter; None where none."""
    x_TD, weight_TE = x_TD.clone().requires_grad_(), weight_TE.clone().requires_grad_()
    modules.zero_grad(set_to_none=True)
    y_TO = mixer(x_TD, weight_TE, {int(key): m for key, m in modules.items()}, out)
    if grad_TO is None:
        y_TO.sum().backward()  # a gradient without memory of its own: all strides 0
    else:
        y_TO.backward(grad_TO)
    return [y_TO.detach(), x_TD.grad, weight_TE.grad, *(p.grad for p in modules.parameters())]


def assert_same(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


def check(
    T,
    E,
    held,
    k,
    D,
    F,
    out,
    *,
    skew=0.0,
    activation="relu",
    bias=True,
    dtype=torch.float32,
    seed=0,
):
    g = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=g).to(dtype)
    grad_TO = torch.randn(T, out, generator=g).to(dtype)
    weight_TE = routing_weights(T, E, k, seed, skew).to(dtype)
    modules = ffns(held, D, F, out, activation, bias).to(dtype)
    for grad in (grad_TO, None):
        expected = results(mix_loop, x_TD, weight_TE, modules, out, grad)
        got = results(mix, x_TD, weight_TE, modules, out, grad)
        # Gradients of weights that are 0 are no one's: the loop, too, leaves them 0.
        assert_same(got, expected, rtol=1e-5, atol=2e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("held", [[0, 1, 2, 3, 4], [1, 3], [4]], ids=str)
def test_any_subset_of_experts_gives_what_the_loop_gives(way, held, k, activation, bias):
    check(20, 5, held, k, 8, 16, 8, activation=activation, bias=bias)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("D, F, out", [(8, 12, 4), (7, 16, 8), (8, 5, 8), (8, 16, 10), (1, 1, 1)])
def test_any_width_gives_what_the_loop_gives(way, D, F, out, bias):
    check(20, 4, [0, 1, 3], 2, D, F, out, bias=bias)


@pytest.mark.parametrize("skew", [0.1, 0.3, 10.0])
def test_crowded_experts_give_what_the_loop_gives(way, skew):
    check(40, 6, range(6), 2, 8, 16, 8, skew=skew)


def test_float64_gives_what_the_loop_gives():
    check(20, 4, [0, 1, 3], 2, 8, 16, 8, dtype=torch.float64)


@pytest.mark.parametrize("held", [[], [5]], ids=str)
def test_tokens_that_reach_no_held_expert_get_zeros_and_zero_gradients(way, held):
    weight_TE = routing_weights(6, 5, 2, 0)
    weight_TE = torch.cat([weight_TE, torch.zeros(6, 1)], dim=1)
    modules = ffns(held, 8, 16, 8)
    y, x_grad, weight_grad, *rest = results(mix, torch.ones(6, 8), weight_TE, modules, 8)
    assert y.shape == (6, 8) and not y.any()
    assert not weight_grad.any() and (x_grad is None or not x_grad.any())
    assert rest == [None] * len(rest)


def test_zero_tokens_give_zero_rows(way):
    y_TO, *_ = results(mix, torch.zeros(0, 8), torch.zeros(0, 4), ffns(range(4), 8, 16, 3), 3)
    assert y_TO.shape == (0, 3)


def test_experts_without_tokens_have_no_gradient(way):
    weight_TE = torch.zeros(6, 4)
    weight_TE[:, [0, 2]] = 0.5
    modules = ffns(range(4), 8, 16, 8)
    results(mix, torch.ones(6, 8), weight_TE, modules, 8)
    has_grad = {key: all(p.grad is not None for p in m.parameters()) for key, m in modules.items()}
    any_grad = {key: any(p.grad is not None for p in m.parameters()) for key, m in modules.items()}
    assert has_grad == any_grad == {"0": True, "1": False, "2": True, "3": False}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mixing_as_chosen_gives_what_the_loop_gives_whatever_the_layer(data):
    E = data.draw(st.integers(1, 9), "experts")
    held = sorted(data.draw(st.sets(st.integers(0, E - 1), min_size=1), "held"))
    D, F, out = (data.draw(st.integers(1, 20), name) for name in ("D", "F", "out"))
    k, T = data.draw(st.integers(1, E), "k"), data.draw(st.integers(1, 30), "T")
    skew = data.draw(st.sampled_from([0.0, 0.2, 2.0]), "skew")
    bias, seed = data.draw(st.booleans(), "bias"), data.draw(st.integers(0, 9), "seed")
    check(T, E, held, k, D, F, out, skew=skew, bias=bias, seed=seed)


@pytest.mark.parametrize("frozen", ["up.weight", "up.bias", "down.weight", "down.bias", ""])
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(way, frozen):
    modules = ffns(range(3), 8, 16, 8)
    for name, p in modules.named_parameters():
        p.requires_grad_(not name.endswith(frozen) or (frozen == "" and name.startswith("1.")))
    x_TD, weight_TE = torch.ones(6, 8), routing_weights(6, 3, 2, 0)
    expected = results(mix_loop, x_TD, weight_TE, modules, 8)
    assert None in expected
    assert_same(results(mix, x_TD, weight_TE, modules, 8), expected, rtol=1e-5, atol=1e-5)


def test_tokens_that_need_no_gradient_get_none(way):
    modules = ffns(range(3), 8, 16, 8)
    x_TD, weight_TE = torch.ones(6, 8), routing_weights(6, 3, 2, 0)
    mix(x_TD, weight_TE, {int(e): m for e, m in modules.items()}, 8).sum().backward()
    assert x_TD.grad is None and all(p.grad is not None for p in modules.parameters())


def test_a_graph_that_is_kept_gives_the_same_gradients_again(way):
    modules = ffns(range(3), 8, 16, 8, "gelu")
    x_TD = torch.randn(9, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    experts = {int(e): m for e, m in modules.items()}
    y_TO = mix(x_TD, routing_weights(9, 3, 2, 0), experts, 8)
    wanted = [x_TD, *modules.parameters()]
    first = torch.autograd.grad(y_TO.square().sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(y_TO.square().sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_grad_mode_the_output_is_the_same_and_has_no_graph(way):
    modules = ffns(range(3), 8, 16, 8)
    args = torch.ones(6, 8), routing_weights(6, 3, 2, 0), {int(e): m for e, m in modules.items()}, 8
    with torch.no_grad():
        y_TO = mix(*args)
    assert not y_TO.requires_grad
    assert torch.equal(y_TO, mix(*args))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtype_and_nearly_the_values_of_the_loop(way, dtype, bias):
    g = torch.Generator().manual_seed(0)
    x_TD = torch.randn(20, 8, generator=g).to(dtype)
    grad_TO = torch.randn(20, 8, generator=g).to(dtype)
    # GELU: of ReLU, a rounded sign would switch whole units on and off.
    weight_TE, modules = routing_weights(20, 4, 2, 0), ffns(range(4), 8, 20, 8, "gelu", bias)

    def under_autocast(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return mix(*args)

    expected = results(mix_loop, x_TD.float(), weight_TE, modules, 8, grad_TO.float())
    got = results(under_autocast, x_TD, weight_TE, modules, 8, grad_TO)
    assert got[0].dtype == dtype
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b).norm() < 0.02 * b.norm()


def test_a_bfloat16_model_gives_nearly_the_values_of_a_float32_one(way):
    x_TD, weight_TE = torch.ones(6, 8), routing_weights(6, 4, 2, 0)
    exact = mix_loop(x_TD, weight_TE, {int(e): m for e, m in ffns(range(4), 8, 16, 8).items()}, 8)
    half = {int(e): m.bfloat16() for e, m in ffns(range(4), 8, 16, 8).items()}
    y_TO = mix(x_TD.bfloat16(), weight_TE, half, 8)
    assert y_TO.dtype == torch.bfloat16
    assert (y_TO.float() - exact).norm() < 0.02 * exact.norm()


class Doubled(FFN):
    def forward(self, x_ND):
        return 2 * super().forward(x_ND)


def test_an_expert_that_only_looks_like_a_plain_ffn_runs_its_own_forward():
    weight_TE = torch.ones(3, 1)
    x_TD = torch.ones(3, 8)
    plain = FFN(8, 16)
    once = mix(x_TD, weight_TE, {0: plain}, 8)

    doubled = Doubled(8, 16)
    doubled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(mix(x_TD, weight_TE, {0: doubled}, 8), 2 * once)

    plain.up.register_forward_pre_hook(lambda _m, args: (2 * args[0],))
    assert not torch.allclose(mix(x_TD, weight_TE, {0: plain}, 8), once)


def test_ffns_that_differ_give_what_the_loop_gives():
    modules = nn.ModuleDict({"0": FFN(8, 16), "1": FFN(8, 4), "2": FFN(8, 16, activation="gelu")})
    modules["3"] = FFN(8, 16, bias=False)
    x_TD, weight_TE = torch.ones(6, 8), routing_weights(6, 4, 2, 0)
    expected = results(mix_loop, x_TD, weight_TE, modules, 8)
    assert_same(results(mix, x_TD, weight_TE, modules, 8), expected, rtol=1e-5, atol=1e-5)


def test_experts_of_any_kind_give_what_the_loop_gives():
    modules = nn.ModuleDict({"0": FFN(8, 16), "1": nn.Linear(8, 8), "2": nn.Identity()})
    x_TD, weight_TE = torch.ones(6, 8), routing_weights(6, 3, 2, 0)
    expected = results(mix_loop, x_TD, weight_TE, modules, 8)
    assert_same(results(mix, x_TD, weight_TE, modules, 8), expected, rtol=1e-5, atol=1e-5)


def test_rows_are_sorted_by_expert_and_lead_back_to_their_tokens():
    rows = sort_rows(torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0, 1]]))
    assert rows.token_R.tolist() == [1, 0, 0, 3]  # of expert 0, then 1, then 2
    assert rows.counts == [1, 1, 2]
    assert rows.pair_R.tolist() == [3, 1, 2, 11]
    assert rows.back_R.tolist() == [1, 2, 0, 3]  # token 0 has rows 1 and 2, token 1 row 0, ...
    assert rows.start_T.tolist() == [0, 2, 3, 3]


def test_each_way_is_chosen_where_it_is_meant_to_be(monkeypatch):
    in_torch(monkeypatch)
    taken = []
    for name in ("run_grouped", "run_segments"):
        run = getattr(dispatch, name)
        monkeypatch.setattr(
            dispatch, name, lambda *a, name=name, run=run: (taken.append(name), run(*a))[1]
        )

    def run_with(experts, dtype=torch.float32):
        D = 256 if experts[0].up.weight.numel() > 1000 else 8
        modules = {e: m.to(dtype) for e, m in enumerate(experts)}
        mix(torch.ones(4, D, dtype=dtype), torch.ones(4, len(experts)), modules, D)

    run_with([FFN(8, 16) for _ in range(6)])
    run_with([FFN(8, 16) for _ in range(6)], torch.bfloat16)
    run_with([FFN(8, 16, bias=False) for _ in range(6)])
    assert taken == ["run_grouped"] * 3
    taken.clear()
    run_with([FFN(8, 16) for _ in range(5)])  # few
    run_with([FFN(256, 512) for _ in range(6)])  # large
    run_with([FFN(8, 16) for _ in range(6)], torch.float64)
    run_with([FFN(8, 16) for _ in range(5)] + [FFN(8, 12)])  # of two sizes
    run_with([FFN(8, 16) for _ in range(5)] + [FFN(8, 16, activation="gelu")])
    run_with([FFN(8, 16) for _ in range(5)] + [FFN(8, 16, bias=False)])
    run_with([FFN(8, 16) for _ in range(5)] + [Doubled(8, 16)])
    assert taken == ["run_segments"] * 7


@needs_a_compiler
def test_float32_relu_experts_alike_run_compiled_and_no_others(monkeypatch):
    taken = []

    def noted(*args):
        y_TO = run_ffns(*args)
        taken.extend([] if y_TO is None else ["compiled"])
        return y_TO

    monkeypatch.setattr(dispatch, "run_ffns", noted)

    def run_with(*experts, dtype=torch.float32):
        modules = {e: m.to(dtype) for e, m in enumerate(experts)}
        mix(torch.ones(4, 8, dtype=dtype), torch.ones(4, len(experts), dtype=dtype), modules, 8)

    run_with(FFN(8, 16))
    run_with(FFN(8, 16, bias=False), FFN(8, 16, bias=False))
    assert len(taken) == 2
    run_with(FFN(8, 16, activation="gelu"))
    run_with(FFN(8, 16), dtype=torch.float64)
    run_with(FFN(8, 16), dtype=torch.bfloat16)
    run_with(FFN(8, 16), FFN(8, 12))
    run_with(FFN(8, 16), FFN(8, 16, bias=False))
    run_with(Doubled(8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        run_with(FFN(8, 16))
    assert len(taken) == 2


def test_the_grouped_way_needs_experts_alike():
    x_RD = torch.ones(1, 8)

    def fits(*experts):
        return grouped_fits(plain_ffns(experts, x_RD), x_RD)

    assert fits(FFN(8, 16), FFN(8, 16))
    assert fits(FFN(8, 16, bias=False), FFN(8, 16, bias=False))
    assert not fits(FFN(8, 16), FFN(8, 16, bias=False))
    assert not fits(FFN(8, 16), FFN(8, 12))
    assert not fits(FFN(8, 16), FFN(8, 16, 4))
    assert not fits(FFN(8, 16), FFN(8, 16, activation="gelu"))
    assert plain_ffns([FFN(8, 16), nn.Linear(8, 8)], x_RD) is None
    assert plain_ffns([FFN(8, 16).bfloat16()], x_RD) is None
