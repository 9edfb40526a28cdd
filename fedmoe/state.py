"""Between a torch model and its parameters cut along experts. Alone knows parameter names.

A name that a `NameTest` sees is the model's own for shared parameters, `experts.L.E.NAME` for a
parameter of expert E in MoE layer L, and `gates.L.NAME` for the rows of layer L's gate, so that a
test of names does not depend on where in a model its MoE layers are.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from fedmoe.nn.moe import MoE
from fedmoe.types import ExpertId, MoEState, State, SubMoE

NameTest = Callable[[str], bool]  # of a parameter's name
ROW = "gate:"  # marks, within an expert's state, the rows that its layer's gate has for it


def everything(name: str) -> bool:
    return True


def nothing(name: str) -> bool:
    return False


def is_gate(name: str) -> bool:
    """True of the rows of every gate."""
    return name.startswith("gates.")


def is_expert(name: str) -> bool:
    """True of every expert's parameters, gate rows not included."""
    return name.startswith("experts.")


def other_than(test: NameTest) -> NameTest:
    return lambda name: not test(name)


Layers = list[tuple[str, MoE]]  # the path and the layer, by position


def moe_layers(model: nn.Module) -> Layers:
    """The MoE layers in the order of `named_modules`; their position is `ExpertId.layer`."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, MoE)]


def layer_sizes(model: nn.Module) -> tuple[int, ...]:
    """Experts in each MoE layer of the global model, held or not."""
    return tuple(moe.num_experts for _, moe in moe_layers(model))


def named_by_role(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's parameters under the names that a `NameTest` sees."""
    roles = {}
    for layer, (path, moe) in enumerate(moe_layers(model)):
        dot = f"{path}." if path else ""
        for key, expert in moe.experts.items():
            for name, _ in expert.named_parameters():
                roles[f"{dot}experts.{key}.{name}"] = f"experts.{layer}.{key}.{name}"
        for name in _row_names(moe):
            roles[f"{dot}gate.{name}"] = f"gates.{layer}.{name}"
    for name, p in model.named_parameters():
        yield roles.get(name, name), p


def split_state(model: nn.Module) -> MoEState:
    """Copy the model's parameters and buffers to the CPU, each held expert's apart."""
    rest = {n: p.detach().cpu().clone() for n, p in model.state_dict().items()}
    experts = {}
    for layer, (path, moe) in enumerate(moe_layers(model)):
        dot = f"{path}." if path else ""
        rows = {name: rest.pop(f"{dot}gate.{name}") for name in _row_names(moe)}
        for key, expert in moe.experts.items():
            own = {n: rest.pop(f"{dot}experts.{key}.{n}") for n in expert.state_dict()}
            own |= {ROW + n: rows_E[int(key)].clone() for n, rows_E in rows.items()}
            experts[ExpertId(layer, int(key))] = own
    return MoEState(rest, experts)


def load_state(
    model: nn.Module,
    state: MoEState,
    absent_rows: Mapping[ExpertId, State] | None = None,
) -> None:
    """Put `state` into `model`, which from then on holds just the experts that `state` has.

    The model must be able to hold them: a full model, or one that holds at least these. Experts
    that it drops are freed. Rows of experts that are neither in `state` nor in `absent_rows` are
    zeros and unknown to the gate.

    Raises:
        ValueError: `state` lacks a parameter, has one too many, or one of another shape or
            dtype, or an expert that the model cannot hold. The model is then unchanged.
    """
    absent_rows = absent_rows or {}
    layers = moe_layers(model)
    shared = {n: t for n, t in model.state_dict().items() if not _cut(n, layers)}
    _check("shared parameter", shared, state.shared)
    by_layer: list[dict[int, State]] = [{} for _ in layers]
    for e, own in state.experts.items():
        if not 0 <= e.layer < len(layers) or str(e.expert) not in layers[e.layer][1].experts:
            raise ValueError(f"{_label(e)} is not in the model, which has {_extent(layers)}")
        moe = layers[e.layer][1]
        wanted = dict(moe.experts[str(e.expert)].state_dict()) | _row_samples(moe)
        _check(f"{_label(e)}: parameter", wanted, own)
        by_layer[e.layer][e.expert] = own
    for e, rows in absent_rows.items():
        if not (0 <= e.layer < len(layers) and 0 <= e.expert < layers[e.layer][1].num_experts):
            raise ValueError(f"gate rows of {_label(e)}: the model has {_extent(layers)}")
        _check(f"gate rows of {_label(e)}: row", _row_samples(layers[e.layer][1]), rows)

    with torch.no_grad():
        own_state = model.state_dict()
        for name, value in state.shared.items():
            own_state[name].copy_(value)
        for layer, (_, moe) in enumerate(layers):
            held = by_layer[layer]
            moe.hold(held)
            for number, own in held.items():
                target = moe.experts[str(number)].state_dict()
                for name, value in own.items():
                    if not name.startswith(ROW):
                        target[name].copy_(value)
            absent = {e.expert: r for e, r in absent_rows.items() if e.layer == layer}
            _load_rows(moe, absent | held)


def build_part(factory: Callable[[], nn.Module], sub_moe: SubMoE) -> nn.Module:
    """A model of which only these experts ever take memory; its values are to be loaded.

    `factory` makes the full model. It runs on the meta device, where tensors have no memory,
    unless the model keeps buffers that a state does not carry; then it runs for real, and the
    experts that are not wanted are dropped at once.

    Raises:
        ValueError: the model has no such expert.
    """
    whole = _without_memory(factory)
    layers = moe_layers(whole)
    for e in sorted(sub_moe):
        if not 0 <= e.layer < len(layers) or str(e.expert) not in layers[e.layer][1].experts:
            raise ValueError(f"{_label(e)} is not in the model, which has {_extent(layers)}")
    if _has_hidden_buffers(whole):
        model = factory()
    else:
        # An expert that is not wanted need not be copied to be dropped.
        unwanted = [
            expert
            for layer, (_, moe) in enumerate(layers)
            for number, expert in moe.experts.items()
            if ExpertId(layer, int(number)) not in sub_moe
        ]
        model = copy.deepcopy(whole, {id(expert): nn.Module() for expert in unwanted})
    for layer, (_, moe) in enumerate(moe_layers(model)):
        moe.hold([e.expert for e in sub_moe if e.layer == layer])
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device="cpu")
        for layer, (_, moe) in enumerate(moe_layers(model)):
            moe.hold([e.expert for e in sub_moe if e.layer == layer])
            _load_rows(moe, {})
    return model


@lru_cache(maxsize=16)
def _without_memory(factory: Callable[[], nn.Module]) -> nn.Module:
    """The full model on the meta device, to be copied: that is faster than to make it again."""
    with torch.device("meta"):
        return factory()


def take_names(state: MoEState, test: NameTest) -> MoEState:
    """The part of `state` whose names pass; experts of which nothing passes are left out."""
    shared = {n: t for n, t in state.shared.items() if test(n)}
    experts = {}
    for e, own in state.experts.items():
        kept = {n: t for n, t in own.items() if test(_role(e, n))}
        if kept:
            experts[e] = kept
    return MoEState(shared, experts)


def overlay(base: MoEState, top: MoEState) -> MoEState:
    """`base` with the parameters that `top` has in their place, and those it adds."""
    experts = dict(base.experts)
    for e, own in top.experts.items():
        experts[e] = {**experts.get(e, {}), **own}
    return MoEState({**base.shared, **top.shared}, experts)


def rows_of(state: MoEState, absent: SubMoE) -> dict[ExpertId, State]:
    """The gate rows of these experts alone."""
    return {
        e: {n: t for n, t in state.experts[e].items() if n.startswith(ROW)} for e in sorted(absent)
    }


def state_hash(state: MoEState) -> str:
    """SHA-256 over every name, dtype, shape and value, in a fixed order; hexadecimal."""
    h = hashlib.sha256()
    for label, part in (("shared", state.shared), *((_label(e), s) for e, s in ordered(state))):
        for name in sorted(part):
            t = part[name].detach().cpu().contiguous()
            h.update(f"{label}/{name}/{t.dtype}/{tuple(t.shape)}\n".encode())
            h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def ordered(state: MoEState) -> list[tuple[ExpertId, State]]:
    return sorted(state.experts.items(), key=lambda item: item[0])


def parameter_bytes(state: State) -> int:
    """Bytes that these values take in memory."""
    return sum(t.numel() * t.element_size() for t in state.values())


def _role(e: ExpertId, name: str) -> str:
    if name.startswith(ROW):
        return f"gates.{e.layer}.{name.removeprefix(ROW)}"
    return f"experts.{e.layer}.{e.expert}.{name}"


def _row_names(moe: MoE) -> tuple[str, ...]:
    """The gate's parameters of which each expert has a row; none if the gate does not say."""
    names: tuple[str, ...] = getattr(moe.gate, "row_names", ())
    return names


def _row_samples(moe: MoE) -> dict[str, Tensor]:
    return {ROW + n: moe.gate.get_parameter(n)[0] for n in _row_names(moe)}


def _load_rows(moe: MoE, rows: Mapping[int, State]) -> None:
    """Rows by expert number; the others become zeros that the gate knows to leave out."""
    with torch.no_grad():
        for name in _row_names(moe):
            rows_E = moe.gate.get_parameter(name)
            rows_E.zero_()
            for number, own in rows.items():
                rows_E[number].copy_(own[ROW + name])
        known_E = getattr(moe.gate, "known_E", None)
        if isinstance(known_E, Tensor):
            known_E.zero_()
            known_E[list(rows)] = True


def _cut(name: str, layers: list[tuple[str, MoE]]) -> bool:
    """Whether a name of the model belongs to experts rather than to the shared part."""
    for path, moe in layers:
        dot = f"{path}." if path else ""
        if name.startswith(f"{dot}experts."):
            return True
        if any(name == f"{dot}gate.{row}" for row in _row_names(moe)):
            return True
    return False


def _has_hidden_buffers(model: nn.Module) -> bool:
    """Buffers that no state_dict carries, other than those that this module sets itself."""
    ours = {"present_E", "known_E"}
    seen = set(model.state_dict())
    return any(n not in seen and n.split(".")[-1] not in ours for n, _ in model.named_buffers())


def _check(what: str, wanted: State, got: State) -> None:
    if missing := sorted(set(wanted) - set(got)):
        raise ValueError(f"{what} {missing[0]!r} is missing ({len(missing)} in all)")
    if extra := sorted(set(got) - set(wanted)):
        raise ValueError(f"{what} {extra[0]!r} is not in the model ({len(extra)} in all)")
    for name, value in got.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{what} {name!r} must have shape {tuple(wanted[name].shape)}, "
                f"got {tuple(value.shape)}"
            )
        if value.dtype != wanted[name].dtype:
            raise ValueError(f"{what} {name!r} must be {wanted[name].dtype}, got {value.dtype}")


def _label(e: ExpertId) -> str:
    return f"expert {e.expert} of layer {e.layer}"


def _extent(layers: list[tuple[str, MoE]]) -> str:
    held = [f"layer {i}: {', '.join(m.experts) or 'none'}" for i, (_, m) in enumerate(layers)]
    return "; ".join(held) or "no MoE layers"
