"""What can go wrong, said in one paragraph on stderr and in an exit code that scripts can trust.

0 done; 1 something ran and failed; 2 bad usage or input; 130 stopped by Ctrl-C, 143 by SIGTERM.
With FEDMOE_TRACEBACK=1 the traceback comes too.
"""

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator

import typer
from rich.text import Text

from fedmoe.cli.words import console

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
VARIABLE = "FEDMOE_TRACEBACK"
# What the library raises for what its caller gave it.
BAD_INPUT_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


class CommandError(Exception):
    """The end of a command: what is wrong and how to mend it, and the exit code."""

    def __init__(self, text: str, code: int = BAD_INPUT) -> None:
        super().__init__(text)
        self.code = code


@contextlib.contextmanager
def explained(
    command: str, program: str = "fedmoe", tell: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Turn whatever is raised into a paragraph and an exit code.

    Args:
        tell: says the paragraph, in place of a line on stderr.
    """
    name = f"{program} {command}".strip()
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read our output has gone; there is nobody to tell
    except CommandError as why:
        _end(name, str(why), why.code, tell)
    except KeyboardInterrupt:
        _end(name, "stopped", INTERRUPTED, tell)
    except BAD_INPUT_ERRORS as why:
        _end(name, reason(why), BAD_INPUT, tell)
    except typer.Exit:
        raise
    except Exception as why:
        _end(
            name,
            f"{type(why).__name__}: {reason(why)}. This is a fault in the code, not in what you "
            f"typed; {VARIABLE}=1 shows where.",
            FAILED,
            tell,
        )


def reason(why: BaseException) -> str:
    """An error's text, for a reader who did not write the code."""
    if isinstance(why, OSError) and why.strerror and why.filename:
        return f"{why.filename}: {why.strerror}"
    if isinstance(why, KeyError):
        return f"{why} is missing"
    return str(why) or "no reason given"


def _end(name: str, text: str, code: int, tell: Callable[[str], None] | None) -> None:
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        traceback.print_exc()
    if tell is not None:
        tell(text)
        raise typer.Exit(code)
    # A terminal gets lines that end between words; a file gets the paragraph as one line.
    err = console(stderr=True)
    line = Text.assemble((f"{name}: ", "bold red"), text)
    err.print(line, soft_wrap=not err.is_terminal)
    raise typer.Exit(code)
