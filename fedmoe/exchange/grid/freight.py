"""Messages as bytes for another process, in which each large value stands once.

A large value is the `bytes` of an array, or of a ConfigRecord. It is taken out of the pickled
messages and goes beside them, by a key: so it is put into Ray's store once, however many messages
carry it, and is not copied into each call.
"""

import io
import pickle
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

LARGE = 2**16  # bytes from which on a value goes by itself
PROBE = 64  # bytes that are compared first, at three places
MOST_ALIKE = 4  # values of the same probe that are compared in full

R = TypeVar("R")


def packed(parts: object, key_of: Callable[[bytes], Hashable]) -> bytes:
    """Pickle, but for large values, of which `key_of` takes care."""
    stream = io.BytesIO()
    _Pickler(stream, key_of).dump(parts)
    return stream.getvalue()


def unpacked(head: bytes, value_of: Callable[[Any], bytes]) -> Any:
    """What `packed` was given; `value_of` has the values by their keys."""
    return _Unpickler(io.BytesIO(head), value_of).load()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, key_of: Callable[[bytes], Hashable]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._key_of = key_of

    def persistent_id(self, value: object) -> Hashable:
        # Keys are never None, which stands for "pickle it".
        return self._key_of(value) if type(value) is bytes and len(value) >= LARGE else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, value_of: Callable[[Any], bytes]) -> None:
        super().__init__(stream)
        self._value_of = value_of

    def persistent_load(self, key: Any) -> bytes:
        return self._value_of(key)


@dataclass(frozen=True, eq=False)
class Stored(Generic[R]):
    """A value, and where it is stored."""

    data: bytes
    ref: R


@dataclass
class Store(Generic[R]):
    """Values that were put lately, found again by identity, else by content.

    A strategy may build its arrays anew for every node, or in every round. A value with the length
    and the probe of one that is here is compared with it, which takes a tenth of storing it again.
    """

    put: Callable[[bytes], R]
    _stored: dict[int, Stored[R]] = field(default_factory=dict)
    _by_id: dict[int, int] = field(default_factory=dict)
    _alike: dict[tuple[int, bytes, bytes, bytes], list[int]] = field(default_factory=dict)
    _twins: list[bytes] = field(default_factory=list)  # other values of the same content
    _used: set[int] = field(default_factory=set)
    _count: int = 0

    def key_of(self, data: bytes) -> int:
        """Its key, under which it is stored from now on."""
        key = self._by_id.get(id(data))
        if key is None:
            key = self._same(data)
            if key is None:
                key = self._count
                self._count += 1
                self._stored[key] = Stored(data, self.put(data))
                self._alike.setdefault(_probe(data), []).append(key)
            else:
                # It stays alive as long as its id is known, or another could get the same.
                self._twins.append(data)
            self._by_id[id(data)] = key
        self._used.add(key)
        return key

    def __getitem__(self, key: int) -> Stored[R]:
        return self._stored[key]

    def turn_over(self) -> None:
        """Let go of all that was not used since the last time."""
        for key in self._stored.keys() - self._used:
            data = self._stored.pop(key).data
            del self._by_id[id(data)]
            probe = _probe(data)
            self._alike[probe].remove(key)
            if not self._alike[probe]:
                del self._alike[probe]
        for data in self._twins:
            self._by_id.pop(id(data), None)
        self._twins.clear()
        self._used.clear()

    def _same(self, data: bytes) -> int | None:
        alike = self._alike.get(_probe(data), [])[-MOST_ALIKE:]
        return next((key for key in alike if self._stored[key].data == data), None)


def _probe(data: bytes) -> tuple[int, bytes, bytes, bytes]:
    middle = len(data) // 2
    return len(data), data[:PROBE], data[middle : middle + PROBE], data[-PROBE:]
