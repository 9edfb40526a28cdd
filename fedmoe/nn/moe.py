"""The mixture-of-experts layer: a gate weighs experts, the chosen ones run, their outputs add.

Shape suffixes: T tokens, D model width, O output width, E experts.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fedmoe.nn.dispatch import mix
from fedmoe.types import Routing


class Gate(Protocol):
    """Weighs E experts for each token, giving weight only to those in `present_E`."""

    def __call__(self, x_TD: Tensor, present_E: Tensor) -> Routing: ...


class MoE(nn.Module):
    """A gate over experts, of which this device may hold only some.

    An expert is any module from (N, D) to (N, O); it sees only the tokens that weigh it. Experts
    keep the number that they have in the global model, so a client's parameter names match the
    server's. `present_E` says whom the gate may choose: the held experts, unless a scout opens it
    to more; a token gets nothing from an expert that is chosen but not held.
    """

    present_E: Tensor

    def __init__(
        self,
        gate: nn.Module,
        experts: Mapping[int, nn.Module],
        num_experts: int,
        out_dim: int | None = None,
    ) -> None:
        """Widths are taken from the attributes `dim` and `out_dim` of gate and experts, as far as
        they have them; `out_dim` says the output's where no expert does. Without either it is the
        width of the layer's input.

        Raises:
            ValueError: an expert's number is not below `num_experts`, or widths differ.
        """
        super().__init__()
        _check_numbers(experts, num_experts)
        named = {f"expert {e}": experts[e] for e in sorted(experts)}
        self.dim = _common_width("dim", {"gate": gate, **named})
        self.out_dim = _common_width("out_dim", named, {"layer": out_dim})
        self.gate = gate
        self.experts = nn.ModuleDict({str(e): experts[e] for e in sorted(experts)})
        self.num_experts = num_experts
        present_E = torch.zeros(num_experts, dtype=torch.bool)
        present_E[list(experts)] = True
        self.register_buffer("present_E", present_E, persistent=False)

    @property
    def held(self) -> tuple[int, ...]:
        """The numbers of the experts on this device, ascending."""
        return tuple(int(key) for key in self.experts)

    def hold(self, experts: Collection[int]) -> None:
        """Drop all held experts but these, freeing their memory, and open the gate to these alone.

        Raises:
            ValueError: `experts` names one that is not held.
        """
        missing = sorted(set(experts) - set(self.held))
        if missing:
            raise ValueError(f"experts must be among the held {self.held}, got also {missing}")
        for e in self.held:
            if e not in experts:
                del self.experts[str(e)]
        self.present_E.zero_()
        self.present_E[list(experts)] = True

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., O). Tokens whose `keep` (...,) is False, padding, are shown neither to
        the gate nor to any expert, and come out as zeros.

        Raises:
            ValueError: `x` has another width than gate and experts, `keep` another shape than the
                tokens, the gate weighs another number of experts, or an expert returns another
                shape than (N, O).
        """
        if self.dim is not None and x.shape[-1] != self.dim:
            raise ValueError(f"x must have width {self.dim}, got {x.shape[-1]}")
        tokens = x.shape[:-1]
        x_TD = x.reshape(-1, x.shape[-1])
        kept_T = None if keep is None else _kept(keep, tokens)
        if kept_T is not None:
            x_TD = x_TD[kept_T]
        routing: Routing = self.gate(x_TD, self.present_E)
        weight_TE = routing.weight_TE
        if weight_TE.shape != (len(x_TD), self.num_experts):
            raise ValueError(
                f"the gate must weigh {len(x_TD)} tokens for {self.num_experts} experts, "
                f"got weights of shape {tuple(weight_TE.shape)}"
            )
        held = {int(key): expert for key, expert in self.experts.items()}
        out_dim = x.shape[-1] if self.out_dim is None else self.out_dim
        y_TO = mix(x_TD, weight_TE, held, out_dim)
        if kept_T is not None:
            y_TO = y_TO.new_zeros(len(kept_T), out_dim).index_put((kept_T,), y_TO)
        return y_TO.view(*tokens, out_dim)


def _kept(keep: Tensor, tokens: torch.Size) -> Tensor:
    if keep.shape != tokens or keep.dtype != torch.bool:
        raise ValueError(
            f"keep must be bool of the tokens' shape {tuple(tokens)}, "
            f"got {keep.dtype} of shape {tuple(keep.shape)}"
        )
    return keep.flatten()


def _check_numbers(experts: Collection[int], num_experts: int) -> None:
    wrong = sorted(e for e in experts if not 0 <= e < num_experts)
    if wrong:
        raise ValueError(f"expert numbers must be from 0 to {num_experts - 1}, got {wrong}")


def _common_width(
    name: str, parts: Mapping[str, nn.Module], given: Mapping[str, int | None] | None = None
) -> int | None:
    told: dict[str, int | None] = {what: getattr(part, name, None) for what, part in parts.items()}
    told |= given or {}
    known = {what: width for what, width in told.items() if width is not None}
    if len(set(known.values())) > 1:
        raise ValueError(f"gate, experts and layer must agree on {name}, got {known}")
    return next(iter(known.values()), None)
