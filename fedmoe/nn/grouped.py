"""Many feed-forward experts in two grouped matrix products: one call instead of one per expert.

Shape suffixes: R rows, D width, F hidden width, O output width, H experts.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmoe.nn.experts.ffn import FFN, Activation, activate


class PlainFFN(NamedTuple):
    """The parameters of an expert that does what `FFN.forward` does, and nothing besides."""

    up_FD: Tensor
    up_F: Tensor | None
    down_OF: Tensor
    down_O: Tensor | None
    activation: Activation

    @property
    def numel(self) -> int:
        return self.up_FD.numel() + self.down_OF.numel()


def plain_ffns(experts: Iterable[nn.Module], x_RD: Tensor) -> list[PlainFFN] | None:
    """The experts' parameters; None if any is not a plain FFN, or of another dtype than the rows
    without autocast to mend it.

    A subclass, a hook or a map put in place of a linear one makes an expert not plain: its own
    `forward` must run.
    """
    any_dtype = torch.is_autocast_enabled(x_RD.device.type)
    plain = []
    for expert in experts:
        if type(expert) is not FFN or is_hooked(expert):
            return None
        # Not `expert.up.weight`: nn.Module looks its attributes up slowly.
        up, down = expert._modules["up"], expert._modules["down"]
        if type(up) is not nn.Linear or type(down) is not nn.Linear:
            return None
        if is_hooked(up) or is_hooked(down):
            return None
        u, d = up._parameters, down._parameters
        tensors = (u["weight"], u["bias"], d["weight"], d["bias"])
        if not any_dtype and any(t is not None and t.dtype != x_RD.dtype for t in tensors):
            return None
        plain.append(PlainFFN(*tensors, expert.activation))  # type: ignore[arg-type]
    return plain


def is_hooked(m: nn.Module) -> bool:
    return bool(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    )


def grouped_fits(ffns: Sequence[PlainFFN], x_RD: Tensor) -> bool:
    """Whether `run_grouped` can run these: all of the same shapes, biases and activation, and not
    float64.
    """
    first = ffns[0]
    return _dtype(x_RD) != torch.float64 and all(
        f.up_FD.shape == first.up_FD.shape
        and f.down_OF.shape == first.down_OF.shape
        and (f.up_F is None) == (first.up_F is None)
        and (f.down_O is None) == (first.down_O is None)
        and f.activation == first.activation
        for f in ffns
    )


def run_grouped(x_RD: Tensor, ffns: Sequence[PlainFFN], counts: Sequence[int]) -> Tensor:
    """The outputs (R, O) of experts that have `counts` consecutive rows each. Needs `grouped_fits`.

    Under autocast they are computed, and come out, in its dtype.
    """
    dtype, activation, out_dim = _dtype(x_RD), ffns[0].activation, len(ffns[0].down_OF)
    count_H = torch.tensor(counts, device=x_RD.device)
    end_H = count_H.cumsum(0, dtype=torch.int32)
    # One row of each operand must be a multiple of 16 bytes, so zeros are added as needed.
    unit = 16 // dtype.itemsize
    up_HFD = _pad(torch.stack([f.up_FD for f in ffns]).to(dtype), unit, 2)
    down_HOF = _pad(torch.stack([f.down_OF for f in ffns]).to(dtype), unit, 2)
    x_RD = _pad(x_RD.to(dtype), unit, 1)
    # Its own bias argument is not supported by every backend.
    a_RF = nn.functional.grouped_mm(x_RD, up_HFD.transpose(1, 2), offs=end_H)
    h_RF = activate(_add_biases(a_RF, [f.up_F for f in ffns], count_H), activation)
    y_RO = nn.functional.grouped_mm(h_RF, down_HOF.transpose(1, 2), offs=end_H)
    return _add_biases(y_RO, [f.down_O for f in ffns], count_H)[:, :out_dim]


def _add_biases(y_RW: Tensor, biases: Sequence[Tensor | None], count_H: Tensor) -> Tensor:
    """Add to each row its expert's bias, if they have any; `y_RW` may be padded to a width W."""
    given = [b for b in biases if b is not None]
    if not given:
        return y_RW
    bias_HW = nn.functional.pad(torch.stack(given), (0, y_RW.shape[1] - len(given[0])))
    return y_RW + bias_HW.to(y_RW.dtype).repeat_interleave(count_H, 0, output_size=len(y_RW))


def _pad(t: Tensor, unit: int, dims: int) -> Tensor:
    """Zeros behind the last `dims` dimensions, up to the next multiple of `unit`."""
    missing = [-n % unit for n in t.shape[-dims:]]
    if not any(missing):
        return t
    return nn.functional.pad(t, [m for n in reversed(missing) for m in (0, n)])


def _dtype(x_RD: Tensor) -> torch.dtype:
    """What a matrix product of `x_RD` is computed in."""
    device = x_RD.device.type
    if torch.is_autocast_enabled(device) and x_RD.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x_RD.dtype
