"""Running each expert on the tokens that weigh it, and adding the weighted outputs.

Shape suffixes: T tokens, D width, O output width, E experts, N tokens of one expert.
"""

from collections.abc import Mapping

from torch import Tensor, nn


def mix(x_TD: Tensor, weight_TE: Tensor, experts: Mapping[int, nn.Module], out_dim: int) -> Tensor:
    """Each token's weighted sum of the outputs of its experts, in the dtype of `x_TD`."""
    return mix_loop(x_TD, weight_TE, experts, out_dim)


def mix_loop(
    x_TD: Tensor, weight_TE: Tensor, experts: Mapping[int, nn.Module], out_dim: int
) -> Tensor:
    """The definition: one expert after another. The faster ways must give the same."""
    out_TO = x_TD.new_zeros(len(x_TD), out_dim)
    for e, expert in experts.items():
        weight_T = weight_TE[:, e]
        chosen_N = weight_T.nonzero().squeeze(-1)
        if len(chosen_N):
            y_NO = expert(x_TD[chosen_N])
            if y_NO.shape != (len(chosen_N), out_dim):
                raise ValueError(
                    f"expert {e} must return ({len(chosen_N)}, {out_dim}), got {tuple(y_NO.shape)}"
                )
            y_NO = y_NO * weight_T[chosen_N, None]
            out_TO = out_TO.index_add(0, chosen_N, y_NO.to(out_TO.dtype))
    return out_TO
