"""Reading JSON that others wrote: each value knows where it stands, so an error can say so."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass


class LogError(ValueError):
    """A run's files are not what the format says. The message names file, line and field."""


@dataclass(frozen=True)
class Value:
    """One JSON value with its place. Readers raise LogError where it is not of their kind."""

    value: object
    where: str  # "rounds.jsonl, line 3"
    field: str = ""  # "clients[2].id"; empty for the whole object

    def wrong(self, wanted: str) -> LogError:
        """The error to raise: what this field must be, and what it is."""
        name = f"field '{self.field}'" if self.field else "the line"
        return LogError(f"{self.where}: {name} must be {wanted}, got {_shorten(self.value)}")

    def get(self, name: str) -> Value:
        """The field `name` of an object, which must have it."""
        inner = self.find(name)
        if inner is None:
            raise LogError(f"{self.where}: field '{self._path(name)}' is missing")
        return inner

    def find(self, name: str) -> Value | None:
        """The field `name` of an object, or None where the object does not have it."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        if name not in self.value:
            return None
        return Value(self.value[name], self.where, self._path(name))

    def items(self) -> Iterator[tuple[str, Value]]:
        """The names and values of an object."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        for name, inner in self.value.items():
            yield name, Value(inner, self.where, self._path(name))

    def client_items(self) -> Iterator[tuple[int, Value]]:
        """The values of an object whose names are client numbers."""
        for name, inner in self.items():
            if not name.isdecimal():
                raise LogError(
                    f"{self.where}: field '{self.field}' must be keyed by client numbers, "
                    f"got the key {_shorten(name)}"
                )
            yield int(name), inner

    def list(self) -> Iterator[Value]:
        """The entries of a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        for position, inner in enumerate(self.value):
            yield Value(inner, self.where, f"{self.field}[{position}]")

    def is_null(self) -> bool:
        return self.value is None

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("a string")
        return self.value

    def one_of(self, choices: tuple[str, ...]) -> str:
        if self.value not in choices:
            raise self.wrong("one of " + ", ".join(f"'{c}'" for c in choices))
        return str(self.value)

    def count(self, least: int = 0) -> int:
        """A whole number, at least `least`."""
        # bool is an int to Python; to a reader of the log it is a mistake
        if type(self.value) is not int or self.value < least:
            raise self.wrong(f"a whole number of at least {least}")
        return self.value

    def counts(self) -> tuple[int, ...]:
        """A list of whole numbers, none negative."""
        if not isinstance(self.value, list):
            raise self.wrong("a list of whole numbers")
        # In one go: a log holds hundreds of thousands of these.
        if not all(type(v) is int and v >= 0 for v in self.value):
            raise self.wrong("a list of whole numbers of at least 0")
        return tuple(self.value)

    def whole(self) -> int:
        """A whole number of either sign."""
        if type(self.value) is not int:
            raise self.wrong("a whole number")
        return self.value

    def number(self) -> float:
        """A finite number."""
        value = self.value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self.wrong("a finite number")
        return float(value)

    def share(self) -> float:
        """A number from 0 to 1."""
        number = self.number()
        if not 0.0 <= number <= 1.0:
            raise self.wrong("a share from 0 to 1")
        return number

    def _path(self, name: str) -> str:
        return f"{self.field}.{name}" if self.field else name


def parse(text: str, where: str) -> Value:
    """The one JSON object in `text`.

    Raises:
        LogError: `text` is not one JSON object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise LogError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, dict):
        raise LogError(f"{where}: must be an object, got {_shorten(value)}")
    return Value(value, where)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
