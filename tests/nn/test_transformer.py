import pytest
import torch

from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.moe import MoE
from fedmoe.nn.transformer import Attention, Block

D = 8


def moe_block(causal=False):
    experts = {e: FFN(D, 16) for e in range(4)}
    return seeded(lambda: Block(D, 2, MoE(TopKGate(D, 4, 2), experts, 4), causal=causal), 0)


@pytest.fixture
def x_BSD():
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))


def test_one_head_of_attention_is_softmax_of_scaled_products(x_BSD):
    attention = seeded(lambda: Attention(D, heads=1), 0)
    q, k, v = attention.qkv(x_BSD).split(D, dim=-1)
    expected = (q @ k.transpose(1, 2) / D**0.5).softmax(-1) @ v
    torch.testing.assert_close(attention(x_BSD), attention.out(expected))


def test_two_heads_see_their_own_half_of_the_width(x_BSD):
    attention = seeded(lambda: Attention(D, heads=2), 0)
    q, k, v = attention.qkv(x_BSD).split(D, dim=-1)
    halves = [
        (q[..., h] @ k[..., h].transpose(1, 2) / 2).softmax(-1) @ v[..., h]
        for h in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(attention(x_BSD), attention.out(torch.cat(halves, -1)))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_no_real_token(x_BSD, causal):
    block = moe_block(causal)
    keep_BS = torch.arange(5) < torch.tensor([[5], [3], [0]])
    y_BSD = block(x_BSD, keep_BS)
    torch.testing.assert_close(y_BSD[1, :3], block(x_BSD[1:2, :3])[0])
    assert y_BSD.isfinite().all()


def test_a_causal_block_sees_no_later_token(x_BSD):
    block = moe_block(causal=True)
    changed_BSD = x_BSD.clone()
    changed_BSD[:, 3:] += 1
    torch.testing.assert_close(block(changed_BSD)[:, :3], block(x_BSD)[:, :3])
    assert not torch.equal(block(changed_BSD)[:, 3], block(x_BSD)[:, 3])


def test_a_token_that_no_expert_serves_passes_the_feed_forward_part_unchanged(x_BSD):
    block = moe_block()
    block.ffn.hold([])
    torch.testing.assert_close(block(x_BSD), x_BSD + block.attention(block.norm_attention(x_BSD)))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="multiple of the 3 heads, got 8"):
        Attention(8, 3)
