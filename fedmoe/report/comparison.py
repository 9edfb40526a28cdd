"""Methods compared on each protocol, from rows of results alone: the table, what it takes to reach
a common target, and paired differences.

The target of a protocol is a share of the best method's accuracy at the end; controls, and methods
of another size, set none. Accuracies are the chosen ones, from 0 to 1, unless said otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedmoe.report.fairness import comparison_notes
from fedmoe.report.measures import Row, aggregate_rows
from fedmoe.report.paired import PairedDifference, rows_over_clients, rows_over_seeds
from fedmoe.report.tables import COLUMNS, Better, Column, Unit, markdown_table

TARGET_SHARE = 0.95

WEIGHTED = Column(
    "personal_weighted_mean",
    "Weighted %",
    Unit.SHARE,
    Better.HIGH,
    "as personal, but a client counts by its test examples",
)
TO_TARGET = Column(
    "bytes_to_target",
    "To target MiB",
    Unit.BYTES,
    Better.LOW,
    "traffic until the first evaluation at or above the target",
)


def _with_more(columns: Sequence[Column]) -> tuple[Column, ...]:
    """The usual columns, with one more behind those that they belong to."""
    behind = {"accuracy_trained_mean": WEIGHTED, "bytes_total": TO_TARGET}
    return tuple(c for own in columns for c in (own, behind.get(own.key)) if c is not None)


COMPARED = _with_more(COLUMNS)


@dataclass(frozen=True)
class Target:
    """The accuracy that all methods of a protocol are asked how soon they reach it."""

    accuracy: float
    best: float  # accuracy at the end of the best method, mean over its seeds
    best_method: str


@dataclass(frozen=True)
class Lead:
    """How far the reference is ahead of a method; without differences where none may be drawn."""

    method: str
    control: bool
    over_seeds: PairedDifference | None
    over_clients: PairedDifference | None
    why_not: str = ""
    mark: str = ""


def by_protocol(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each protocol, in the order in which they come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["protocol"], []).append(row)
    return found


def target_of(rows: Sequence[Row], share: float = TARGET_SHARE) -> Target | None:
    """The target of one protocol; None where no method has an accuracy.

    Raises:
        ValueError: share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    ends = {
        m.method: m.values["personal_mean"].mean
        for m in aggregate_rows(rows)
        if m.competes and "personal_mean" in m.values
    }
    if not ends:
        return None
    best = max(ends, key=lambda method: ends[method])
    return Target(share * ends[best], ends[best], best)


def bytes_to(row: Row, accuracy: float) -> int | None:
    """Traffic until a run's first evaluation at or above `accuracy`; None if there is none."""
    for point in row.get("curve", ()):
        if point["chosen"] is not None and point["chosen"] >= accuracy:
            return int(point["bytes"])
    return None


def with_target(rows: Sequence[Row], target: Target | None) -> list[Row]:
    """The rows with `bytes_to_target`; a method gets there only if all its seeds do."""
    if target is None:
        return list(rows)
    return [{**row, "bytes_to_target": bytes_to(row, target.accuracy)} for row in rows]


def leads(rows: Sequence[Row], reference: str) -> list[Lead]:
    """How far `reference` is ahead of every other method of one protocol, controls last.

    None is drawn where something about the two methods forbids to compare them.
    """
    methods = [m for m in aggregate_rows(rows) if not m.published and m.method != reference]
    own = [row for row in rows if row["method"] == reference and not row.get("published")]
    if not own:
        return []
    found = []
    for m in sorted(methods, key=lambda m: m.control):
        others = [r for r in rows if r["method"] == m.method and not r.get("published")]
        reasons = [note.text for note in comparison_notes([*own, *others]) if note.refuses]
        if reasons:
            found.append(Lead(m.method, m.control, None, None, reasons[0], m.mark))
            continue
        try:
            pairs = rows_over_seeds(own, others), rows_over_clients(own, others)
        except ValueError as why:
            found.append(Lead(m.method, m.control, None, None, f"{why}.", m.mark))
        else:
            found.append(Lead(m.method, m.control, *pairs, mark=m.mark))
    return found


def comparison_markdown(rows: Sequence[Row], reference: str) -> str:
    """A section for each protocol: its facts, the table, the target, and the leads."""
    sections = []
    for protocol, own in by_protocol(rows).items():
        target = target_of(own)
        parts = [f"## {protocol}", facts(own)]
        parts.append(markdown_table(with_target(own, target), COMPARED).rstrip())
        if target is not None:
            parts.append(
                f"{target_text(target, own)} '-' under To target: a seed never got there."
            )
        ahead = leads(own, reference)
        if any(lead.over_seeds for lead in ahead):  # else the notes say why there is none
            parts.append(leads_table(ahead, reference))
        sections.append("\n\n".join(parts))
    return "\n\n\n".join(sections) + "\n"


def facts(rows: Sequence[Row]) -> str:
    """Clients, rounds and partitions of one protocol's rows, in a sentence."""
    own = [row for row in rows if not row.get("published")]
    if not own:
        return "Published figures alone."
    clients = _from_to(row["num_clients"] for row in own)
    rounds = _from_to(row["rounds"] for row in own)
    hashes: dict[str, set[int]] = {}
    for row in own:
        hashes.setdefault(row["partition_hash"], set()).add(row["seed"])
    partitions = ", ".join(
        f"`{name}` (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))})"
        for name, seeds in hashes.items()
    )
    return f"{clients} clients, {rounds} rounds. Partition {partitions}."


def target_text(target: Target, rows: Sequence[Row]) -> str:
    """What the target is and when it was looked for, in a sentence or two."""
    own = [row for row in rows if not row.get("published")]
    looked = sorted({point["round"] for row in own for point in row.get("curve", ())})
    return (
        f"Target: {100 * target.accuracy:.1f} %, {100 * target.accuracy / target.best:.0f} % of "
        f"what the best method, {target.best_method}, has at the end ({100 * target.best:.1f} %). "
        f"Methods were evaluated after {_listed(looked)} rounds."
    )


def leads_table(ahead: Sequence[Lead], reference: str) -> str:
    lines = [
        f"| {reference} less | points | 95 % over seeds | 95 % over clients | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    for lead in ahead:
        name = lead.method.replace("|", "\\|") + lead.mark
        if lead.over_seeds is None or lead.over_clients is None:
            continue
        seeds = lead.over_seeds
        points = f"{100 * seeds.mean:+.2f}"
        if seeds.low is not None and seeds.high is not None and seeds.low * seeds.high > 0:
            points = f"**{points}**"
        cells = [points, _interval(seeds), _interval(lead.over_clients), str(seeds.num_pairs)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *_refusals(ahead)])


def _refusals(ahead: Sequence[Lead]) -> list[str]:
    """A line for each reason why there is no difference, with the methods it holds for."""
    of_reason: dict[str, list[Lead]] = {}
    for lead in ahead:
        if lead.why_not:
            # A reason names its method, in brackets; without that it may be another's too.
            of_reason.setdefault(re.sub(r" \([^)]*\)", "", lead.why_not), []).append(lead)
    lines = []
    for reason, of in of_reason.items():
        why = of[0].why_not if len(of) == 1 else reason
        lines.append(f"- No difference to {', '.join(lead.method for lead in of)}: {why}")
    return ["", *lines] if lines else []


def _interval(d: PairedDifference) -> str:
    if d.low is None or d.high is None:
        return "-"
    return f"{100 * d.low:+.2f} to {100 * d.high:+.2f}"


def _from_to(values: Iterable[int]) -> str:
    low, *_, high = [*sorted(set(values))] * 2
    return str(low) if low == high else f"{low} to {high}"


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last
