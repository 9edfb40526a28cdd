"""Who held which expert, and how much each was used: pure functions of a Run.

Suffixes: L layers, E experts in a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmoe.report.log import RoundRecord, Run
from fedmoe.types import ExpertId, SubMoE

LAST_ROUNDS = 10  # the window in which the load of experts is measured


def as_sub_moe(layers: Sequence[Sequence[int]]) -> SubMoE:
    """The log's expert numbers per layer, as the set that they stand for."""
    return frozenset(ExpertId(layer, e) for layer, row in enumerate(layers) for e in row)


def held_by_round(run: Run, client: int) -> list[SubMoE | None]:
    """What a client held in each of the run's rounds.

    A round that does not mention it leaves it what it had; None before it had anything.
    """
    history: list[SubMoE | None] = []
    for record in run.rounds:
        if client in record.held:
            history.append(as_sub_moe(record.held[client]))
        else:
            history.append(history[-1] if history else None)
    return history


def held_at_end(run: Run) -> dict[int, SubMoE]:
    """What each client held last; clients that never held anything are left out."""
    last: dict[int, Sequence[Sequence[int]]] = {}
    for record in run.rounds:
        last.update(record.held)
    return {c.id: as_sub_moe(last[c.id]) for c in run.info.clients if c.id in last}


def holders_by_layer(run: Run) -> list[NDArray[np.int64]]:
    """For each layer, how many clients held each expert at the end."""
    holders_L = [np.zeros(n, dtype=np.int64) for n in run.info.num_experts_L]
    for sub_moe in held_at_end(run).values():
        for layer, expert in sub_moe:
            holders_L[layer][expert] += 1
    return holders_L


def counting_rounds(run: Run, last: int = LAST_ROUNDS) -> list[RoundRecord]:
    """The last rounds that counted activations.

    Exploring is left out, because there every client holds everything, unless the run never
    did anything else.
    """
    counted = [r for r in run.rounds if r.count]
    return ([r for r in counted if r.phase != "explore"] or counted)[-last:]


def activations_by_layer(run: Run, last: int = LAST_ROUNDS) -> list[NDArray[np.int64]]:
    """For each layer, the tokens that ran each expert, all clients, over the last rounds."""
    total_L = [np.zeros(n, dtype=np.int64) for n in run.info.num_experts_L]
    for record in counting_rounds(run, last):
        for rows in record.count.values():
            for total, row in zip(total_L, rows, strict=True):
                total += np.array(row[: len(total)], dtype=np.int64)
    return total_L


def load_cv_by_layer(run: Run, last: int = LAST_ROUNDS) -> list[float | None]:
    """For each layer, std / mean of the experts' activations; 0 is even, None unused."""
    return [
        float(total.std() / total.mean()) if total.sum() else None
        for total in activations_by_layer(run, last)
    ]


def dead_experts(run: Run, last: int = LAST_ROUNDS) -> list[ExpertId]:
    """Experts that no token ran in the last rounds; empty where nothing was counted."""
    if not counting_rounds(run, last):
        return []
    return [
        ExpertId(layer, int(expert))
        for layer, total in enumerate(activations_by_layer(run, last))
        for expert in np.flatnonzero(total == 0)
    ]


def use_by_client(run: Run, last: int = LAST_ROUNDS) -> dict[int, list[NDArray[np.float64]]]:
    """For each client and layer, the share of its activations that each expert had.

    Over the last rounds in which that client trained, and over the experts that it held at the
    end, so a row sums to 1; nan where it does not hold the expert, 0 where it never used it.
    """
    use = {}
    trained = [r for r in run.rounds if r.phase != "explore"] or list(run.rounds)
    for client, sub_moe in held_at_end(run).items():
        own = [r.count[client] for r in trained if client in r.count][-last:]
        rows = []
        for layer, num_experts in enumerate(run.info.num_experts_L):
            share = np.full(num_experts, np.nan)
            experts = sorted(e for at, e in sub_moe if at == layer)
            count = np.array([sum(c[layer][e] for c in own) for e in experts], dtype=np.float64)
            share[experts] = count / max(1.0, count.sum())
            rows.append(share)
        use[client] = rows
    return use
