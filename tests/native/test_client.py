"""The compiled training loop takes what fits, refuses the rest, and counts as worked by hand."""

import math

import pytest
import torch

from fedmoe.native import client as native
from fedmoe.native.client import (
    Convolution,
    Dense,
    Embedding,
    Expert,
    Linear,
    Met,
    Mixture,
    Norm,
    Settings,
    Weight,
    train,
)

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler here")
ONE = Settings(lr=1.0, batch_size=8)


def weight(*rows, **fields):
    return Weight(torch.tensor(rows, dtype=torch.float32), **fields)


def linear(out, width, value=0.0, bias=True):
    full = torch.full((out, width), value)
    return Linear(Weight(full), Weight(torch.zeros(out)) if bias else None)


def order(num, epochs=1):
    return torch.arange(num).repeat(epochs, 1)


def labels(*y):
    return torch.tensor(y)


def test_a_step_of_a_linear_map_worked_by_hand():
    """From zeros both classes have 1/2: gradients are (p - label) x, the mean over two examples."""
    w, b = weight([0.0, 0.0], [0.0, 0.0]), Weight(torch.zeros(2))
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    used = train([Dense(Linear(w, b), None)], x, labels(0, 1), order(2), 2, 0, ONE)
    assert used.loss == pytest.approx(2 * math.log(2))
    assert w.value.tolist() == [[-0.5, 0.5], [0.5, -0.5]]
    assert b.value.tolist() == [0.0, 0.0]


def test_a_step_is_clipped_by_the_norm_of_all_gradients_worked_by_hand():
    w, b = weight([0.0], [0.0]), Weight(torch.zeros(2))
    x = torch.tensor([[math.sqrt(7.0)]])  # gradient: (-1, 1)/2 times (sqrt 7, 1), norm 2
    train([Dense(Linear(w, b), None)], x, labels(0), order(1), 2, 0, ONE._replace(clip=1.0))
    torch.testing.assert_close(b.value, torch.tensor([0.25, -0.25]))
    torch.testing.assert_close(w.value[:, 0], torch.tensor([0.25, -0.25]) * math.sqrt(7.0))


def test_a_shift_is_added_before_clipping_and_what_was_met_is_without_it_worked_by_hand():
    """Two steps of one example; only the bias is shifted, and only it tells what it met."""
    w = weight([0.0], [0.0], moves=False)
    met = Met(torch.zeros(2), torch.zeros(1, dtype=torch.int64))
    b = Weight(torch.zeros(2), shift=torch.tensor([0.5, 1.5]), met=met)
    x = torch.ones(1, 1)
    settings = ONE._replace(clip=1.0)
    train([Dense(Linear(w, b), None)], x, labels(0), order(1, epochs=2), 2, 0, settings)
    # First (-0.5, 0.5) + (0.5, 1.5) = (0, 2), clipped to (0, 1); p = (e, 1) / (1 + e) from there.
    p = 1 / (1 + math.e)
    torch.testing.assert_close(met.total, torch.tensor([-0.5 - p, 0.5 + p]))
    assert met.steps.item() == 2
    g = torch.tensor([0.5 - p, 1.5 + p])
    torch.testing.assert_close(b.value, torch.tensor([0.0, -1.0]) - g / g.norm())


def test_a_slope_is_the_gradient_times_the_distance_worked_by_hand():
    b = Weight(torch.tensor([2.0, 2.0]), received=torch.tensor([1.0, 5.0]))
    w = weight([0.0], [0.0], moves=False)
    settings = ONE._replace(clip=0.1, slope=True)
    used = train([Dense(Linear(w, b), None)], torch.ones(1, 1), labels(0), order(1), 2, 0, settings)
    assert used.slope == pytest.approx(-0.5 * 1 + 0.5 * -3)  # whatever is clipped


def mixture(k=1, full=True, held=(0, 2), known=(True, True, True), bias=True):
    """Three experts of which two are held; the gate's scores are the example's own numbers."""
    experts = {
        e: Expert(linear(4, 3, 0.1 * e, bias), linear(2, 4, 0.1, bias), "relu") for e in held
    }
    return Mixture(Weight(torch.eye(3)), known, experts, k, full, residual=False)


def test_tokens_are_counted_by_expert_as_worked_by_hand():
    """The second example would go to expert 1, which is not held: of the others 2 is the next."""
    x = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    used = train([mixture()], x, labels(0, 1, 0), order(3), 2, 4, ONE._replace(lr=0.0))
    assert used.count_LE.tolist() == [[1, 0, 2, 0]]
    e = [math.exp(v) / (1 + math.e + math.e**2) for v in (0, 1, 2)]
    torch.testing.assert_close(
        used.weight_LE, torch.tensor([[e[2], 0, e[1] + e[2], 0]], dtype=torch.float64),
        rtol=0, atol=1e-6,
    )  # fmt: skip
    torch.testing.assert_close(used.score_LE.sum(), torch.tensor(3.0).double(), rtol=0, atol=1e-6)
    of_held = train(
        [mixture(full=False)], x, labels(0, 1, 0), order(3), 2, 4, ONE._replace(lr=0.0)
    )
    assert of_held.weight_LE.tolist() == [[1, 0, 2, 0]]
    assert of_held.score_LE[0, 1] == 0


def test_what_does_not_move_and_what_is_not_used_keeps_its_bits():
    stage = mixture()
    still = stage._replace(gate=stage.gate._replace(moves=False))
    before = {e: x.up.weight.value.clone() for e, x in still.experts.items()}
    gate = still.gate.value.clone()
    x = torch.tensor([[0.0, 0.0, 1.0]] * 5)
    for settings in (ONE, ONE._replace(momentum=0.5, weight_decay=0.1, clip=1.0)):
        train([still], x, labels(0, 0, 1, 0, 0), order(5, 2), 2, 3, settings)
    assert torch.equal(still.gate.value, gate)
    assert torch.equal(still.experts[0].up.weight.value, before[0])
    assert not torch.equal(still.experts[2].up.weight.value, before[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("full", [True, False])
def test_a_loss_that_is_not_finite_is_told(bad, full):
    x = torch.tensor([[bad, -bad, bad]])
    used = train([mixture(full=full)], x, labels(0), order(1, 3), 2, 3, ONE)
    assert not math.isfinite(used.loss)


def test_a_convolution_and_its_pool_worked_by_hand():
    """A kernel of one pixel that doubles, the largest of four, twice the same label."""
    kernel, bias = Weight(torch.full((1, 1, 1, 1), 2.0)), Weight(torch.zeros(1))
    head = Linear(weight([1.0], [0.0]), None)
    stages = [Convolution(kernel, bias, (2, 2), (2, 2), last=True), Dense(head, None)]
    x = torch.tensor([[1.0, 4.0], [-3.0, 2.0]]).view(1, 2, 2, 1)
    used = train(stages, x, labels(1), order(1), 2, 0, ONE)
    p = 1 / (1 + math.exp(-8))  # logits are 8 and 0
    assert used.loss == pytest.approx(8.0 + math.log(1 + math.exp(-8)), rel=1e-6)
    assert kernel.value.item() == pytest.approx(2 - 4 * p, rel=1e-6)
    assert bias.value.item() == pytest.approx(-p, rel=1e-6)
    assert head.weight.value[:, 0].tolist() == pytest.approx([1 - 8 * p, 8 * p], rel=1e-6)


@pytest.mark.parametrize("clip", [None, 100.0])
def test_a_normalised_convolution_worked_by_hand(clip):
    """A kernel that passes on the left of two pixels; what is normalised is -1, 0 and 1."""
    kernel, bias = Weight(torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)), Weight(torch.zeros(1))
    mean, var = torch.tensor([4.0]), torch.tensor([4.0])
    norm = Norm(Weight(torch.ones(1)), Weight(torch.zeros(1)), mean, var, 0.25, 0.0)
    head = Linear(weight([0.0, 0.0, 0.0], [0.0, 0.0, 1.0], moves=False), None)
    stages = [Convolution(kernel, bias, (1, 4), (1, 1), True, norm), Dense(head, None)]
    x = torch.tensor([-1.0, 0.0, 1.0, 5.0]).view(1, 1, 4, 1)
    used = train(stages, x, labels(0), order(1), 2, 0, ONE._replace(clip=clip))
    logit = math.sqrt(1.5)  # 1 over a deviation of sqrt(2 / 3)
    p = 1 / (1 + math.exp(-logit))
    assert used.loss == pytest.approx(math.log(1 + math.exp(logit)), rel=1e-6)
    assert norm.weight.value.item() == pytest.approx(1 - logit * p, abs=1e-6)
    assert norm.bias.value.item() == pytest.approx(-p, abs=1e-6)
    # The gradient of the convolution's output is logit * p times 1/6, -1/3 and 1/6.
    close = pytest.approx([1.0, -logit * p / 2], rel=1e-6, abs=1e-6)
    assert kernel.value.flatten().tolist() == close
    assert bias.value.item() == pytest.approx(0, abs=1e-6)
    assert mean.item() == pytest.approx(3.0, rel=1e-6)
    assert var.item() == pytest.approx(0.75 * 4 + 0.25 * 1, rel=1e-6)  # 2 / 2, of 3 numbers


@pytest.mark.parametrize("clip", [None, 1.0])
def test_rows_of_an_embedding_learn_what_all_their_places_say_worked_by_hand(clip):
    """Code 2 comes twice in the first example and once in the second, code 1 never."""
    table = weight([0.0, 0.0], [5.0, 6.0], [0.0, 0.0])
    head = weight([0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0], moves=False)
    stages = [Embedding(table), Dense(Linear(head, None), None)]
    x = torch.tensor([[2, 2], [0, 2]], dtype=torch.int32)
    used = train(stages, x, labels(0, 1), order(2), 2, 0, ONE._replace(clip=clip))
    assert used.loss == pytest.approx(2 * math.log(2))
    # (p - label) / 2 of class 1 is 1/4 in the first example and -1/4 in the second. Code 0:
    # -(1, 2)/4. Code 2: (1, 2)/4 + (3, 4)/4 - (3, 4)/4.
    g = torch.tensor([[-0.25, -0.5], [0.0, 0.0], [0.25, 0.5]])
    by = 1.0 if clip is None else min(1.0, 1 / (g.norm().item() + 1e-6))
    wanted = torch.tensor([[0.0, 0.0], [5.0, 6.0], [0.0, 0.0]]) - by * g
    torch.testing.assert_close(table.value, wanted)


def test_momentum_and_decay_move_rows_that_no_code_met_worked_by_hand():
    table = weight([1.0], [8.0])
    head = weight([0.0], [0.0], moves=False)
    settings = ONE._replace(lr=0.5, momentum=0.5, weight_decay=0.5)
    x = torch.zeros(1, 1, dtype=torch.int32)
    stages = [Embedding(table), Dense(Linear(head, None), None)]
    train(stages, x, labels(0), order(1, epochs=2), 2, 0, settings)
    # A step of 0.5 * 0.5 * 8 to 6; the next of 0.5 * (0.5 * 6 + 0.5 * 4) to 3.5.
    assert table.value.tolist() == [[3.5 / 8], [3.5]]


X, Y = torch.ones(3, 3), labels(0, 1, 0)
CODED = [Embedding(weight([1.0], [2.0])), Dense(linear(2, 3), None)]
MAP = linear(2, 3)
KERNEL, UNIT = Weight(torch.ones(1, 1, 1, 1)), Weight(torch.ones(1))


def normed(channels):
    of = [torch.ones(channels) for _ in range(4)]
    return Norm(Weight(of[0]), Weight(of[1]), of[2], of[3], 0.1, 1e-5)



@pytest.mark.parametrize(
    "stages, x, y, rows, told",
    [
        ([], X, Y, order(3), "at least 1"),
        ([Dense(linear(2, 4), None)], X, Y, order(3), "must take width 3"),
        ([Dense(linear(3, 3), None)], X, Y, order(3), "2 outputs, got 3"),
        ([Dense(MAP, None)], X.double(), Y, order(3), "x must be contiguous torch.float32"),
        ([Dense(MAP, None)], torch.ones(3, 6)[:, ::2], Y, order(3), "contiguous"),
        ([Dense(MAP, None)], X, Y.int(), order(3), "y must be contiguous torch.int64"),
        ([Dense(MAP, None)], X, labels(0, 2, 0), order(3), "labels must be from 0 to 1"),
        ([Dense(MAP, None)], X, labels(0, -1, 0), order(3), "labels must be from 0 to 1"),
        ([Dense(MAP, None)], X, Y, order(3) + 1, "order must be from 0 to 2"),
        ([Dense(MAP, None)], X, Y, order(2), "the same examples"),
        ([Dense(MAP, None)], X[:0], Y[:0], order(0), "and of some"),
        ([Dense(Linear(Weight(torch.zeros(2, 3).double()), None), None)], X, Y, order(3),
         "a parameter must be contiguous"),
        ([Dense(Linear(MAP.weight, Weight(torch.zeros(3))), None)], X, Y, order(3),
         "a parameter must be"),
        ([mixture(k=3)], X, Y, order(3), "k must be from 1 to the 2 held"),
        ([mixture(held=(0, 1), known=(True, False, True))], X, Y, order(3), "among the 3 known"),
        ([mixture()._replace(residual=True)], X, Y, order(3), "a residual must keep width 3"),
        ([mixture()._replace(experts={})], X, Y, order(3), "must hold experts"),
        ([Dense(linear(3, 3), None),
          Convolution(Weight(torch.ones(1, 1, 1, 1)), Weight(torch.ones(1)), (1, 3), (1, 1), True)],
         X, Y, order(3), "before all else"),
        ([Convolution(KERNEL, UNIT, (1, 3), (1, 3), True, normed(3))],
         X.view(3, 1, 3, 1), Y, order(3), "a parameter must be"),
        ([Convolution(KERNEL, UNIT, (1, 1), (1, 1), True, normed(1))],
         X[:, :1].reshape(3, 1, 1, 1).contiguous(), Y, order(3), "more than one place"),
        (CODED, X, Y, order(3), "x must be contiguous torch.int32"),
        (CODED, 2 * X.int(), Y, order(3), "codes must be from 0 to 1, got 2 to 2"),
        (CODED, -X.int(), Y, order(3), "codes must be from 0 to 1, got -1 to -1"),
        (CODED, X.int()[:, :2].contiguous(), Y, order(3), "must take width 2, got 3"),
        ([Dense(linear(3, 3), None), *CODED], X, Y, order(3), "before all else"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_memory_is_touched(stages, x, y, rows, told):
    with pytest.raises(ValueError, match=told):
        train(stages, x, y, rows, 2, 3, ONE)


def test_without_compiled_code_it_says_so(monkeypatch):
    monkeypatch.setattr(native, "compiled", lambda source: None)
    assert not native.available()
    with pytest.raises(RuntimeError, match="not available"):
        train([Dense(MAP, None)], X, Y, order(3), 2, 0, ONE)
