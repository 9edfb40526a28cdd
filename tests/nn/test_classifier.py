"""Every model that is a stem and a head of experts."""

import pytest
import torch

from fedmoe.nn.classifier import StemAndHead, moe_head
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.moe import MoE
from fedmoe.nn.sensors import motion_cnn
from fedmoe.nn.tabular import vowel_mlp
from fedmoe.nn.text import character_model
from fedmoe.nn.vision import fashion_cnn
from fedmoe.state import build_part, load_state, split_state
from fedmoe.types import ExpertId


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


CODES = (drawn(5, 16).sigmoid() * 65).to(torch.uint8)
# The model, five inputs, classes, experts.
MODELS = {
    "fashion_cnn": (fashion_cnn, drawn(5, 1, 28, 28), 10, 16),
    "vowel_mlp": (vowel_mlp, drawn(5, 10), 11, 8),
    "motion_cnn": (motion_cnn, drawn(5, 6, 128), 6, 16),
    "character_model": (character_model, CODES, 65, 16),
}
every_model = pytest.mark.parametrize(
    ("model", "x", "num_classes", "num_experts"), MODELS.values(), ids=MODELS
)


@every_model
def test_inputs_become_logits(model, x, num_classes, num_experts):
    assert model()(x).shape == (5, num_classes)


@every_model
def test_two_of_all_experts_share_each_input(model, x, num_classes, num_experts):
    net = model()
    assert isinstance(net, StemAndHead) and isinstance(net.head, MoE)
    assert net.head.held == tuple(range(num_experts))
    weight_NE = net.head.gate(net.stem(x), net.head.present_E).weight_TE
    assert weight_NE.shape == (5, num_experts)
    assert ((weight_NE > 0).sum(-1) == 2).all()
    assert len(weight_NE.nonzero()[:, 1].unique()) > 2  # inputs differ in what they choose


@every_model
def test_models_are_made_of_their_seed_alone(model, x, num_classes, num_experts):
    before = torch.get_rng_state()
    a, b, c = model(seed=1).state_dict(), model(seed=1).state_dict(), model(seed=2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not torch.equal(a[name], c[name]) for name in a)


@every_model
def test_a_part_of_the_experts_can_be_built_loaded_and_run(model, x, num_classes, num_experts):
    whole = split_state(model())
    held = frozenset({ExpertId(0, 1), ExpertId(0, 5)})
    part = build_part(model, held)
    load_state(part, whole.only(held))
    logit_NO = part(x)
    weight_NE = part.head.gate(part.stem(x), part.head.present_E).weight_TE
    by_hand = sum(weight_NE[:, e, None] * part.head.experts[str(e)](part.stem(x)) for e in (1, 5))
    torch.testing.assert_close(logit_NO, by_hand)


@every_model
def test_gradients_reach_the_stem_the_gate_and_the_experts_that_run(
    model, x, num_classes, num_experts
):
    net = model()
    torch.nn.functional.cross_entropy(net(x), torch.arange(5)).backward()
    assert all(p.grad.any() for p in net.stem.parameters())
    assert net.head.gate.proj.weight.grad.any()
    ran_E = net.head.gate(net.stem(x), net.head.present_E).weight_TE.any(0)
    for number, expert in net.head.experts.items():
        reached = all(p.grad is not None and p.grad.any() for p in expert.parameters())
        assert reached == ran_E[int(number)]


def test_a_head_is_of_experts_that_end_in_logits():
    head = moe_head(dim=3, hidden=4, num_classes=5, num_experts=6, k=2, gate_mass="full")
    assert isinstance(head.gate, TopKGate)
    assert (head.gate.k, head.gate.gate_mass, head.num_experts) == (2, "full", 6)
    expert = head.experts["5"]
    assert isinstance(expert, FFN) and (expert.dim, expert.hidden, expert.out_dim) == (3, 4, 5)
