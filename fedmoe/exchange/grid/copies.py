"""Copies of messages that share no record with the original, and yet no bytes are copied."""

from typing import Any, TypeVar

from flwr.app import ArrayRecord, Message, Metadata, RecordDict

T = TypeVar("T")


def copy_of(content: RecordDict) -> RecordDict:
    """The same records, each a new one; an array's bytes, which nobody can change, are shared."""
    made = content.copy()
    records = _inside(made)
    for name, record in records.items():
        records[name] = twin = record.copy()
        values = _inside(twin)
        if isinstance(twin, ArrayRecord):
            for key, array in values.items():
                values[key] = _twin(array)
        else:
            for key, value in values.items():
                if isinstance(value, list):
                    values[key] = value.copy()
    return made


def _inside(record: object) -> dict[str, Any]:
    """The dict that a record of Flower's wraps: what comes from a record needs no check again, and
    its checks would take most of the time."""
    inside: dict[str, Any] = vars(record)["_data"]
    return inside


def copied(message: Message) -> Message:
    """A message as one gets it that has travelled."""
    made = bare(message)
    if message.has_content():
        vars(made)["_content"] = copy_of(message.content)
    return made


def bare(message: Message) -> Message:
    """With metadata of its own, and the same content."""
    made = _twin(message)
    vars(made)["_metadata"] = _twin(message.metadata)  # which nothing public sets
    return made


def _twin(thing: T) -> T:
    """A new one with the same attributes."""
    made = object.__new__(type(thing))
    vars(made).update(vars(thing))
    return made


def made_of(metadata: Metadata, content: object = None, error: object = None) -> Message:
    """A message from its parts. Flower's constructor takes them, though it is not declared to."""
    return Message(metadata=metadata, content=content, error=error)  # type: ignore[call-overload,no-any-return]
