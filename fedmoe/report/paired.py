"""Is one method better than another? Differences over pairs, with 95 % t intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.report.log import Run
from fedmoe.report.measures import Row, final_evaluation, result_row


@dataclass(frozen=True)
class PairedDifference:
    """Mean of (first - second) over pairs, with its 95 % t interval; None from one pair."""

    mean: float
    low: float | None
    high: float | None
    num_pairs: int


def paired_over_seeds(
    first: Sequence[Run], second: Sequence[Run], measure: str = "personal_mean"
) -> PairedDifference:
    """How much more of a `result_row` measure the first method has, paired by seed.

    Raises:
        ValueError: no common seed has the measure, or a pair has different partitions.
    """
    rows, others = ([result_row(run, "") for run in runs] for runs in (first, second))
    return rows_over_seeds(rows, others, measure)


def rows_over_seeds(
    first: Sequence[Row], second: Sequence[Row], measure: str = "personal_mean"
) -> PairedDifference:
    """As `paired_over_seeds`, from rows of results."""
    pairs = [(a[measure], b[measure]) for a, b in _pairs(first, second)]
    return _t_interval([x - y for x, y in pairs if x is not None and y is not None], measure)


def paired_over_clients(first: Sequence[Run], second: Sequence[Run]) -> PairedDifference:
    """How much more accurate (chosen) the first method is, paired by seed and client.

    Clients of a run share a model, so this speaks of how clients differ, not of what
    another seed would give: for that, see `paired_over_seeds`.
    """

    def rows(runs: Sequence[Run]) -> list[Row]:
        finals = [(result_row(run, ""), final_evaluation(run)) for run in runs]
        return [{**row, "chosen_by_client": e.chosen if e else {}} for row, e in finals]

    return rows_over_clients(rows(first), rows(second))


def rows_over_clients(first: Sequence[Row], second: Sequence[Row]) -> PairedDifference:
    """As `paired_over_clients`, from rows with `chosen_by_client`."""
    differences = []
    for a, b in _pairs(first, second):
        one, other = a["chosen_by_client"], b["chosen_by_client"]
        differences += [one[c] - other[c] for c in sorted(one.keys() & other.keys())]
    return _t_interval(differences, "chosen accuracy")


def _pairs(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row, Row]]:
    by_seed = {row["seed"]: row for row in second}
    pairs = [(a, by_seed[a["seed"]]) for a in first if a["seed"] in by_seed]
    for a, b in pairs:
        if a["partition_hash"] != b["partition_hash"]:
            raise ValueError(
                f"a pair must share its partition, got {a['partition_hash']} for "
                f"{a['method']} and {b['partition_hash']} for {b['method']}, seed {a['seed']}"
            )
    return pairs


def _t_interval(differences: Sequence[float], measure: str) -> PairedDifference:
    if not differences:
        raise ValueError(f"the two methods must share a seed that measured {measure}, got none")
    array = np.array(differences, dtype=np.float64)
    mean, n = float(array.mean()), len(array)
    if n == 1:
        return PairedDifference(mean, None, None, 1)
    half = t_95(n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return PairedDifference(mean, mean - half, mean + half, n)


# Two-sided 95 % points of Student's t: degrees of freedom 1 to 30, then a few to interpolate.
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_T_95_INVERSE_DF = (0.0, 1 / 120, 1 / 60, 1 / 40, 1 / 30)
_T_95_FAR = (1.960, 1.980, 2.000, 2.021, 2.042)


def t_95(degrees_of_freedom: int) -> float:
    """The two-sided 95 % point of Student's t, right to three digits."""
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom must be at least 1, got {degrees_of_freedom}")
    if degrees_of_freedom <= len(_T_95):
        return _T_95[degrees_of_freedom - 1]
    # t is close to linear in 1 / df out there.
    return float(np.interp(1 / degrees_of_freedom, _T_95_INVERSE_DF, _T_95_FAR))
