"""A transformer block: attention among the tokens of one example, then a feed-forward part.

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, with the normalisation before
each part. The feed-forward part may be a MoE layer; its residual is out here, so a token that no
expert serves passes unchanged.

Shape suffixes: B examples, S tokens of an example, D width, H heads, C width of a head.
"""

from torch import Tensor, nn

from fedmoe.nn.moe import MoE


class Attention(nn.Module):
    """Self-attention with H heads."""

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of the {heads} heads, got {dim}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BSD: Tensor, keep_BS: Tensor | None = None) -> Tensor:
        """No token looks at those whose `keep_BS` is False, nor with `causal` at later ones."""
        qkv_BSD: tuple[Tensor, ...] = self.qkv(x_BSD).chunk(3, dim=-1)
        q_BHSC, k_BHSC, v_BHSC = (
            t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in qkv_BSD
        )
        look_BHSS = None if keep_BS is None else self._look(keep_BS)
        y_BHSC = nn.functional.scaled_dot_product_attention(
            q_BHSC, k_BHSC, v_BHSC, look_BHSS, is_causal=self.causal and look_BHSS is None
        )
        y_BSD: Tensor = self.out(y_BHSC.transpose(1, 2).flatten(2))
        return y_BSD

    def _look(self, keep_BS: Tensor) -> Tensor:
        look_BSS = keep_BS[:, None, :].expand(-1, keep_BS.shape[1], -1)
        if self.causal:
            look_BSS = look_BSS.tril()
        # A token that may look at nothing would come out as NaN: padding looks at itself.
        return (look_BSS | keep_BS.logical_not().diag_embed())[:, None]


class Block(nn.Module):
    """Attention and `ffn`, each behind a LayerNorm and beside a residual."""

    def __init__(self, dim: int, heads: int, ffn: nn.Module, *, causal: bool = False) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal=causal)
        self.norm_ffn = nn.LayerNorm(dim)
        self.ffn = ffn

    def forward(self, x_BSD: Tensor, keep_BS: Tensor | None = None) -> Tensor:
        """`keep_BS` False: padding, which no other token sees and no expert runs for."""
        x_BSD = x_BSD + self.attention(self.norm_attention(x_BSD), keep_BS)
        h_BSD = self.norm_ffn(x_BSD)
        # Only a MoE layer minds padding; any other feed-forward part treats tokens one by one.
        y_BSD: Tensor = self.ffn(h_BSD, keep_BS) if isinstance(self.ffn, MoE) else self.ffn(h_BSD)
        return x_BSD + y_BSD
