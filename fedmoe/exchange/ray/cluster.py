"""Ray itself: started on this machine, or reached where it runs; and what to ask of it."""

import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import ray

from fedmoe.exchange.actors import Actors, ActorsError


@contextmanager
def connected(actors: Actors) -> Iterator[None]:
    """Within it this process is connected with Ray; what was begun here ends with it.

    A connection that is there already serves, wherever it leads.

    Raises:
        ActorsError: no Ray answers at the address, or the GPUs of this machine do not suffice.
    """
    if ray.is_initialized():
        yield
        return
    before = _sigterm()
    try:
        if actors.address is None:
            _start(actors)
        else:
            _join(actors.address)
        if before is not None:  # Ray has put its own in its place, with a stack trace for everybody
            ends_ray = actors.address is None and before is signal.SIG_DFL
            signal.signal(signal.SIGTERM, _leave if ends_ray else before)
        yield
    finally:
        ray.shutdown()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def started(actors: Actors, groups: int = 1) -> Iterator[Actors]:
    """The same actors at an address where other processes of this machine find them.

    Without an address, a Ray that has room for as many `groups` of them is started.

    Raises:
        ActorsError: see `connected`.
    """
    if actors.address is not None:
        yield actors
        return
    with connected(replace(actors, count=actors.count * groups)):
        yield replace(actors, address=ray.get_runtime_context().gcs_address)


def resources() -> str:
    """What Ray has, and what of that is free, for messages."""
    whole = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return ", ".join(f"{free.get(n, 0):g} of {whole.get(n, 0):g} {n}s" for n in ("CPU", "GPU"))


def _sigterm() -> Any:
    """What SIGTERM does in this process; None where this thread may not change it."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.getsignal(signal.SIGTERM)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # so that contexts end, and what was started in them


def _start(actors: Actors) -> None:
    ray.init(
        address="local",
        num_cpus=max(1, math.ceil(actors.count * actors.cpus)),
        include_dashboard=False,
        **_quiet(),
    )
    wanted = actors.count * actors.gpus
    there = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if wanted > there:
        raise ActorsError(
            f"gpus must be at most {there / actors.count:g} for each of {actors.count} actors on "
            f"this machine, which has {there:g} GPUs, got {actors.gpus:g}"
        )


def _join(address: str) -> None:
    try:
        ray.init(address=address, **_quiet())
    except (ConnectionError, RuntimeError, ValueError) as why:
        raise ActorsError(f"no Ray answers at {address}: {why}") from why


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "configure_logging": False}
