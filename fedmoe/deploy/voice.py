"""How a server or client tells what happens: lines to read, or JSON lines to be collected."""

import datetime
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

Fact = str | int | float | bool | None
STYLES = {"info": "", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Voice:
    """Speaks on stderr."""

    console: Console
    json: bool = False
    quiet: bool = False  # says only what is wrong

    def say(
        self,
        event: str,
        text: str,
        facts: Mapping[str, Fact] | None = None,
        *,
        level: str = "info",
    ) -> None:
        """Tell of an event: `text` to a reader, `facts` to a program."""
        if self.json:
            now = datetime.datetime.now(datetime.UTC)
            line = {
                "time": now.isoformat(timespec="milliseconds"),
                "level": level,
                "event": event,
                "message": text,
                **{name: _finite(value) for name, value in (facts or {}).items()},
            }
            print(json.dumps(line, allow_nan=False), file=sys.stderr, flush=True)
        elif level != "info" or not self.quiet:
            mark = "" if level == "info" else "! "
            self.console.print(Text(f"{mark}{text}", STYLES[level]), soft_wrap=True)


def _finite(value: Fact) -> Fact:
    return None if isinstance(value, float) and not math.isfinite(value) else value
