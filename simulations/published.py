"""Figures that others have published in a setting that ours has too, as rows of results.

They were measured elsewhere, with other partitions, rates and code, and after many more rounds:
context for the shape of our own table, and nothing to be ahead of or behind.
"""

from collections.abc import Mapping

from fedmoe.report.measures import Row

# PFLlib's leaderboard (JMLR 26(50), 2025), Fashion-MNIST: per cent and its deviation over trials.
LEADERBOARD: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "FedAvg": ((80.41, 0.08), (85.85, 0.19)),
    "FedProx": ((78.08, 0.15), (85.63, 0.57)),
    "FedPer": ((99.47, 0.03), (97.44, 0.06)),
    "FedRep": ((99.56, 0.03), (97.56, 0.04)),
    "Ditto": ((99.44, 0.06), (97.47, 0.04)),
    "APFL": ((99.41, 0.02), (97.25, 0.08)),
    "FedCP": ((99.66, 0.04), (97.89, 0.05)),
    "GPFL": ((99.85, 0.08), (97.81, 0.09)),
}
PARTITIONS = ("pathological", "dirichlet")  # in the order of the figures above
ROUNDS, TRIALS = 2000, 3
SOURCE = (
    f"PFLlib's leaderboard (JMLR 26(50), 2025), {ROUNDS} rounds at rate 0.005, {TRIALS} trials, "
    f"best round, mean over all test images, so under Weighted: of the one model for FedAvg and "
    f"FedProx, of personal models otherwise; it has no local training. Another cut of the data "
    f"than ours: tenths of a point are no difference"
)


def leaderboard_rows(protocols: Mapping[str, str]) -> list[Row]:
    """The leaderboard's rows for each of these partitions, under our name of the protocol."""
    return [
        {
            "protocol": protocol,
            "method": f"{method} ({ROUNDS} rounds)",
            "published": True,
            "source": SOURCE,
            "rounds": ROUNDS,
            "num_trials": TRIALS,
            "personal_weighted_mean": round(figures[PARTITIONS.index(partition)][0] / 100, 6),
            "std_over_trials": round(figures[PARTITIONS.index(partition)][1] / 100, 6),
        }
        for partition, protocol in protocols.items()
        for method, figures in LEADERBOARD.items()
    ]
