"""A run as one row with all that tables and figures of a comparison need, and rows in a file.

The keys of `result_row`, and:

    personal_weighted_mean  of the chosen accuracies, weighted by the clients' test examples
    accuracy_KIND_std, _worst_tenth, _weighted_mean   the same for KIND received and trained
    KIND_by_client          {"0": 0.8125, ...} at the end, for chosen, received and trained
    curve                   [{"round", "bytes", "received", "trained", "chosen"}, ...]: at each
                            evaluation the traffic so far and the means over clients
    validation_mean         over clients, at the end, of the better model's validation accuracy
    model_parameters        of the full model
    failed_clients          [ids of the clients that failed at least once]
    versions                {"fedmoe": "0.1.0", "torch": ...}
    unseen_...              of clients who came afterwards, see fedmoe.report.unseen

A file of rows is a JSON list with a row on each line. Accuracies are shares from 0 to 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedmoe.report.atomic import write_atomically
from fedmoe.report.log import Run
from fedmoe.report.measures import Row, evaluations, final_evaluation, over_clients, result_row
from fedmoe.report.unseen import unseen_measures

# An accuracy by its name in the log, and what the keys of a row call it.
KINDS = {"chosen": "personal", "received": "accuracy_received", "trained": "accuracy_trained"}
# What a row says of the chosen model alone, beside the keys that begin with "personal".
_OF_CHOSEN = ("best_round", "best_personal_mean", "rounds_to_90_percent", "rounds_to_99_percent")


def full_row(run: Run, protocol: str) -> Row:
    """One run as a row; keys without a value are None."""
    row = result_row(run, protocol)
    final = final_evaluation(run)
    num_test = {c.id: c.num_test for c in run.info.clients}
    for kind, key in KINDS.items():
        accuracy: Mapping[int, float] = getattr(final, kind) if final else {}
        spread = over_clients(accuracy) if accuracy else None
        row[f"{key}_std"] = spread.std if spread else None
        row[f"{key}_worst_tenth"] = spread.worst_tenth if spread else None
        row[f"{key}_weighted_mean"] = _weighted(accuracy, num_test)
        row[f"{kind}_by_client"] = {str(c): round(a, 4) for c, a in sorted(accuracy.items())}
    row["curve"] = [
        {"round": e.round, "bytes": e.bytes_total}
        | {kind: _mean(getattr(e, kind)) for kind in KINDS}
        for e in evaluations(run)
    ]
    row["validation_mean"] = _mean(final.chosen_validation) if final else None
    row["model_parameters"] = run.info.model_parameters
    row["failed_clients"] = sorted({f.client for r in run.rounds for f in r.failed})
    row["versions"] = dict(run.info.versions)
    return row | unseen_measures(run)


def _weighted(accuracy: Mapping[int, float], num_test: Mapping[int, int]) -> float | None:
    weights = [num_test.get(c, 0) for c in accuracy]
    return float(np.average(list(accuracy.values()), weights=weights)) if any(weights) else None


def _mean(accuracy: Mapping[int, float]) -> float | None:
    return round(over_clients(accuracy).mean, 6) if accuracy else None


def received_and_tuned(rows: Iterable[Row], methods: Sequence[str]) -> list[Row]:
    """Each run of `methods` as two rows: judged as received, and after local fine-tuning.

    Of the one training, two ways to use its model; nothing is chosen by validation data in
    either. Other rows stay as they are.
    """
    found = []
    for row in rows:
        if row["method"] in methods and not row.get("published"):
            found += [
                {**_judged_by("received", row), "method": f"{row['method']} as received"},
                # The merged model is not tuned to anybody.
                {
                    **_judged_by("trained", row),
                    "method": f"{row['method']} + fine-tuning",
                    "global": None,
                },
            ]
        else:
            found.append(row)
    return found


def _judged_by(kind: str, row: Row) -> Row:
    """The row as if this accuracy were the one that clients chose."""
    own = {f"personal_{m}": row[f"{KINDS[kind]}_{m}"] for m in _SPREADS}
    curve = [{**point, "chosen": point[kind]} for point in row["curve"]]
    by_client = row[f"{kind}_by_client"]
    rest = dict.fromkeys(_OF_CHOSEN)
    return {**row, **rest, **own, "curve": curve, "chosen_by_client": by_client}


_SPREADS = ("mean", "std", "worst_tenth", "weighted_mean")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises:
        ValueError: the file is not a list of rows with protocol and method.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as why:
        raise ValueError(f"{path} must be JSON, a list of rows: {why}") from why
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"protocol", "method"} <= row.keys() for row in rows
    ):
        raise ValueError(f"{path} must be a list of rows that have a protocol and a method each")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of rows, whole or not at all."""
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"[\n{lines}\n]\n" if lines else "[]\n")
