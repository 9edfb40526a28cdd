"""FLAME's weights: an expert's copy counts by how often its client activated it.

FLAME, arXiv:2506.16600: in the average of expert j, client i's copy weighs (f_ij)^t * |D_i|, where
f_ij is how often j is activated on i's data, and t is 2 to 4. FLAME's other half, clients that run
fewer experts for a token and rescale the output, and its low-rank adapters are left out.
"""

from functools import partial

from fedmoe.federated.average import Weigh, by_examples, tokens_of
from fedmoe.types import ClientUpdate, ExpertId

SCALE = 2**12  # steps of a weight within one example: sums of weights must be whole numbers


def frequency_power(power: int) -> Weigh:
    """Examples times the share of the client's tokens that ran the expert, to this power.

    With power 0 it is `by_examples`. Otherwise weights are rounded to 1 / SCALE of an example, and
    to no less than that, so a copy that saw any token never counts nothing. The average of one
    expert takes at most 2**34 / SCALE in sum of examples times magnitude of a parameter: four
    million examples for parameters up to 1.

    Raises:
        ValueError: power is negative.
    """
    if power < 0:
        raise ValueError(f"power must be 0 or more, got {power}")
    if power == 0:
        return by_examples
    return partial(by_frequency, power)


def by_frequency(power: int, update: ClientUpdate, expert: ExpertId) -> int:
    """See `frequency_power`."""
    tokens = tokens_of(update.profile, expert)
    if not tokens:
        return 0
    frequency = tokens / int(update.profile.token_L[expert.layer])
    return max(1, round(SCALE * update.num_examples * frequency**power))
