"""How numbers are written down to travel: exactly, or in fewer bytes with an error that is known.

A codec is a value. It turns a tensor into bytes; what it says of its error holds for every number
of every tensor. Which codec made the bytes stands beside them in the manifest, so that a reader
needs no codec to decode.

Shape suffixes: N numbers of a tensor, R blocks, B numbers of a block, K numbers kept.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import zstandard
from torch import Tensor

from fedmoe.wire import manifest_pb2 as pb
from fedmoe.wire.parcel import ParcelError

CHUNK = 2**17  # numbers that are coded together: what this takes stays in a core's cache
ROTATION = 2**12  # places at which a chunk may begin in the pool of noise
SAMPLE = 2**14  # numbers by which the threshold of the largest is found
ZERO = 128  # the byte that stands for 0
BLOCK_LIMIT = CHUNK
LEVELS_LIMIT = 127
FURTHEST = 2**16 - 1  # gap between numbers that are kept
TINIEST = 2.0**-126  # of numbers that are kept
MUST_BE_FINITE = "numbers must be finite to be encoded, and some are NaN or infinite"

_ENTROPY = zstandard.ZstdCompressionParameters(
    window_log=18,
    chain_log=6,
    hash_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
)


class Coded(NamedTuple):
    """A tensor's numbers as bytes; the number of them is known from its shape."""

    encoding: pb.Encoding
    raw: bytes
    block: int = 0  # numbers that share a scale, where they do


@dataclass(frozen=True)
class Raw:
    """Every bit as it is. Exact."""

    remembers: ClassVar[bool] = False

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Coded:
        return Coded(pb.RAW, raw_bytes(x))


@dataclass(frozen=True)
class BF16:
    """The nearest bfloat16: off by at most 2**-8 of the number itself. Half of float32."""

    remembers: ClassVar[bool] = False

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Coded:
        return Coded(pb.BF16, raw_bytes(x.to(torch.bfloat16)))


@dataclass(frozen=True)
class Int8:
    """A byte for each number, in steps of its block's largest magnitude over `levels`.

    Rounded to the nearest step, off by at most 0.51 steps, and what was decoded is encoded to the
    same bytes again. With a generator rounded up or down by chance, off by less than a step, and
    right on average; zero stays zero either way. Steps are at most 0.8 % wider than said, and
    never below 2**-126.

    Chance comes from up to 135,168 uniform numbers, drawn for each tensor and taken from a random
    place on for every chunk of 131,072: each number's rounding is uniform, so its mean is right,
    but those of numbers in different chunks are not independent.

    Attributes:
        block: numbers that share a scale.
        levels: steps from 0 to the largest magnitude, 1 to 127; fewer compress better.
        zstd: whether the bytes are compressed too, where that helps.
    """

    block: int = 1024
    levels: int = 127
    zstd: bool = True

    remembers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.block <= BLOCK_LIMIT:
            raise ValueError(f"block must be between 1 and {BLOCK_LIMIT}, got {self.block}")
        if not 1 <= self.levels <= LEVELS_LIMIT:
            raise ValueError(f"levels must be between 1 and {LEVELS_LIMIT}, got {self.levels}")

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Coded:
        """
        Raises:
            ValueError: a number is NaN or infinite.
        """
        x_N = _flat(x)
        head = 2 * -(-len(x_N) // self.block)  # bytes of the scales
        content = torch.empty(head + len(x_N), dtype=torch.uint8)
        scale_R = _quantise(x_N, content[head:], self.block, self.levels, generator)
        content[:head] = scale_R.to(torch.bfloat16).view(torch.uint8)
        whole = content.numpy()
        if self.zstd:
            packed = _zipped(whole[head:])
            if len(packed) < len(x_N):
                return Coded(pb.INT8_ZSTD, whole[:head].tobytes() + packed, self.block)
        return Coded(pb.INT8_BLOCKS, whole.tobytes(), self.block)


@dataclass(frozen=True)
class TopK:
    """The largest numbers alone, as bfloat16; the others are zero.

    What is left out is never lost: who encodes keeps it and adds it to what it sends next. That
    is also why this is for updates only. Of tensors with more than 16,384 numbers the threshold
    comes from a sample of about as many, so the share kept is near `share`, not exactly that.

    Attributes:
        share: of the numbers that are kept, above 0 and at most 1.
    """

    share: float = 0.1

    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Coded:
        """
        Raises:
            ValueError: a number is NaN or infinite.
        """
        x_N = _flat(x)
        place_K = _largest(x_N, self.share)
        value_K = torch.from_numpy(x_N.numpy()[place_K]).to(torch.bfloat16)
        gap, value = _as_gaps(place_K, value_K.view(torch.int16).numpy().view("<u2"))
        return Coded(pb.TOP_ZSTD, _zipped(np.concatenate([_planes(gap), _planes(value)])))


Codec = Raw | BF16 | Int8 | TopK


def raw_bytes(x: Tensor) -> bytes:
    """The tensor's numbers in order, as they are in memory."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def from_raw(raw: bytes, dtype: torch.dtype) -> Tensor:
    """What `raw_bytes` had, in memory of its own."""
    if not raw:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype)


def decode(coded: Coded, numel: int) -> Tensor:
    """`numel` numbers, float32; of all encodings but RAW and SAME.

    Takes no more memory than they need, whatever the bytes say.

    Raises:
        ParcelError: the bytes are not this many numbers in this encoding.
    """
    if coded.encoding == pb.BF16:
        _check_length(len(coded.raw), 2 * numel)
        return from_raw(coded.raw, torch.bfloat16).float()
    if coded.encoding in (pb.INT8_BLOCKS, pb.INT8_ZSTD):
        return _from_blocks(coded, numel)
    if coded.encoding == pb.TOP_ZSTD:
        return _from_gaps(coded.raw, numel)
    raise ParcelError(f"encoding {coded.encoding} is not one of numbers with an error")


def _flat(x: Tensor) -> Tensor:
    return x.detach().cpu().float().contiguous().reshape(-1)


def _check_length(got: int, wanted: int) -> None:
    if got != wanted:
        raise ParcelError(f"the numbers must take {wanted} bytes, got {got}")


# Int8


def _quantise(
    x_N: Tensor, q_N: Tensor, block: int, levels: int, generator: torch.Generator | None
) -> Tensor:
    """Write bytes into `q_N` and return the scales; chunk by chunk, so memory is read once."""
    numel = len(x_N)
    largest_R, scale_R = (torch.empty(-(-numel // block)) for _ in range(2))
    step = CHUNK // block * block
    buffer = torch.empty(min(step, numel))
    noise, places = _noise(len(buffer), -(-numel // step), generator)
    for start, place in zip(range(0, numel, step), places, strict=True):
        for part, rows in _parts(start, min(start + step, numel), block):
            size = part.stop - part.start
            x_RB = x_N[part].view(rows.stop - rows.start, -1)
            y_RB = buffer[:size].view_as(x_RB)
            torch.abs(x_RB, out=y_RB)
            torch.amax(y_RB, 1, out=largest_R[rows])
            scale_R[rows] = _scales(largest_R[rows], levels, up=generator is not None)
            noise_RB = noise[place : place + size].view_as(x_RB)
            torch.addcmul(noise_RB, x_RB, scale_R[rows].reciprocal()[:, None], out=y_RB)
            q_N[part].view_as(y_RB).copy_(y_RB)  # cuts off what is behind the point
    if not bool((largest_R + scale_R).isfinite().all()):
        raise ValueError(f"{MUST_BE_FINITE}, or too large")
    return scale_R


def _noise(
    size: int, chunks: int, generator: torch.Generator | None
) -> tuple[Tensor, list[int]]:
    """What is added before the rest behind the point is cut off, with the shift by ZERO in it;
    and where in it each chunk begins.

    Odd multiples of 2**-16, so that the largest byte plus the largest noise still is below 256
    in float32, and the mean is a half exactly.
    """
    if generator is None:
        return torch.full((size,), ZERO + 0.5), [0] * chunks
    # Only the key is torch's: its own numbers take several times as long.
    key = int(torch.randint(2**62, (1,), generator=generator))
    draw = np.random.SFC64(key)
    room = size + ROTATION if chunks > 1 else size
    words = draw.random_raw(-(-room // 4)).view(np.int16)[:room] & 0x7FFF
    noise = torch.from_numpy(words).float().add_(0.5).div_(2**15).add_(ZERO)
    places = draw.random_raw(chunks) % np.uint64(room - size + 1)
    return noise, [int(place) for place in places]


def _scales(largest_R: Tensor, levels: int, *, up: bool) -> Tensor:
    """A step of each block that bfloat16 can hold, so that its product with a byte is exact.

    Up: never less than what makes `levels` steps reach the largest, so that nothing is cut.
    """
    if up:
        # The factor is what the reciprocal and the product may round away.
        bits_R = (largest_R * ((1 + 2.0**-15) / levels)).view(torch.int32)
        step_R = bits_R.add_(0xFFFF).bitwise_and_(~0xFFFF).view(torch.float32)
    else:
        step_R = (largest_R / levels).to(torch.bfloat16).float()
    return step_R.clamp_(min=2.0**-126)  # not zero, and its reciprocal is finite


def _parts(start: int, stop: int, block: int) -> list[tuple[slice, slice]]:
    """The numbers and rows of a chunk's whole blocks, and of what is left of the last of all."""
    whole = start + (stop - start) // block * block
    cuts = [slice(start, whole), slice(whole, stop)]
    return [
        (cut, slice(cut.start // block, -(-cut.stop // block)))
        for cut in cuts
        if cut.stop > cut.start
    ]


def _from_blocks(coded: Coded, numel: int) -> Tensor:
    block = coded.block
    if not 1 <= block <= BLOCK_LIMIT:
        raise ParcelError(f"block must be between 1 and {BLOCK_LIMIT}, got {block}")
    num_blocks = -(-numel // block)
    scales, body = coded.raw[: 2 * num_blocks], coded.raw[2 * num_blocks :]
    _check_length(len(scales), 2 * num_blocks)
    if coded.encoding == pb.INT8_ZSTD:
        body = _unzipped(body, numel)
    _check_length(len(body), numel)
    scale_R = from_raw(scales, torch.bfloat16).float()
    if not bool((scale_R > 0).all()) or not bool(scale_R.isfinite().all()):
        raise ParcelError("every step must be above 0 and finite")
    q_N, x_N = from_raw(body, torch.uint8), torch.empty(numel)
    step = CHUNK // block * block
    for start in range(0, numel, step):
        for part, rows in _parts(start, min(start + step, numel), block):
            x_RB = x_N[part].view(rows.stop - rows.start, -1)
            x_RB.copy_(q_N[part].view_as(x_RB)).sub_(ZERO).mul_(scale_R[rows, None])
    return x_N


# TopK


def _largest(x_N: Tensor, share: float) -> np.ndarray:
    """Places of the numbers that are kept, in order; none of them is zero."""
    numel = len(x_N)
    if not numel:
        return np.empty(0, dtype=np.int64)
    sample = x_N[:: -(-numel // SAMPLE) | 1].abs()
    rank = len(sample) - max(round(share * len(sample)), 1)
    least = max(float(sample.kthvalue(rank + 1).values), TINIEST)
    places, most = [], []
    buffer = torch.empty(min(CHUNK, numel))
    for start in range(0, numel, CHUNK):
        x = x_N[start : start + CHUNK]
        size = torch.abs(x, out=buffer[: len(x)])
        most.append(size.amax())
        places.append(np.flatnonzero(size.numpy() >= least) + start)
    if not bool(torch.stack(most).isfinite().all()):
        raise ValueError(MUST_BE_FINITE)
    return np.concatenate(places)


def _as_gaps(place_K: np.ndarray, value_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances from one place to the next, each with its value; far ones with zeros between."""
    gap_K = np.diff(place_K, prepend=-1)
    if not len(gap_K) or gap_K.max() <= FURTHEST:
        return gap_K.astype("<u2"), value_K
    bridges_K = (gap_K - 1) // FURTHEST
    at_K = np.cumsum(bridges_K + 1) - 1
    gap = np.full(int(at_K[-1]) + 1, FURTHEST, dtype="<u2")
    value = np.zeros(len(gap), dtype="<u2")
    gap[at_K] = gap_K - bridges_K * FURTHEST
    value[at_K] = value_K
    return gap, value


def _planes(pairs: np.ndarray) -> np.ndarray:
    """All low bytes, then all high ones: that compresses better."""
    return pairs.view(np.uint8).reshape(-1, 2).T.reshape(-1)


def _from_gaps(raw: bytes, numel: int) -> Tensor:
    planes = np.frombuffer(_unzipped(raw, 4 * numel, exact=False), np.uint8)
    if len(planes) % 4:
        raise ParcelError("numbers that are kept must take 4 bytes each")
    gap, value = (
        np.ascontiguousarray(p.reshape(2, -1).T).view("<u2").reshape(-1)
        for p in np.split(planes, 2)
    )
    place_K = np.cumsum(gap, dtype=np.int64) - 1
    if len(gap) and (not gap.all() or place_K[-1] >= numel):
        raise ParcelError(f"numbers that are kept must have places below {numel}, in order")
    x_N = torch.zeros(numel)
    x_N[torch.from_numpy(place_K)] = torch.from_numpy((value.astype("<u4") << 16).view("<f4"))
    return x_N


def _zipped(content: np.ndarray) -> bytes:
    """One zstd frame. What is coded here repeats by chance alone, so hardly any time goes into
    looking for repeats: the same settings but those of level 1 take up to twice as long, for more
    bytes."""
    return zstandard.ZstdCompressor(compression_params=_ENTROPY).compress(content.data)


def _unzipped(raw: bytes, size: int, *, exact: bool = True) -> bytes:
    """The content of the one zstd frame, once it says that it is this long, or at most so."""
    try:
        told = zstandard.get_frame_parameters(raw).content_size
        if told > size or (exact and told != size):
            raise ParcelError(f"the numbers must take {size} bytes, got {told}")
        return zstandard.ZstdDecompressor().decompress(raw, allow_extra_data=False)
    except zstandard.ZstdError as why:
        raise ParcelError(f"not what zstd has compressed: {why}") from why
