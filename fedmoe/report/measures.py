"""What a run achieved and what it cost, as numbers: pure functions of a Run.

Three accuracies of a client, all on its own test part: "received", of the model as it arrived;
"trained", after local training on it; and "chosen", the better of the two by the client's own
validation part, as received when they tie. The headline is the chosen one: it is what a client
would use, and no test label helped to choose it.

Traffic counts serialised bytes, both directions, all clients, one-off costs included.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmoe.report.log import ClientAccuracy, Run
from fedmoe.report.usage import dead_experts, held_at_end, load_cv_by_layer

Row = dict[str, Any]  # one run's results, as design.md's Results format has them


# --- accuracy ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The accuracies of one evaluated round; each mapping has the clients that measured it."""

    round: int  # rounds done before the model was sent out to be measured
    bytes_total: int  # traffic of the run up to and including this model's way down
    received: Mapping[int, float]
    trained: Mapping[int, float]
    chosen: Mapping[int, float]
    chosen_validation: Mapping[int, float]


@dataclass(frozen=True)
class ClientSpread:
    """How an accuracy is spread over clients."""

    mean: float
    std: float  # population: these are all the clients, not a sample of them
    worst_tenth: float  # mean of the worst ceil(n / 10) clients


def evaluations(run: Run) -> list[Evaluation]:
    """Every round in which at least one client measured a test accuracy."""
    found, spent = [], 0
    for record in run.rounds:
        accuracy = record.accuracy or {}
        received = {c: a.received_test for c, a in accuracy.items() if a.received_test is not None}
        trained = {c: a.trained_test for c, a in accuracy.items() if a.trained_test is not None}
        if received or trained:
            picks = {c: _choose(a) for c, a in accuracy.items()}
            found.append(
                Evaluation(
                    round=record.round,
                    bytes_total=spent + record.bytes_down,
                    received=received,
                    trained=trained,
                    chosen={c: test for c, (test, _) in picks.items() if test is not None},
                    chosen_validation={c: v for c, (_, v) in picks.items() if v is not None},
                )
            )
        spent += record.bytes_down + record.bytes_up
    return found


def _choose(accuracy: ClientAccuracy) -> tuple[float | None, float | None]:
    """Test and validation accuracy of the model that this client would keep."""
    received = accuracy.received_test, accuracy.received_validation
    trained = accuracy.trained_test, accuracy.trained_validation
    if received[0] is None:
        return trained
    better = received[1] is not None and trained[1] is not None and trained[1] > received[1]
    return trained if better and trained[0] is not None else received


def over_clients(accuracy: Mapping[int, float]) -> ClientSpread:
    """Mean, spread and worst tenth of the clients' accuracies; of one client at least."""
    if not accuracy:
        raise ValueError("accuracy must hold at least one client, got none")
    values = np.sort(np.array(list(accuracy.values()), dtype=np.float64))
    worst = values[: math.ceil(len(values) / 10)]
    return ClientSpread(float(values.mean()), float(values.std()), float(worst.mean()))


def final_evaluation(run: Run) -> Evaluation | None:
    """The last evaluated round; None where nothing was evaluated."""
    found = evaluations(run)
    return found[-1] if found else None


def best_evaluation(run: Run) -> Evaluation | None:
    """The evaluated round with the best mean validation accuracy, the earliest if they tie.

    Only rounds that measured as many clients as any other compete: the mean of a few clients
    is best by luck. Without validation parts the test accuracy decides.
    """
    found = evaluations(run)
    if not found:
        return None
    most = max(len(e.chosen) for e in found)
    whole = [e for e in found if len(e.chosen) == most]
    validated = all(len(e.chosen_validation) == most for e in whole)
    return max(
        whole,
        key=lambda e: over_clients(e.chosen_validation if validated else e.chosen).mean,
    )


def first_to_reach(run: Run, accuracy: float) -> Evaluation | None:
    """The first evaluated round whose mean chosen accuracy is at least `accuracy`."""
    for evaluation in evaluations(run):
        if over_clients(evaluation.chosen).mean >= accuracy:
            return evaluation
    return None


def rounds_to_share_of_final(run: Run, share: float) -> int | None:
    """Rounds until the mean chosen accuracy was `share` of what it was at the end."""
    final = final_evaluation(run)
    if final is None:
        return None
    reached = first_to_reach(run, share * over_clients(final.chosen).mean)
    return None if reached is None else reached.round


def bytes_to_accuracy(run: Run, accuracy: float) -> int | None:
    """Traffic until the mean chosen accuracy was at least `accuracy`; None if it never was."""
    reached = first_to_reach(run, accuracy)
    return None if reached is None else reached.bytes_total


def global_curve(run: Run) -> list[tuple[int, float]]:
    """(rounds done, accuracy of the merged model), where it was measured."""
    return [(r.round, r.global_accuracy) for r in run.rounds if r.global_accuracy is not None]


# --- cost -------------------------------------------------------------------------------------


def cumulative_bytes(run: Run) -> list[int]:
    """Traffic of the run up to and including each of its rounds."""
    return list(itertools.accumulate(r.bytes_down + r.bytes_up for r in run.rounds))


def client_memory_bytes(run: Run) -> int | None:
    """The most memory that any client needed in any round; None where nobody measured."""
    return max((n for r in run.rounds for n in r.memory_bytes.values()), default=None)


def accepted_share(run: Run) -> float:
    """Share of the clients whose every update was taken."""
    refused = {f.client for r in run.rounds for f in r.refused}
    return 1.0 - len(refused) / max(1, run.info.num_clients)


# --- rows of results --------------------------------------------------------------------------


def result_row(run: Run, protocol: str) -> Row:
    """One run as a row of simulations/results/NAME.json. Keys without a value are None.

    The personal_* values are the chosen ones, at the last evaluated round.
    """
    final, best = final_evaluation(run), best_evaluation(run)
    chosen = over_clients(final.chosen) if final else None
    best_spread = over_clients(best.chosen) if best else None
    load_cv = [cv for cv in load_cv_by_layer(run) if cv is not None]
    held = [len(sub_moe) for sub_moe in held_at_end(run).values()]
    merged = global_curve(run)
    bytes_up = sum(r.bytes_up for r in run.rounds)
    bytes_down = sum(r.bytes_down for r in run.rounds)
    return {
        "protocol": protocol,
        "method": run.info.method,
        "seed": run.info.seed,
        "rounds": run.info.rounds,
        "personal_mean": chosen.mean if chosen else None,
        "personal_std": chosen.std if chosen else None,
        "personal_worst_tenth": chosen.worst_tenth if chosen else None,
        "global": merged[-1][1] if merged else None,
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
        "client_memory_bytes": client_memory_bytes(run),
        "seconds": sum(r.seconds for r in run.rounds),
        "partition_hash": run.info.partition_hash,
        # further keys
        "experiment": run.info.experiment,
        "num_clients": run.info.num_clients,
        "num_test": sum(c.num_test for c in run.info.clients),
        "num_classes": run.info.num_classes,
        "num_experts_L": list(run.info.num_experts_L),
        "rounds_done": sum(r.phase != "final" for r in run.rounds),
        "closed": any(r.phase == "final" for r in run.rounds),
        "clients_evaluated": len(final.chosen) if final else 0,
        "accuracy_received_mean": _mean(final.received) if final else None,
        "accuracy_trained_mean": _mean(final.trained) if final else None,
        "best_round": best.round if best else None,
        "best_personal_mean": best_spread.mean if best_spread else None,
        "rounds_to_90_percent": rounds_to_share_of_final(run, 0.90),
        "rounds_to_99_percent": rounds_to_share_of_final(run, 0.99),
        "bytes_total": bytes_up + bytes_down,
        "bytes_once": sum(r.bytes_once for r in run.rounds),
        "rounds_exploring": sum(r.phase == "explore" for r in run.rounds),
        "seconds_exploring": sum(r.seconds for r in run.rounds if r.phase == "explore"),
        "load_cv": sum(load_cv) / len(load_cv) if load_cv else None,
        "dead_experts": len(dead_experts(run)),
        "experts_held_min": min(held) if held else None,
        "experts_held_mean": sum(held) / len(held) if held else None,
        "experts_held_max": max(held) if held else None,
        "failures": sum(len(r.failed) for r in run.rounds),
        "refusals": sum(len(r.refused) for r in run.rounds),
        "accepted_share": accepted_share(run),
    }


def _mean(accuracy: Mapping[int, float]) -> float | None:
    return over_clients(accuracy).mean if accuracy else None


@dataclass(frozen=True)
class Aggregate:
    """One measure over the seeds of a method."""

    mean: float
    std: float | None  # sample standard deviation; None from one seed
    num_seeds: int


@dataclass(frozen=True)
class TableRow:
    """One method in a table; `values` has a measure if every seed of the method has it."""

    method: str
    num_seeds: int
    published: bool  # copied from a paper, not measured here
    values: Mapping[str, Aggregate]
    control: bool = False  # a mark beside the methods: it knows what a server cannot know
    other_size: bool = False  # its model has other numbers of experts than most methods' here

    @property
    def competes(self) -> bool:
        """Whether it may be called the best of its table."""
        return not (self.published or self.control or self.other_size)

    @property
    def mark(self) -> str:
        """What stands behind its name; the notes below a table say what it means."""
        return "†" if self.published else "‡" if self.control else "§" if self.other_size else ""


def table_rows(runs: Sequence[Run], protocol: str = "") -> list[TableRow]:
    """One row per method, over its seeds, in the order in which the methods come."""
    return aggregate_rows([result_row(run, protocol) for run in runs])


def aggregate_rows(rows: Sequence[Row]) -> list[TableRow]:
    """As `table_rows`, from rows of results; published ones stay rows of their own.

    Raises:
        ValueError: the rows come from more than one protocol, or repeat a method's seed.
    """
    protocols = sorted({str(r["protocol"]) for r in rows})
    if len(protocols) > 1:
        raise ValueError(f"rows must come from one protocol, got {', '.join(protocols)}")
    methods: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        methods.setdefault((row["method"], bool(row.get("published"))), []).append(row)
    other_sized = of_other_size(rows)
    result = []
    for (method, published), own in methods.items():
        seeds = [r.get("seed") for r in own]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"each seed of {method} must come once, got seeds {seeds}")
        names = {n for r in own for n, v in r.items() if _is_number(v)} - {"seed"}
        values = {
            name: _over_seeds([float(r[name]) for r in own])
            for name in sorted(names)
            if all(_is_number(r.get(name)) for r in own)
        }
        control = any(r.get("control") for r in own)
        other_size = not published and method in other_sized
        result.append(TableRow(method, len(own), published, values, control, other_size))
    return result


def pools(rows: Sequence[Row]) -> dict[str, str]:
    """The experts per layer of each method's model, as text; methods that do not tell have none."""
    told = ((str(r["method"]), r.get("num_experts_L")) for r in rows if not r.get("published"))
    return {method: str(sizes) for method, sizes in told if sizes is not None}


def of_other_size(rows: Sequence[Row]) -> list[str]:
    """The methods whose models have other experts per layer than those of most methods.

    Of as many, those that come first count as most.
    """
    of = pools(rows)
    if not of:
        return []
    common = Counter(of.values()).most_common(1)[0][0]
    return [method for method, pool in of.items() if pool != common]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _over_seeds(values: Sequence[float]) -> Aggregate:
    array = np.array(values, dtype=np.float64)
    std = float(array.std(ddof=1)) if len(array) > 1 else None
    return Aggregate(float(array.mean()), std, len(array))
