"""How many processes share the clients' work, and where: said without Ray, which may be missing."""

import math
import os
import secrets
import sys
from dataclasses import dataclass


class ActorsError(RuntimeError):
    """Work that no actor could do; says which actor and which clients, and why."""


@dataclass(frozen=True)
class Actors:
    """Processes that stay, each with one thread that computes; see `fedmoe.exchange.ray`.

    Attributes:
        address: of a Ray that runs, as `ray.init` takes it, such as ray://10.0.0.1:10001; None:
            one is started on this machine, and ends with the work.
        cpus: of Ray's CPUs that each takes.
        gpus: of Ray's GPUs that each takes: 0.25 lets four share one. Clients train there then.
    """

    count: int = 2
    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1 actor, got {self.count}")
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of 0 or more, got {value}")
            if value > 1 and value != int(value):
                raise ValueError(f"{name} must be whole where it is above 1, got {value}")


def keep_strangers_out() -> None:
    """Let a Ray that is started here listen only to this process and those that it starts.

    It listens on all of a machine's addresses, and does what it is told. To be called before Ray
    is imported, for it reads this once; not where another Ray is to be joined, which may know no
    token. What the user has decided (RAY_AUTH_MODE) stays.
    """
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
