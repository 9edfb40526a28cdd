"""A model among the tensors that a local method keeps on its client.

A client's own model may hold other experts than those assigned in a round, so what it keeps is cut
along experts, and those that it does not hold now stay stored.
"""

import copy

from torch import Tensor, nn

from fedmoe.federated.local import LocalTask
from fedmoe.state import ROW, load_state, moe_layers, named_by_role, overlay, split_state
from fedmoe.types import ExpertId, MoEState, State

SHARED, EXPERT = "model/", "expert/"


def packed(state: MoEState) -> dict[str, Tensor]:
    """A model's tensors under flat names: `model/NAME`, and `expert/L.E/NAME`."""
    flat = {SHARED + n: t for n, t in state.shared.items()}
    for e, own in state.experts.items():
        flat |= {f"{EXPERT}{e.layer}.{e.expert}/{n}": t for n, t in own.items()}
    return flat


def unpacked(flat: State) -> MoEState:
    """What `packed` was given; tensors under other names are left out."""
    shared: dict[str, Tensor] = {}
    experts: dict[ExpertId, dict[str, Tensor]] = {}
    for name, value in flat.items():
        if name.startswith(SHARED):
            shared[name.removeprefix(SHARED)] = value
        elif name.startswith(EXPERT):
            place, _, inner = name.removeprefix(EXPERT).partition("/")
            layer, number = place.split(".")
            experts.setdefault(ExpertId(int(layer), int(number)), {})[inner] = value
    return MoEState(shared, experts)


def own_model(task: LocalTask) -> nn.Module:
    """A second model beside the task's: as this client left it, and where it has none, as sent."""
    model = copy.deepcopy(task.model)
    sent, mine = split_state(model), unpacked(task.kept)
    held = {e: s for e, s in mine.experts.items() if e in sent.experts}
    load_state(model, overlay(sent, MoEState(mine.shared, held)), _absent_rows(model))
    return model


def kept_with(task: LocalTask, model: nn.Module) -> dict[str, Tensor]:
    """`model` packed, and of what the client has kept all that `model` does not replace."""
    return {**task.kept, **packed(split_state(model))}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters as they are now, by role."""
    return {n: p.detach().clone() for n, p in named_by_role(model)}


def _absent_rows(model: nn.Module) -> dict[ExpertId, State]:
    """Gate rows that the model knows of experts that it does not hold."""
    rows: dict[ExpertId, State] = {}
    for layer, (_, moe) in enumerate(moe_layers(model)):
        names: tuple[str, ...] = getattr(moe.gate, "row_names", ())
        known_E = getattr(moe.gate, "known_E", None)
        known = set() if known_E is None else set(known_E.nonzero().flatten().tolist())
        for e in sorted(known - set(moe.held)):
            rows[ExpertId(layer, e)] = {
                ROW + n: moe.gate.get_parameter(n)[e].detach().clone() for n in names
            }
    return rows
