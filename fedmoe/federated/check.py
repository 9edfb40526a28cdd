"""What an update must be before it may touch the model."""

import math

from fedmoe.federated.average import UPDATE_LIMIT, tokens_of
from fedmoe.types import Assignment, ClientUpdate, ExpertId, Job, MoEState, State

MAX_EXAMPLES = 2**24  # a client that claims more is not believed


class RefusedUpdateError(ValueError):
    """An update that is left out of its round; says whose it is, and what is wrong with it."""


def check_update(update: ClientUpdate, assignment: Assignment, model: MoEState) -> None:
    """Accept an update for aggregation, or say why not.

    Args:
        assignment: what this client was asked to do in this round.
        model: the server's model, whose names, shapes and dtypes are the law.

    Raises:
        RefusedUpdateError: it is malformed, not finite, implausible, or holds what was not assigned.
    """

    def refuse(why: str) -> None:
        raise RefusedUpdateError(f"client {update.client}: {why}")

    if not 1 <= update.num_examples <= MAX_EXAMPLES:
        refuse(f"num_examples must be between 1 and {MAX_EXAMPLES}, got {update.num_examples}")
    for name, value in update.metrics.items():
        if not math.isfinite(value):
            refuse(f"metric {name!r} must be finite, got {value}")
    _check_profile(update, refuse_name=f"client {update.client}")
    if assignment.job is not Job.TRAIN:
        if update.model.shared or update.model.experts:
            refuse(f"a {assignment.job.value} job sends no parameters back, but this update does")
        return
    examples = update.num_examples
    problem = _problem_of("shared parameter", update.model.shared, model.shared, examples)
    if problem:
        refuse(problem)
    for e, state in update.model.experts.items():
        if e not in assignment.sub_moe:
            refuse(f"expert {e.expert} of layer {e.layer} was not assigned to it")
        weight = max(examples, tokens_of(update.profile, e))
        label = f"expert {e.expert} of layer {e.layer}:"
        problem = _problem_of(label, state, model.experts[e], weight)
        if problem:
            refuse(problem)
    num_layers, num_experts = update.profile.count_LE.shape
    for layer in range(num_layers):
        for number in range(num_experts):
            e = ExpertId(layer, number)
            if tokens_of(update.profile, e) and e not in assignment.sub_moe:
                refuse(f"reports tokens for expert {number} of layer {layer}, which it has not")


def _check_profile(update: ClientUpdate, refuse_name: str) -> None:
    p = update.profile
    shape = tuple(p.count_LE.shape)
    same = p.count_LE.dim() == 2 and all(tuple(t.shape) == shape for t in (p.weight_LE, p.score_LE))
    if not same or tuple(p.token_L.shape) != shape[:1]:
        raise RefusedUpdateError(f"{refuse_name}: its profile's tables differ in shape")
    if p.count_LE.is_floating_point() or p.token_L.is_floating_point():
        raise RefusedUpdateError(f"{refuse_name}: its profile's counts must be whole numbers")
    if not (p.weight_LE.isfinite().all() and p.score_LE.isfinite().all()):
        raise RefusedUpdateError(f"{refuse_name}: its profile must be finite")
    if bool((p.count_LE < 0).any()) or bool((p.weight_LE < 0).any()):
        raise RefusedUpdateError(f"{refuse_name}: its profile must not be negative")
    if bool((p.count_LE > p.token_L[:, None]).any()):
        raise RefusedUpdateError(f"{refuse_name}: an expert ran more tokens than passed its layer")


def _problem_of(what: str, got: State, wanted: State, weight: int) -> str | None:
    for name, value in got.items():
        if name not in wanted:
            return f"{what} {name!r} is not in the model"
        if value.shape != wanted[name].shape:
            return (
                f"{what} {name!r} must have shape {tuple(wanted[name].shape)}, "
                f"got {tuple(value.shape)}"
            )
        if value.dtype != wanted[name].dtype:
            return f"{what} {name!r} must be {wanted[name].dtype}, got {value.dtype}"
        largest = float(value.abs().max()) if value.numel() else 0.0  # NaN, if there is one
        if not math.isfinite(largest):
            return f"{what} {name!r} must be finite, but holds NaN or infinity"
        if largest * weight >= UPDATE_LIMIT:
            return (
                f"{what} {name!r} times its weight of {weight} must stay below "
                f"{UPDATE_LIMIT:.0f}, got a value of {largest:.3g}"
            )
    return None
