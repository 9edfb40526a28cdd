"""Assignments and updates as bytes, and back: one safetensors blob, without pickle.

Everything in a message is a tensor under a name: `shared/NAME`, `expert/L.E/NAME`,
`rows/L.E/NAME`, `once/NAME`, `extra/NAME`, the profile's tables, `metric/NAME`, and the few
numbers in `head`. So the size of a message depends on names, shapes and dtypes alone, and can be
told without building it.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from safetensors.torch import load, save
from torch import Tensor

from fedmoe.types import (
    ActivationProfile,
    Assignment,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
    State,
)

JOBS = tuple(Job)
NO_CHOICE = -1  # in place of the number of experts that a scout is to choose
PROFILE = ("count_LE", "weight_LE", "score_LE", "token_L")


def encode_assignment(assignment: Assignment) -> bytes:
    return save(_contiguous(_assignment_tensors(assignment)))


def decode_assignment(raw: bytes) -> Assignment:
    """Raises ValueError: not an assignment, or one whose names or numbers make no sense."""
    tensors = _read(raw)
    round, job, validate, evaluate, choose = _head(tensors, 5)
    if not 0 <= job < len(JOBS):
        raise ValueError(f"job must be between 0 and {len(JOBS) - 1}, got {job}")
    held = tensors.pop("sub_moe", None)
    if held is None or held.dtype != torch.int32 or held.dim() != 2 or held.shape[1] != 2:
        raise ValueError("sub_moe must be an int32 table with 2 columns")
    if round < 0 or bool((held < 0).any()):
        raise ValueError("an assignment's round and experts must be numbered from 0")
    if choose == 0 or choose < NO_CHOICE:
        raise ValueError(f"choose must be at least 1 expert, or {NO_CHOICE} for none, got {choose}")
    rows = _by_expert(tensors, "rows/")
    once, extra = _under(tensors, "once/"), _under(tensors, "extra/")
    return Assignment(
        round,
        _model(tensors),
        frozenset(ExpertId(int(layer), int(e)) for layer, e in held.tolist()),
        JOBS[job],
        bool(validate),
        bool(evaluate),
        rows,
        once,
        extra,
        None if choose == NO_CHOICE else choose,
    )


def encode_update(update: ClientUpdate) -> bytes:
    return save(_contiguous(_update_tensors(update)))


def decode_update(raw: bytes) -> ClientUpdate:
    """Raises ValueError: not an update, or one whose names or numbers make no sense."""
    tensors = _read(raw)
    client, num_examples = _head(tensors, 2)
    missing = [n for n in PROFILE if n not in tensors]
    if missing:
        raise ValueError(f"an update must have a profile; {missing[0]} is missing")
    profile = ActivationProfile(*(tensors.pop(n) for n in PROFILE))
    metrics = {}
    for name in [n for n in tensors if n.startswith("metric/")]:
        value = tensors.pop(name)
        if value.dtype != torch.float64 or value.dim():
            raise ValueError(f"{name} must be one float64 number, got {value.dtype} of shape "
                             f"{tuple(value.shape)}")
        metrics[name.removeprefix("metric/")] = float(value)
    extra = _under(tensors, "extra/")
    return ClientUpdate(client, num_examples, _model(tensors), profile, metrics, extra)


def message_bytes(message: Assignment | ClientUpdate) -> int:
    """Length of the encoded message, told without encoding it."""
    if isinstance(message, Assignment):
        tensors = _assignment_tensors(message)
    else:
        tensors = _update_tensors(message)
    return model_bytes(tensors)


def model_bytes(tensors: State) -> int:
    """Length of these tensors as one safetensors blob."""
    return _header_bytes(
        tuple((n, t.dtype, tuple(t.shape)) for n, t in sorted(tensors.items()))
    ) + sum(t.numel() * t.element_size() for t in tensors.values())


def model_tensors(model: MoEState) -> dict[str, Tensor]:
    """A model's tensors under the names that they have in messages and exports."""
    named = {f"shared/{n}": t for n, t in model.shared.items()}
    return named | _named("expert/", model.experts)


@lru_cache(maxsize=4096)
def _header_bytes(signature: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> int:
    # Only the length is wanted, so the tensors are zeros of the right shapes.
    sample = {name: torch.zeros(shape, dtype=dtype) for name, dtype, shape in signature}
    content = sum(t.numel() * t.element_size() for t in sample.values())
    return len(save(sample)) - content


def _assignment_tensors(a: Assignment) -> dict[str, Tensor]:
    choose = NO_CHOICE if a.choose is None else a.choose
    head = torch.tensor([a.round, JOBS.index(a.job), int(a.validate), int(a.evaluate), choose])
    held = torch.tensor(sorted(a.sub_moe), dtype=torch.int32).reshape(-1, 2)
    own = {"head": head, "sub_moe": held} | _prefixed("once/", a.once)
    own |= _prefixed("extra/", a.extra)
    return own | model_tensors(a.model) | _named("rows/", a.absent_rows)


def _update_tensors(u: ClientUpdate) -> dict[str, Tensor]:
    own = {"head": torch.tensor([u.client, u.num_examples])}
    own |= {name: getattr(u.profile, name) for name in PROFILE}
    own |= {f"metric/{n}": torch.tensor(v, dtype=torch.float64) for n, v in u.metrics.items()}
    return own | _prefixed("extra/", u.extra) | model_tensors(u.model)


def _prefixed(prefix: str, state: State) -> dict[str, Tensor]:
    return {prefix + n: t for n, t in state.items()}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): tensors.pop(n) for n in _starting(tensors, prefix)}


def _named(prefix: str, experts: Mapping[ExpertId, State]) -> dict[str, Tensor]:
    return {
        f"{prefix}{e.layer}.{e.expert}/{n}": t for e, s in experts.items() for n, t in s.items()
    }


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().contiguous() for n, t in tensors.items()}


def _read(raw: bytes) -> dict[str, Tensor]:
    try:
        return dict(load(raw))
    except Exception as why:  # safetensors has no common class for what malformed bytes raise
        raise ValueError(f"not a fedmoe message: {why}") from why


def _head(tensors: dict[str, Tensor], length: int) -> list[int]:
    head = tensors.pop("head", None)
    if head is None or tuple(head.shape) != (length,) or head.dtype != torch.int64:
        raise ValueError(f"a message's head must be {length} int64 numbers")
    return [int(v) for v in head.tolist()]


def _model(tensors: dict[str, Tensor]) -> MoEState:
    experts = _by_expert(tensors, "expert/")
    shared = {n.removeprefix("shared/"): t for n, t in tensors.items() if n.startswith("shared/")}
    if unknown := sorted(n for n in tensors if not n.startswith("shared/")):
        raise ValueError(f"a message must not hold {unknown[0]!r}")
    return MoEState(shared, experts)


def _by_expert(tensors: dict[str, Tensor], prefix: str) -> dict[ExpertId, State]:
    experts: dict[ExpertId, dict[str, Tensor]] = {}
    for name in _starting(tensors, prefix):
        place, _, inner = name.removeprefix(prefix).partition("/")
        layer, _, number = place.partition(".")
        if not (layer.isdecimal() and number.isdecimal() and inner):
            raise ValueError(f"{name!r} must read {prefix}LAYER.EXPERT/NAME")
        experts.setdefault(ExpertId(int(layer), int(number)), {})[inner] = tensors.pop(name)
    return {e: experts[e] for e in sorted(experts)}


def _starting(names: Iterable[str], prefix: str) -> list[str]:
    return [n for n in names if n.startswith(prefix)]
