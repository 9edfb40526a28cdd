"""How the command line talks: consoles, sizes, durations, and JSON that stands alone on stdout."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
PIPE_COLUMNS = 120  # a file has no width of its own


def console(*, stderr: bool = False) -> Console:
    """For results (stdout) or for everything else (stderr)."""
    stream = sys.stderr if stderr else sys.stdout
    known = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, highlight=False, width=None if known else PIPE_COLUMNS)


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves at least 1, with three digits."""
    value = float(num_bytes)
    for unit in UNITS:
        if abs(value) < 1024 or unit == UNITS[-1]:
            break
        value /= 1024
    if unit == "B":
        return f"{value:.0f} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """20 ms, 0.3 s, 41 s, 2:05 (minutes), 1:02:05 (hours)."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def plain_table(padding: int = 2) -> Table:
    """Columns without lines between them, as all tables here."""
    return Table(box=None, header_style="dim", padding=(0, padding, 0, 0), pad_edge=False)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(([", ".join(names[:-1])] if len(names) > 1 else []) + list(names[-1:]))


def write_json(value: object) -> None:
    """The one JSON value of a command; a number that is not finite becomes null."""
    sys.stdout.write(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def nothing_on_stdout(wanted: bool = True) -> Iterator[None]:
    """Whatever is printed meanwhile, by child processes too, goes to stderr."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
