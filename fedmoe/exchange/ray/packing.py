"""Objects as a short pickle and the bytes of their tensors, which many messages may share.

Ray's own way writes every tensor into the pickle. Here a tensor is where its bytes are: in a
volume of Ray's object store, which all actors of a machine read without a copy, or in the body of
the one message that it belongs to. Tensors that are the same object stay one.
"""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import numpy as np
import torch
from ray.cloudpickle import CloudPickler
from torch import Tensor

ALIGN = 64  # bytes; torch's own tensors begin so, and products of matrices may round by it
VOLUME_BYTES = 2**26  # a volume is closed when it has as much

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Place = tuple[int, int, int]  # of some bytes: the volume, where in it they begin, how many


@dataclass(frozen=True)
class Slip:
    """An object without the bytes of its tensors, and where those are."""

    head: bytes
    places: Sequence[Place]

    @property
    def volumes(self) -> set[int]:
        return {volume for volume, _, _ in self.places}

    def read(self, volumes: Mapping[int, Bytes], copy: bool = False) -> Any:
        """The object. Without `copy` its tensors are the volumes' own memory: not to be written."""
        views = {volume: volumes[volume].data for volume in self.volumes}
        parts = (views[volume][at : at + length] for volume, at, length in self.places)
        return pickle.loads(self.head, buffers=map(bytearray, parts) if copy else parts)


@dataclass
class Shelf:
    """Tensors of one round, each distinct one put away once.

    `put` takes a volume's bytes away and returns what to call it by. Whatever was put on the
    shelf must not change while the shelf is in use.
    """

    put: Callable[[Bytes], Any]
    volumes: list[Any] = field(default_factory=list)  # as `put` called them
    _places: dict[int, tuple[Place, Tensor]] = field(default_factory=dict)  # by the tensor's id

    def slip(self, thing: object) -> Slip:
        """`thing` as a slip, once all of its tensors are in volumes."""
        new = _Layout(len(self.volumes))

        def place_of(tensor: Tensor) -> Place:
            if id(tensor) not in self._places:
                if new.size >= VOLUME_BYTES:
                    self._close(new)
                self._places[id(tensor)] = new.add(_raw(tensor)), tensor  # kept: so is its id
            return self._places[id(tensor)][0]

        slip = _pickled(thing, place_of, None)
        if new.parts:
            self._close(new)
        return slip

    def _close(self, layout: "_Layout") -> None:
        self.volumes.append(self.put(layout.body()))
        layout.clear(len(self.volumes))


Packed = tuple[Slip, Bytes]


def pack(thing: object) -> Packed:
    """`thing` with the bytes of its tensors and arrays in one body."""
    layout = _Layout(0)
    slip = _pickled(thing, lambda tensor: layout.add(_raw(tensor)), layout.add)
    return slip, layout.body()


def unpack(packed: Packed, copy: bool = True) -> Any:
    """What was packed; with `copy` in memory of its own, so that the body can go."""
    slip, body = packed
    return slip.read({0: body}, copy)


class _Layout:
    """Bytes that are to lie behind one another."""

    def __init__(self, volume: int) -> None:
        self.clear(volume)

    def clear(self, volume: int) -> None:
        self.volume, self.size = volume, 0
        self.parts: list[tuple[int, Bytes]] = []

    def add(self, raw: Bytes) -> Place:
        place = self.volume, self.size, len(raw)
        self.parts.append((self.size, raw))
        self.size += -(-len(raw) // ALIGN) * ALIGN
        return place

    def body(self) -> Bytes:
        body: Bytes = np.empty(self.size, np.uint8)
        for offset, raw in self.parts:
            body[offset : offset + len(raw)] = raw
        return body


class _Pickler(CloudPickler):
    """Leaves tensors out, and arrays too where there is a place for them."""

    def __init__(
        self,
        file: io.BytesIO,
        take: Callable[[Tensor], None],
        take_array: Callable[[Bytes], None] | None,
    ) -> None:
        self.take, self.take_array = take, take_array
        self.mark: pickle.PickleBuffer | None = None
        super().__init__(file, protocol=5, buffer_callback=self._stays)  # type: ignore[no-untyped-call]

    def _stays(self, buffer: pickle.PickleBuffer) -> bool:
        if buffer is self.mark:
            return False
        if self.take_array is None:
            return True
        self.take_array(np.frombuffer(buffer.raw(), np.uint8))
        return False

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) is Tensor and _is_plain(thing):
            self.take(thing)
            self.mark = pickle.PickleBuffer(bytearray())  # stands for what was taken
            return _tensor, (self.mark, thing.dtype, tuple(thing.shape))
        if isinstance(thing, FunctionType | type):  # all that is cloudpickle's business
            return super().reducer_override(thing)  # type: ignore[no-untyped-call]
        return NotImplemented


def _pickled(
    thing: object,
    place_of: Callable[[Tensor], Place],
    place_of_array: Callable[[Bytes], Place] | None,
) -> Slip:
    file, places = io.BytesIO(), list[Place]()

    def take(tensor: Tensor) -> None:
        places.append(place_of(tensor))

    def take_array(raw: Bytes) -> None:
        assert place_of_array is not None
        places.append(place_of_array(raw))

    pickler = _Pickler(file, take, None if place_of_array is None else take_array)
    pickler.dump(thing)  # type: ignore[no-untyped-call]
    return Slip(file.getvalue(), places)


def _tensor(raw: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor over these bytes."""
    if not len(raw):
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=dtype)
    return flat if len(shape) == 1 else flat.view(shape)


def _raw(tensor: Tensor) -> Bytes:
    raw: Bytes = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return raw


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values in order, as bytes, are all there is to it."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())
        and not tensor.is_quantized
    )
