"""Is one method better than another? Differences over pairs, with 95 % t intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.report.log import Run
from fedmoe.report.measures import final_evaluation, result_row


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
    differences = []
    for a, b in _pairs(first, second):
        x, y = result_row(a, "")[measure], result_row(b, "")[measure]
        if x is not None and y is not None:
            differences.append(x - y)
    return _t_interval(differences, measure)


def paired_over_clients(first: Sequence[Run], second: Sequence[Run]) -> PairedDifference:
    """How much more accurate (chosen) the first method is, paired by seed and client.

    Clients of a run share a model, so this speaks of how clients differ, not of what
    another seed would give: for that, see `paired_over_seeds`.
    """
    differences = []
    for a, b in _pairs(first, second):
        one, other = final_evaluation(a), final_evaluation(b)
        if one and other:
            common = sorted(one.chosen.keys() & other.chosen.keys())
            differences += [one.chosen[c] - other.chosen[c] for c in common]
    return _t_interval(differences, "chosen accuracy")


def _pairs(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[Run, Run]]:
    by_seed = {run.info.seed: run for run in second}
    pairs = [(a, by_seed[a.info.seed]) for a in first if a.info.seed in by_seed]
    for a, b in pairs:
        if a.info.partition_hash != b.info.partition_hash:
            raise ValueError(
                f"a pair must share its partition, got {a.info.partition_hash} for "
                f"{a.info.method} and {b.info.partition_hash} for {b.info.method}, "
                f"seed {a.info.seed}"
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
