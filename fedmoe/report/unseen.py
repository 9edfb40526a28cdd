"""Clients who come after the run: how good what they are served is, and what it costs them.

The keys that a run with such clients adds to its row of results:

    unseen_mean, _std, _worst_tenth   over them, of the accuracy on their own test part, of the
                                      model as it came
    unseen_full_mean                  the same models on examples of every label
    unseen_bytes_mean                 what one of them receives and sends
    unseen_by_client                  {"30": 0.8125, ...}
    unseen_NAME_mean                  of any other NAME that the method measured, such as
                                      weighted_test

Their traffic is of a time after the run and no part of `bytes_total`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmoe.report.comparison import by_protocol, facts, leads, leads_table
from fedmoe.report.log import Run
from fedmoe.report.measures import Row, over_clients
from fedmoe.report.tables import Better, Column, Unit, markdown_table

SERVED, FULL = "served_test", "full_test"
BYTES = ("bytes_down", "bytes_up")

COLUMNS = (
    Column(
        "unseen_mean",
        "Unseen %",
        Unit.SHARE,
        Better.HIGH,
        "mean over the clients that came afterwards, on their own test parts",
    ),
    Column("unseen_std", "Std %", Unit.SHARE, Better.NEITHER, "standard deviation over them"),
    Column(
        "unseen_worst_tenth",
        "Worst tenth %",
        Unit.SHARE,
        Better.HIGH,
        "mean of the tenth of them that is worst off",
    ),
    Column(
        "unseen_full_mean",
        "All labels %",
        Unit.SHARE,
        Better.NEITHER,
        "the same models on images of every label, of which a client has a few: no aim",
    ),
    Column(
        "unseen_weighted_test_mean",
        "Weighted %",
        Unit.SHARE,
        Better.NEITHER,
        "as unseen, all experts of a client weighed by the gate in place of the best alone",
    ),
    Column(
        "unseen_oracle_test_mean",
        "Oracle %",
        Unit.SHARE,
        Better.NEITHER,
        "share of examples that some expert of the client gets right: what no gate can pass",
    ),
    Column(
        "unseen_gate_hit_mean",
        "Gate hits %",
        Unit.SHARE,
        Better.NEITHER,
        "share of examples for which the gate's expert is the client's expert of least loss",
    ),
    Column(
        "unseen_bytes_mean",
        "Each MiB",
        Unit.BYTES,
        Better.LOW,
        "received and sent by one of them",
    ),
    Column(
        "accuracy_received_mean",
        "Trained with %",
        Unit.SHARE,
        Better.NEITHER,
        "mean over the clients that did train, of the model as they received it",
    ),
    Column(
        "bytes_total",
        "Training MiB",
        Unit.BYTES,
        Better.LOW,
        "all that was sent in training, up and down, all clients, with one-off costs",
    ),
    Column("seconds", "Seconds", Unit.SECONDS, Better.NEITHER, "wall time of the whole run"),
)


def unseen_measures(run: Run) -> Row:
    """The keys for a run's row; none where it served nobody."""
    served = run.rounds[-1].unseen if run.rounds else {}
    if not served:
        return {}
    spread = over_clients(_of(served, SERVED))
    names = {name for metrics in served.values() for name in metrics} - {SERVED, FULL, *BYTES}
    row: Row = {
        "unseen_mean": spread.mean,
        "unseen_std": spread.std,
        "unseen_worst_tenth": spread.worst_tenth,
        "unseen_bytes_mean": sum(m[b] for m in served.values() for b in BYTES) / len(served),
        "unseen_by_client": {str(c): round(m[SERVED], 4) for c, m in sorted(served.items())},
        "unseen_full_mean": _mean(served, FULL),
    }
    return row | {f"unseen_{name}_mean": _mean(served, name) for name in sorted(names)}


def _of(served: Mapping[int, Mapping[str, float]], name: str) -> dict[int, float]:
    return {c: metrics[name] for c, metrics in served.items() if name in metrics}


def _mean(served: Mapping[int, Mapping[str, float]], name: str) -> float | None:
    values = _of(served, name)
    return over_clients(values).mean if values else None


def unseen_markdown(rows: Sequence[Row], reference: str) -> str:
    """A section for each protocol: its facts, the table, and how far `reference` leads."""
    sections = []
    for protocol, own in by_protocol(rows).items():
        parts = [f"## {protocol}", facts(own), markdown_table(judged(own), COLUMNS).rstrip()]
        if ahead := leads(judged(own), reference):
            parts.append(leads_table(ahead, reference))
        sections.append("\n\n".join(parts))
    return "\n\n\n".join(sections) + "\n"


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows as if the accuracy on clients who came afterwards were the one to compare.

    How many experts there are and who holds how many is no longer told: here models of one expert
    stand beside models of several, and what that costs a client is in the bytes.
    """
    of_pools = ("num_experts_L", "experts_held_mean")
    return [
        {
            **row,
            **dict.fromkeys(of_pools),
            "personal_mean": row["unseen_mean"],
            "personal_worst_tenth": row["unseen_worst_tenth"],
            "chosen_by_client": row["unseen_by_client"],
        }
        for row in rows
        if "unseen_mean" in row
    ]
