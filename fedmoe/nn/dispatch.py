"""Running each expert on the tokens that weigh it, and adding the weighted outputs.

`mix_loop` is the definition. `mix` does the same faster: it sorts the (token, expert) pairs by
expert, gathers their tokens once, runs the experts on consecutive rows, and adds each token's
outputs up in one go. How the rows run depends on what the experts are: see `mix`.

Shape suffixes: T tokens, D width, O output width, E experts, N tokens of one expert, R rows:
the pairs of a token and a held expert that it weighs.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmoe.native.ffns import Parameters, run_ffns
from fedmoe.nn.grouped import grouped_fits, plain_ffns, run_grouped

# On a CPU, a grouped matmul first copies the weights of all its experts side by side. Within
# these limits that costs less than calling each expert (2-core EPYC, torch 2.13, one thread).
GROUPED_MAX_EXPERT_PARAMETERS = 65_536
GROUPED_MIN_EXPERTS = 6


class Rows(NamedTuple):
    """The pairs of a token and a held expert that it weighs, sorted by expert."""

    token_R: Tensor  # which token
    pair_R: Tensor  # where its weight is in the flattened weights
    counts: list[int]  # rows of each expert
    back_R: Tensor  # the rows again, sorted by token
    start_T: Tensor  # where each token's part of `back_R` begins


def mix(x_TD: Tensor, weight_TE: Tensor, experts: Mapping[int, nn.Module], out_dim: int) -> Tensor:
    """Each token's weighted sum of the outputs of its experts, (T, O) in the dtype of `x_TD`.

    Experts without tokens do not run, and so have no gradient. The result can be differentiated
    once, not twice.

    Raises:
        ValueError: an expert returns another shape than (N, O).
    """
    if (y_TO := mix_compiled(x_TD, weight_TE, experts)) is not None:
        return y_TO
    rows = sort_rows(_of_held(weight_TE.detach(), experts))
    weight_R = weight_TE.reshape(-1).index_select(0, rows.pair_R)
    used = [(e, n) for e, n in enumerate(rows.counts) if n]
    if not used:
        return _nothing(x_TD, weight_R, out_dim)
    x_RD = x_TD.index_select(0, rows.token_R)
    y_RO = run_rows(x_RD, {e: experts[e] for e, _ in used}, [n for _, n in used], out_dim)
    return add_up(y_RO, weight_R, rows).to(x_TD.dtype)


def mix_compiled(
    x_TD: Tensor, weight_TE: Tensor, experts: Mapping[int, nn.Module]
) -> Tensor | None:
    """The same in one compiled pass; None where these experts are not what it runs."""
    if not experts or torch.is_autocast_enabled(x_TD.device.type):
        return None
    ffns = plain_ffns(experts.values(), x_TD)
    if ffns is None or any(f.activation != "relu" for f in ffns):
        return None
    up_HFD, up_HF, down_HOF, down_HO, _ = zip(*ffns, strict=True)
    # Where only some have a bias there are too few of them for `run_ffns`.
    biases = [[b for b in of_all if b is not None] for of_all in (up_HF, down_HO)]
    parameters = Parameters(up_HFD, biases[0], down_HOF, biases[1])
    return run_ffns(x_TD, weight_TE, list(experts), parameters)


def sort_rows(weight_TE: Tensor) -> Rows:
    """Find the pairs with a weight, and sort them by expert and then token."""
    num_tokens, num_experts = weight_TE.shape
    expert_R, token_R = weight_TE.t().nonzero().t().contiguous()
    by_token_R, back_R = token_R.sort(stable=True)
    return Rows(
        token_R=token_R,
        pair_R=token_R * num_experts + expert_R,
        counts=expert_R.bincount(minlength=num_experts).tolist(),
        back_R=back_R,
        start_T=torch.searchsorted(by_token_R, torch.arange(num_tokens, device=token_R.device)),
    )


def run_rows(
    x_RD: Tensor, experts: Mapping[int, nn.Module], counts: Sequence[int], out_dim: int
) -> Tensor:
    """Give each expert its `counts` consecutive rows, none of them 0.

    Plain feed-forward experts run as one grouped matmul on a GPU, and on a CPU if they are small
    and many. All others are called one after another.
    """
    ffns = plain_ffns(experts.values(), x_RD)
    if ffns is None or not grouped_fits(ffns, x_RD):
        return run_segments(x_RD, experts, counts, out_dim)
    small_and_many = (
        ffns[0].numel <= GROUPED_MAX_EXPERT_PARAMETERS and len(ffns) >= GROUPED_MIN_EXPERTS
    )
    if small_and_many or x_RD.is_cuda:
        return run_grouped(x_RD, ffns, counts)
    return run_segments(x_RD, experts, counts, out_dim)


def run_segments(
    x_RD: Tensor, experts: Mapping[int, nn.Module], counts: Sequence[int], out_dim: int
) -> Tensor:
    """Call the experts one after another."""
    segments = zip(experts.items(), torch.split(x_RD, list(counts)), strict=True)
    return torch.cat([_checked(expert(x_ND), e, x_ND, out_dim) for (e, expert), x_ND in segments])


def add_up(y_RO: Tensor, weight_R: Tensor, rows: Rows) -> Tensor:
    """Each token's weighted sum of its rows, in the wider dtype of the two; none: zeros."""
    dtype = torch.promote_types(y_RO.dtype, weight_R.dtype)
    # A bag of embeddings is just that: rows of a table, gathered, weighed and added. Unlike
    # index_add it writes each token once, and on a GPU always adds in the same order.
    y_TO: Tensor = nn.functional.embedding_bag(
        rows.back_R,
        y_RO.to(dtype),
        rows.start_T,
        mode="sum",
        per_sample_weights=weight_R.to(dtype).index_select(0, rows.back_R),
    )
    return y_TO


def mix_loop(
    x_TD: Tensor, weight_TE: Tensor, experts: Mapping[int, nn.Module], out_dim: int
) -> Tensor:
    """The definition: one expert after another. `mix` must give the same."""
    out_TO = _nothing(x_TD, weight_TE[:0, 0], out_dim)
    for e, expert in experts.items():
        weight_T = weight_TE[:, e]
        chosen_N = weight_T.nonzero().squeeze(-1)
        if len(chosen_N):
            x_ND = x_TD[chosen_N]
            y_NO = _checked(expert(x_ND), e, x_ND, out_dim) * weight_T[chosen_N, None]
            out_TO = out_TO.index_add(0, chosen_N, y_NO.to(out_TO.dtype))
    return out_TO


def _of_held(weight_TE: Tensor, held: Collection[int]) -> Tensor:
    """The weights, with 0 for experts that are not held."""
    if len(held) == weight_TE.shape[1]:
        return weight_TE
    held_E = torch.zeros(weight_TE.shape[1], dtype=torch.bool, device=weight_TE.device)
    held_E[list(held)] = True
    return weight_TE.masked_fill(~held_E, 0.0)


def _nothing(x_TD: Tensor, weight_0: Tensor, out_dim: int) -> Tensor:
    """Zeros that still belong to the gate's graph, so that a loss on them has a gradient: zeros."""
    zeros_TO = x_TD.new_zeros(len(x_TD), out_dim)
    none_0 = torch.empty(0, dtype=torch.int64, device=x_TD.device)
    return zeros_TO.index_add(0, none_0, weight_0[:, None].expand(0, out_dim).to(x_TD.dtype))


def _checked(y_NO: Tensor, e: int, x_ND: Tensor, out_dim: int) -> Tensor:
    if y_NO.shape != (len(x_ND), out_dim):
        raise ValueError(
            f"expert {e} must return ({len(x_ND)}, {out_dim}), got {tuple(y_NO.shape)}"
        )
    return y_NO
