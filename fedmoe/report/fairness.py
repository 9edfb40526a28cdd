"""What has to be said under a comparison of methods, and when none may be drawn.

Works from rows of results, so that a table made later from a file says the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedmoe.report.measures import Row, of_other_size, pools

LEAST_SEEDS = 3
CHANCE_MARGIN = 0.02  # above guessing by no more than this counts as guessing
MOST_NAMED = 8  # methods in one note
MATCHED = 0.10  # two methods hold equally many experts if they differ by at most this share


@dataclass(frozen=True)
class Note:
    """One line under a table."""

    text: str
    refuses: bool  # while this stands, no method is marked as better than another


def comparison_notes(rows: Sequence[Row]) -> list[Note]:
    """Every reason to doubt a comparison of these rows, those that refuse it first."""
    own = [r for r in rows if not r.get("published")]
    methods = list(dict.fromkeys(str(r["method"]) for r in own))
    notes = [*_unfinished(own), *_chance(own), *_unmeasured(own), *_controls(own), *_copied(rows)]
    if len(methods) > 1:
        notes += [
            *_seeds(own, methods),
            *_partitions(own),
            *_pools(own),
            *_one_off(own),
            *_matched(own, methods),
        ]
    return sorted(notes, key=lambda note: not note.refuses)


def refused(notes: Sequence[Note]) -> bool:
    """Whether these notes leave no comparison to draw."""
    return any(note.refuses for note in notes)


def _seeds(rows: Sequence[Row], methods: Sequence[str]) -> list[Note]:
    seeds = {m: {r["seed"] for r in rows if r["method"] == m} for m in methods}
    notes = []
    few = [f"{m} {len(s)}" for m, s in seeds.items() if len(s) < LEAST_SEEDS]
    if few:
        if len(few) > MOST_NAMED and len(few) == len(methods):
            few = [f"all {len(few)} methods"]
        text = f"Fewer than {LEAST_SEEDS} seeds ({', '.join(few)}): differences may be luck"
        notes.append(Note(f"{text}, so none is marked as best.", refuses=True))
    if len(set(map(frozenset, seeds.values()))) > 1:
        notes.append(Note("The methods ran with different seeds.", refuses=False))
    return notes


def _partitions(rows: Sequence[Row]) -> list[Note]:
    for seed in sorted({r["seed"] for r in rows}):
        if len({r["partition_hash"] for r in rows if r["seed"] == seed}) > 1:
            text = f"The data were partitioned differently for the same seed ({seed})"
            return [Note(f"{text}: these rows do not compare.", refuses=True)]
    return []


def _pools(rows: Sequence[Row]) -> list[Note]:
    others = of_other_size(rows)
    if not others:
        return []
    of = pools(rows)
    [usual] = {pool for method, pool in of.items() if method not in others}
    text = f"Methods marked § have other experts per layer than the usual {usual}: "
    text += ", ".join(f"{m} {of[m]}" for m in others)
    return [Note(f"{text}. None of them is marked as best.", refuses=False)]


def _one_off(rows: Sequence[Row]) -> list[Note]:
    missing = sorted(
        {str(r["method"]) for r in rows if r.get("rounds_exploring") and not r.get("bytes_once")}
    )
    if not missing:
        return []
    text = f"One-off bytes of exploring are missing ({', '.join(missing)})"
    return [Note(f"{text}: the traffic does not compare.", refuses=True)]


def _matched(rows: Sequence[Row], methods: Sequence[str]) -> list[Note]:
    held: dict[str, float] = {}
    others = of_other_size(rows)  # whose experts are of another kind
    for method in (m for m in methods if m not in others):
        means = [r.get("experts_held_mean") for r in rows if r["method"] == method]
        known = [float(m) for m in means if m is not None]
        if known:
            held[method] = sum(known) / len(known)
    alone = [
        f"{m} {n:.1f}"
        for m, n in held.items()
        if not any(o != m and abs(held[o] - n) <= MATCHED * max(held[o], n) for o in held)
    ]
    if len(held) < 2 or not alone:
        return []
    text = f"No other method holds about as many experts as {', '.join(alone)}"
    return [Note(f"{text}: part of a difference may be size.", refuses=False)]


def _chance(rows: Sequence[Row]) -> list[Note]:
    notes = []
    measures = (("global", "its merged model is"), ("personal_mean", "its clients' models are"))
    for method in dict.fromkeys(str(r["method"]) for r in rows):
        for key, subject in measures:
            low = [
                r
                for r in rows
                if r["method"] == method and r.get(key) is not None and r[key] <= _guessing(r)
            ]
            if low:
                percent = 100 * sum(r[key] for r in low) / len(low)
                text = f"{method}: {subject} at chance level ({percent:.1f} % with "
                text += f"{low[0]['num_classes']} classes); check its tuning before comparing."
                notes.append(Note(text, refuses=False))
    return notes


def _guessing(row: Row) -> float:
    """The highest accuracy that guessing may reach; -inf where the task has no classes."""
    classes, num_test = row.get("num_classes"), row.get("num_test")
    if not classes or not num_test:
        return -math.inf
    chance = 1 / int(classes)
    two_standard_errors = 2 * math.sqrt(chance * (1 - chance) / int(num_test))
    return chance + max(CHANCE_MARGIN, two_standard_errors)


def _unfinished(rows: Sequence[Row]) -> list[Note]:
    short = [
        f"{r['method']} seed {r['seed']}: {r['rounds_done']} of {r['rounds']}"
        for r in rows
        if r.get("rounds_done") is not None and r["rounds_done"] < r["rounds"]
    ]
    short += [
        f"{r['method']} seed {r['seed']}: no closing evaluation"
        for r in rows
        if r.get("closed") is False and r["rounds_done"] >= r["rounds"]
    ]
    if short:
        return [Note(f"Not all rounds are done ({'; '.join(short)}).", refuses=True)]
    if len({r["rounds"] for r in rows}) > 1:
        return [Note("The methods ran for different numbers of rounds.", refuses=False)]
    return []


def _unmeasured(rows: Sequence[Row]) -> list[Note]:
    partly = [
        f"{r['method']} seed {r['seed']}: {r['clients_evaluated']} of {r['num_clients']}"
        for r in rows
        if r.get("num_clients") and r["clients_evaluated"] < r["num_clients"]
    ]
    if not partly:
        return []
    return [Note(f"Not every client was measured at the end ({'; '.join(partly)}).", False)]


def _copied(rows: Sequence[Row]) -> list[Note]:
    if not any(r.get("published") for r in rows):
        return []
    text = "Rows marked † are published figures from another set-up"
    sources = dict.fromkeys(str(r["source"]) for r in rows if r.get("published") and "source" in r)
    told = f": {'; '.join(sources)}." if sources else "."
    return [Note(text + told, refuses=False)]


def _controls(rows: Sequence[Row]) -> list[Note]:
    if not any(r.get("control") for r in rows):
        return []
    text = "Rows marked ‡ are controls: they know what a server cannot know, or ignore limits."
    return [Note(text, refuses=False)]
