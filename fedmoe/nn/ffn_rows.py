"""Many feed-forward experts on consecutive rows, with little overhead for each expert.

`run_grouped` is a grouped matrix product: one call for all experts. `run_one_node` is a single
node of the autograd graph whose passes loop over the experts, working in place where autograd
cannot, and writing each expert's gradient straight to where it belongs.

Shape suffixes: R rows, N rows of one expert, D width, F hidden width, O output width, H experts.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedmoe.nn.experts.ffn import FFN, Activation


class PlainFFN(NamedTuple):
    """The parameters of an expert that does what `FFN.forward` does, and nothing besides."""

    up_FD: Tensor
    up_F: Tensor
    down_OF: Tensor
    down_O: Tensor
    activation: Activation

    @property
    def numel(self) -> int:
        return self.up_FD.numel() + self.down_OF.numel()


def plain_ffns(experts: Iterable[nn.Module], x_RD: Tensor) -> list[PlainFFN] | None:
    """The experts' parameters; None if any is not a plain FFN, or if dtypes are mixed.

    A subclass, a hook or a map put in place of a linear one makes an expert not plain: its own
    `forward` must run.
    """
    plain = []
    for expert in experts:
        if type(expert) is not FFN or _hooked(expert):
            return None
        # Not `expert.up.weight`: nn.Module looks its attributes up slowly.
        up, down = expert._modules["up"], expert._modules["down"]
        if type(up) is not nn.Linear or type(down) is not nn.Linear:
            return None
        if _hooked(up) or _hooked(down):
            return None
        u, d = up._parameters, down._parameters
        tensors = (u["weight"], u["bias"], d["weight"], d["bias"])
        if any(t is None or t.dtype != x_RD.dtype for t in tensors):
            return None
        plain.append(PlainFFN(*tensors, expert.activation))  # type: ignore[arg-type]
    return plain


def _hooked(m: nn.Module) -> bool:
    return bool(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    )


def grouped_fits(ffns: Sequence[PlainFFN], x_RD: Tensor) -> bool:
    """Whether `run_grouped` can run these: alike, of whole 16 bytes in width, not float64."""
    first = ffns[0]
    dtype = _dtype(x_RD)
    if dtype == torch.float64:
        return False
    widths = (*first.up_FD.shape, len(first.down_O))
    if any(width * dtype.itemsize % 16 for width in widths):
        return False
    shape, activation = first.up_FD.shape, first.activation
    return all(f.up_FD.shape == shape and f.activation == activation for f in ffns)


def run_grouped(x_RD: Tensor, ffns: Sequence[PlainFFN], counts: Sequence[int]) -> Tensor:
    """Two grouped products over the stacked weights. Needs `grouped_fits`."""
    dtype = _dtype(x_RD)
    count_H = torch.tensor(counts, device=x_RD.device)
    end_H = count_H.cumsum(0, dtype=torch.int32)
    expert_R = torch.arange(len(ffns), device=x_RD.device).repeat_interleave(
        count_H, output_size=len(x_RD)
    )
    up_HFD, up_HF, down_HOF, down_HO = (
        torch.stack([f[i] for f in ffns]).to(dtype)  # type: ignore[misc]
        for i in range(4)
    )
    h_RF = nn.functional.grouped_mm(x_RD.to(dtype), up_HFD.transpose(1, 2), offs=end_H)
    h_RF = _activate(h_RF + up_HF.index_select(0, expert_R), ffns[0].activation)
    y_RO = nn.functional.grouped_mm(h_RF, down_HOF.transpose(1, 2), offs=end_H)
    return y_RO + down_HO.index_select(0, expert_R)


def run_one_node(x_RD: Tensor, ffns: Sequence[PlainFFN], counts: Sequence[int]) -> Tensor:
    """Each expert's products in turn, without a node in the graph for every one of them."""
    parameters = [t for f in ffns for t in f[:4]]
    activations = [f.activation for f in ffns]
    y_RO: Tensor = _OneNode.apply(x_RD, list(counts), activations, *parameters)  # type: ignore[no-untyped-call]
    return y_RO


class _OneNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, counts: list[int], activations: list[Activation], *flat: Tensor
    ) -> Tensor:
        y_RO = x_RD.new_empty(len(x_RD), len(flat[3]))
        hidden = []
        for i, (x_ND, y_NO) in enumerate(
            zip(torch.split(x_RD, counts), torch.split(y_RO, counts), strict=True)
        ):
            up_FD, up_F, down_OF, down_O = flat[4 * i : 4 * i + 4]
            a_NF = nn.functional.linear(x_ND, up_FD, up_F)
            # ReLU's gradient needs no more than its result's sign, GELU's needs what went in.
            h_NF = a_NF.relu_() if activations[i] == "relu" else nn.functional.gelu(a_NF)
            hidden += [a_NF, h_NF]
            torch.addmm(down_O, h_NF, down_OF.t(), out=y_NO)
        ctx.save_for_backward(x_RD, *flat, *hidden)
        ctx.counts, ctx.activations = counts, activations
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy_RO: Tensor) -> tuple[Tensor | None, ...]:
        counts, num_flat = ctx.counts, 4 * len(ctx.counts)
        x_RD, *rest = ctx.saved_tensors
        flat, hidden = rest[:num_flat], rest[num_flat:]
        needs_x, _, _, *needs = ctx.needs_input_grad
        gx_RD = torch.empty_like(x_RD) if needs_x else None
        grads: list[Tensor | None] = [None] * num_flat
        row = 0
        for i, (x_ND, gy_NO) in enumerate(
            zip(x_RD.split(counts), gy_RO.split(counts), strict=True)
        ):
            up_FD, _, down_OF, _ = flat[4 * i : 4 * i + 4]
            a_NF, h_NF = hidden[2 * i : 2 * i + 2]
            need_up, need_up_bias, need_down, need_down_bias = needs[4 * i : 4 * i + 4]
            if need_down:
                grads[4 * i + 2] = gy_NO.t().mm(h_NF)
            if need_down_bias:
                grads[4 * i + 3] = gy_NO.sum(0)
            if needs_x or need_up or need_up_bias:
                ga_NF = _activation_backward(gy_NO.mm(down_OF), a_NF, ctx.activations[i])
                if need_up:
                    grads[4 * i] = ga_NF.t().mm(x_ND)
                if need_up_bias:
                    grads[4 * i + 1] = ga_NF.sum(0)
                if gx_RD is not None:
                    torch.mm(ga_NF, up_FD, out=gx_RD[row : row + len(x_ND)])
            row += len(x_ND)
        return gx_RD, None, None, *grads


def _activate(a_RF: Tensor, activation: Activation) -> Tensor:
    return a_RF.relu() if activation == "relu" else nn.functional.gelu(a_RF)


def _activation_backward(gh_NF: Tensor, a_NF: Tensor, activation: Activation) -> Tensor:
    """In place. For "relu", `a_NF` may be the activation's output as well as its input."""
    aten = torch.ops.aten
    if activation == "relu":
        aten.threshold_backward.grad_input(gh_NF, a_NF, 0, grad_input=gh_NF)
    else:
        aten.gelu_backward.grad_input(gh_NF, a_NF, grad_input=gh_NF)
    return gh_NF


def _dtype(x_RD: Tensor) -> torch.dtype:
    """What a matrix product of `x_RD` is computed in."""
    device = x_RD.device.type
    if torch.is_autocast_enabled(device) and x_RD.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x_RD.dtype
