"""What an update must be before it may touch the model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe.federated.average import tokens_of
from fedmoe.federated.sums import UPDATE_LIMIT, reach_of
from fedmoe.types import (
    ActivationProfile,
    Assignment,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
    State,
    SubMoE,
)

MAX_EXAMPLES = 2**24  # a client that claims more is not believed
MAX_TOKENS = 2**40  # per MoE layer; so sums of counts cannot overflow either


class RefusedUpdateError(ValueError):
    """An update that is left out of its round; says whose it is, and what is wrong with it."""


def check_update(update: ClientUpdate, assignment: Assignment, model: MoEState) -> None:
    """Accept an update for aggregation, or say why not.

    What comes back must have exactly the names, shapes and dtypes of what went down; only
    experts that no token reached may stay away.

    Args:
        assignment: what this client was sent in this round.
        model: the server's model, which tells what layers and experts there are.

    Raises:
        RefusedUpdateError: it is malformed, not finite, implausible, or holds what was not
            assigned.
    """
    Check(frozenset(model.experts))(update, assignment)


@dataclass(frozen=True)
class Check:
    """`check_update` by the experts that there are, which is all that it asks of the model."""

    experts: SubMoE | None  # None: there is no one model, only what each client was sent

    def __call__(self, update: ClientUpdate, assignment: Assignment) -> None:
        """Raises RefusedUpdateError."""
        experts = frozenset(assignment.model.experts) if self.experts is None else self.experts
        for problem in _problems(update, assignment, experts):
            raise RefusedUpdateError(f"client {update.client}: {problem}")


def _problems(update: ClientUpdate, assignment: Assignment, experts: SubMoE) -> Iterator[str]:
    """What is wrong with the update. Each check may rely on those before it."""
    examples = update.num_examples
    if not 1 <= examples <= MAX_EXAMPLES:
        yield f"num_examples must be between 1 and {MAX_EXAMPLES}, got {examples}"
    for name, value in update.metrics.items():
        if not math.isfinite(value):
            yield f"metric {name!r} must be finite, got {value}"
        if name.endswith(("_validation", "_test")) and not 0 <= value <= 1:
            yield f"metric {name!r} must be between 0 and 1, got {value}"
        if name.endswith("_error") and value < 0:
            yield f"metric {name!r} must be 0 or more, got {value}"
    yield from _profile_problems(update.profile, assignment.sub_moe | experts)
    if assignment.job is not Job.TRAIN:
        if update.model.shared or update.model.experts or update.extra:
            yield f"a {assignment.job.value} job sends no parameters back, but this update does"
        return
    for name, extra in update.extra.items():
        if name not in assignment.extra:
            yield f"extra {name!r} was not sent to it"
        elif problem := _value_problem(extra, assignment.extra[name], examples):
            yield f"extra {name!r} {problem}"
    sent = assignment.model
    yield from _state_problems("shared parameter", update.model.shared, sent.shared, examples)
    for e in sorted(update.model.experts):
        if e not in sent.experts:
            yield f"{_label(e)} was not assigned to it"
    for e in sorted(sent.experts):
        tokens = tokens_of(update.profile, e)
        if not tokens and e not in update.model.experts:
            continue  # no token reached it, so it is as it was
        weight = max(examples, tokens)
        got = update.model.experts.get(e, {})
        yield from _state_problems(f"{_label(e)}:", got, sent.experts[e], weight)
    for layer, number in update.profile.count_LE.nonzero().tolist():
        if (layer, number) not in assignment.sub_moe:
            yield f"reports tokens for {_label(ExpertId(layer, number))}, which it has not"


def _profile_problems(p: ActivationProfile, experts: SubMoE) -> Iterator[str]:
    num_layers = 1 + max((e.layer for e in experts), default=-1)
    num_experts = 1 + max((e.expert for e in experts), default=-1)
    exists_LE = torch.zeros(num_layers, num_experts, dtype=torch.bool)
    for e in experts:
        exists_LE[e.layer, e.expert] = True
    tables = {
        "count_LE": (p.count_LE, torch.int64),
        "weight_LE": (p.weight_LE, torch.float64),
        "score_LE": (p.score_LE, torch.float64),
        "token_L": (p.token_L, torch.int64),
    }
    for name, (table, dtype) in tables.items():
        shape = (num_layers, num_experts) if name.endswith("LE") else (num_layers,)
        if tuple(table.shape) != shape or table.dtype != dtype:
            yield (
                f"its profile's {name} must be {dtype} of shape {shape}, "
                f"got {table.dtype} of shape {tuple(table.shape)}"
            )
        elif not bool(table.isfinite().all()):
            yield f"its profile's {name} must be finite"
        elif bool((table < 0).any()):
            yield f"its profile's {name} must not be negative"
        elif name.endswith("LE") and bool(table[~exists_LE].any()):
            layer, number = (table.bool() & ~exists_LE).nonzero()[0].tolist()
            yield f"its profile's {name} names {_label(ExpertId(layer, number))}, which is not"
    if bool((p.token_L > MAX_TOKENS).any()):
        yield f"its profile's token_L must be at most {MAX_TOKENS}, got {int(p.token_L.max())}"
    if bool((p.count_LE > p.token_L[:, None]).any()):
        yield "its profile has an expert that ran more tokens than passed its layer"


def _state_problems(what: str, got: State, wanted: State, weight: int) -> Iterator[str]:
    if missing := sorted(set(wanted) - set(got)):
        yield f"{what} {missing[0]!r} is missing ({len(missing)} in all)"
    for name, value in got.items():
        if name not in wanted:
            yield f"{what} {name!r} was not sent to it"
        if problem := _value_problem(value, wanted[name], weight):
            yield f"{what} {name!r} {problem}"


def _value_problem(value: Tensor, wanted: Tensor, weight: int) -> str | None:
    if value.shape != wanted.shape:
        return f"must have shape {tuple(wanted.shape)}, got {tuple(value.shape)}"
    if value.dtype != wanted.dtype:
        return f"must be {wanted.dtype}, got {value.dtype}"
    reach = reach_of(value, weight)
    if not math.isfinite(reach):
        return "must be finite, but holds NaN or infinity"
    if reach >= UPDATE_LIMIT:
        return (
            f"times its weight must stay below {UPDATE_LIMIT:.0f}, got {reach:.3g} "
            f"for a weight of {weight}"
        )
    return None


def _label(e: ExpertId) -> str:
    return f"expert {e.expert} of layer {e.layer}"
