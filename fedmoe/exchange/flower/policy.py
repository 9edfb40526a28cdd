"""For how long a round waits, for whom, and how many answers it needs."""

from dataclasses import dataclass


class QuorumError(RuntimeError):
    """Too few clients answered in a round that changes the model; says how many were to."""


@dataclass(frozen=True)
class RoundPolicy:
    """For how long a round waits, and for whom.

    Without a deadline a round waits for every client, also for one that has gone away, until it
    has answered or failed. `enough` below 1 ends a round once that share has answered: for rounds
    that ask more clients than they need. The result then depends on who was quick.
    """

    deadline_s: float | None = None  # of one round's messages; None: none
    quorum: float = 0.5  # share of the clients asked that must answer for the run to go on
    enough: float = 1.0  # share of the clients asked after whose answers the round ends
    retries: int = 3  # how often work is asked for again where a client's process broke
    retry_s: float = 1.0  # before the first of them; twice as long before each other
    absent_s: float = 120.0  # of waiting for who is away and would only evaluate

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(
                f"deadline_s must be above 0 seconds, or None for none, got {self.deadline_s}"
            )
        if not 0 <= self.quorum <= 1:
            raise ValueError(f"quorum must be between 0 and 1, got {self.quorum}")
        if not self.quorum <= self.enough <= 1:
            raise ValueError(
                f"enough must be between quorum ({self.quorum}) and 1, got {self.enough}"
            )
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, got {self.retries}")


PATIENT = RoundPolicy()
