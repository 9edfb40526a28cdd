"""SIGTERM as an exception, so that what was started is ended on the way out."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TerminatedError(Exception):
    """SIGTERM came."""


@contextmanager
def terminated_is_stopped() -> Iterator[None]:
    """Within it SIGTERM raises TerminatedError in the main thread."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
