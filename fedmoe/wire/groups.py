"""A group of tensors as bytes and back: one expert, its gate rows, the shared part.

Nothing of a group is decoded before all that its manifest says of it has been checked against its
bytes, and nothing is believed that would take more memory than the reader grants.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe.types import State
from fedmoe.wire import manifest_pb2 as pb
from fedmoe.wire.codecs import BF16, Codec, Coded, Raw, decode, from_raw, raw_bytes
from fedmoe.wire.parcel import HASH_BYTES, NAME_LIMIT, ParcelError

TENSORS_LIMIT = 2**16  # in one group
DIMS_LIMIT = 8
NUMEL_LIMIT = 2**40  # numbers in one tensor
SMALLEST = 64  # numbers in a tensor that is worth coding

DTYPES = {
    pb.FLOAT32: torch.float32,
    pb.FLOAT64: torch.float64,
    pb.FLOAT16: torch.float16,
    pb.BFLOAT16: torch.bfloat16,
    pb.INT64: torch.int64,
    pb.INT32: torch.int32,
    pb.INT16: torch.int16,
    pb.INT8: torch.int8,
    pb.UINT8: torch.uint8,
    pb.BOOL: torch.bool,
}
NUMBER_OF = {dtype: number for number, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Sealed:
    """A group ready to travel: what the manifest says of it, its name excepted, and its bytes."""

    meta: pb.Group
    raws: Mapping[str, bytes]

    @property
    def hash(self) -> bytes:
        return bytes(self.meta.sha256)

    @property
    def nbytes(self) -> int:
        return sum(len(raw) for raw in self.raws.values())


def seal(
    state: State,
    codec: Codec,
    generator: torch.Generator | None = None,
    base: State | None = None,
    residual: State | None = None,
) -> tuple[Sealed, dict[str, Tensor]]:
    """Encode a group, and what a codec that remembers leaves out of it.

    Integers travel as they are, and so does what has hardly any numbers, and a vector without a
    negative one: a variance or the scale of a norm, whose sign no error may turn.

    Args:
        base: what the reader has under these names; where a codec has an error, and shape and
            dtype are the same, the difference is encoded. A tensor that has not changed takes no
            bytes.
        residual: what was left out when this group was last sealed.

    Raises:
        ValueError: a tensor's dtype cannot travel, or a codec with an error meets NaN or infinity.
    """
    meta, raws, left = pb.Group(), {}, {}
    for name in sorted(state):
        value = state[name].detach().cpu()
        if value.dtype not in NUMBER_OF:
            raise ValueError(f"parameter {name!r}: {value.dtype} cannot travel")
        old = None if base is None else base.get(name)
        if old is not None and (old.shape != value.shape or old.dtype != value.dtype):
            old = None
        used = _fitting(value, codec)
        owed = residual.get(name) if residual is not None and used.remembers else None
        delta = False
        if old is not None and owed is None and _same(old, value):
            coded = Coded(pb.SAME, b"")
        elif old is None or isinstance(used, Raw):
            coded = used.encode(value, generator)
        else:
            delta = True
            change = _difference(value, old)
            if owed is not None:
                change += owed.reshape(change.shape)
            coded = used.encode(change, generator)
            if used.remembers:
                left[name] = change - decode(coded, change.numel()).reshape(change.shape)
        raws[name] = coded.raw
        meta.tensors.add(
            name=name,
            dtype=NUMBER_OF[value.dtype],
            shape=value.shape,
            encoding=coded.encoding,
            block=coded.block,
            delta=delta,
            nbytes=len(coded.raw),
        )
    meta.sha256 = content_hash(meta, raws)
    return Sealed(meta, raws), left


def _fitting(value: Tensor, codec: Codec) -> Codec:
    """The codec, or Raw where it would do harm or no good."""
    if not value.is_floating_point() or value.numel() < SMALLEST:
        return Raw()
    if isinstance(codec, BF16) and value.element_size() <= 2:
        return Raw()
    if value.dim() <= 1 and not bool((value < 0).any()):
        return Raw()
    return codec


def _same(a: Tensor, b: Tensor) -> bool:
    """The same bits: also where they are NaN, and not where zeros have two signs."""
    if not a.numel() or a.reshape(-1)[0] != b.reshape(-1)[0]:  # mostly settles it
        return not a.numel()
    return torch.equal(a.cpu(), b) and raw_bytes(a) == raw_bytes(b)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _difference(value: Tensor, old: Tensor) -> Tensor:
    wide = _wide(value.dtype)
    return (value.to(wide) - old.detach().cpu().to(wide)).float()


def content_hash(meta: pb.Group, raws: Mapping[str, bytes]) -> bytes:
    """As the proto file defines it. The same for equal groups, whatever they are called."""
    h = hashlib.sha256()
    for t in sorted(meta.tensors, key=lambda t: t.name):
        name, dims = t.name.encode(), ",".join(map(str, t.shape))
        fields = (t.dtype, dims, t.encoding, t.block, int(t.delta), t.nbytes)
        h.update(f"{len(name)}\0".encode() + name)
        h.update("".join(f"\0{field}" for field in fields).encode() + b"\n")
        h.update(raws[t.name])
    return h.digest()


def decoded_bytes(meta: pb.Group) -> int:
    """What a group that `check_sealed` has let pass takes in memory, or at most in decoding."""
    return sum(numel_of(t) * max(dtype_of(t).itemsize, 4) for t in meta.tensors)


def dtype_of(t: pb.Tensor) -> torch.dtype:
    if t.dtype not in DTYPES:
        raise ParcelError(f"{t.name[:NAME_LIMIT]!r} has dtype {t.dtype}, which is none")
    return DTYPES[t.dtype]


def numel_of(t: pb.Tensor) -> int:
    if len(t.shape) > DIMS_LIMIT:
        raise ParcelError(
            f"{t.name[:NAME_LIMIT]!r} must have at most {DIMS_LIMIT} dims, got {len(t.shape)}"
        )
    if math.prod(max(dim, 1) for dim in t.shape) > NUMEL_LIMIT:
        raise ParcelError(
            f"{t.name[:NAME_LIMIT]!r} must have at most {NUMEL_LIMIT} numbers, got "
            f"{' x '.join(map(str, t.shape))}"
        )
    return math.prod(t.shape)


def check_sealed(meta: pb.Group, raws: Mapping[str, bytes]) -> None:
    """Raise ParcelError where bytes and manifest do not tell the same."""
    if len(meta.tensors) > TENSORS_LIMIT:
        raise ParcelError(f"must have at most {TENSORS_LIMIT} tensors, got {len(meta.tensors)}")
    names: set[str] = set()
    for t in meta.tensors:
        if t.name in names:
            raise ParcelError(f"{t.name[:NAME_LIMIT]!r} must be there once, and is there twice")
        names.add(t.name)
    if names != set(raws):
        odd = sorted(names ^ set(raws), key=str)
        raise ParcelError(
            f"tensors must be those of the manifest; {str(odd[0])[:NAME_LIMIT]!r} is not in both "
            f"({len(odd)} in all)"
        )
    for t in meta.tensors:
        if not isinstance(raws[t.name], bytes):
            raise ParcelError(f"{t.name[:NAME_LIMIT]!r} must be bytes")
        if len(raws[t.name]) != t.nbytes:
            raise ParcelError(
                f"{t.name[:NAME_LIMIT]!r} must have the {t.nbytes} bytes of the manifest, got "
                f"{len(raws[t.name])}"
            )
        numel, dtype = numel_of(t), dtype_of(t)
        if len(t.name) > NAME_LIMIT:
            raise ParcelError(f"a name must have at most {NAME_LIMIT} characters")
        if t.encoding == pb.RAW and t.nbytes != numel * dtype.itemsize:
            raise ParcelError(
                f"{t.name!r} must take {numel * dtype.itemsize} bytes, got {t.nbytes}"
            )
        if t.encoding != pb.RAW and t.encoding != pb.SAME and not dtype.is_floating_point:
            raise ParcelError(f"{t.name!r} is {dtype} and must travel raw")
    if len(meta.sha256) != HASH_BYTES or content_hash(meta, raws) != meta.sha256:
        raise ParcelError("the content has another hash than the manifest says")


def unseal(
    meta: pb.Group, raws: Mapping[str, bytes], base: State | None = None
) -> dict[str, Tensor]:
    """Decode a group that `check_sealed` has let pass. All tensors are new memory, and finite.

    Args:
        base: what differences are to be added to. Every tensor must then be one of these, with
            the same shape and dtype.

    Raises:
        ParcelError: it is not what it claims, or not finite.
    """
    state = {}
    for t in meta.tensors:
        old = None
        if base is not None:
            old = _checked_against(t, base)
        elif t.delta or t.encoding == pb.SAME:
            raise ParcelError(f"{t.name!r} is a difference from what was never sent")
        try:
            state[t.name] = _decoded(t, raws[t.name], old)
        except ParcelError as why:
            raise ParcelError(f"{t.name!r}: {why}") from why
    return state


def _checked_against(t: pb.Tensor, base: State) -> Tensor:
    old = base.get(t.name)
    if old is None:
        raise ParcelError(f"{t.name!r} was not sent")
    if tuple(t.shape) != tuple(old.shape) or dtype_of(t) != old.dtype:
        raise ParcelError(
            f"{t.name!r} must be {old.dtype} of shape {tuple(old.shape)}, got {dtype_of(t)} of "
            f"shape {tuple(t.shape)}"
        )
    return old.detach().cpu()


def _decoded(t: pb.Tensor, raw: bytes, old: Tensor | None) -> Tensor:
    dtype, shape = dtype_of(t), tuple(t.shape)
    if t.encoding == pb.SAME:
        assert old is not None
        if raw:
            raise ParcelError(f"must take no bytes where nothing changed, got {len(raw)}")
        value = old.clone()
    elif t.encoding == pb.RAW:
        if t.delta:
            raise ParcelError("a difference must not be raw")
        value = from_raw(raw, dtype).reshape(shape)
        if dtype is torch.bool and bool((value.view(torch.uint8) > 1).any()):
            raise ParcelError("must be bytes of 0 and 1")
    else:
        numbers = decode(Coded(t.encoding, raw, t.block), numel_of(t)).reshape(shape)
        if t.delta:
            assert old is not None
            wide = _wide(dtype)
            numbers = old.to(wide) + numbers.to(wide)
        value = numbers.to(dtype)
    if dtype.is_floating_point and value.numel():
        least, most = value.aminmax()
        if not bool(least.isfinite()) or not bool(most.isfinite()):
            raise ParcelError("must be finite, but holds NaN or infinity")
    return value
