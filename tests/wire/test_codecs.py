"""What every codec promises of its error, of any numbers."""

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.wire import manifest_pb2 as pb
from fedmoe.wire.codecs import (
    BF16,
    CHUNK,
    SAMPLE,
    Coded,
    Int8,
    Raw,
    TopK,
    decode,
    from_raw,
    raw_bytes,
)
from fedmoe.wire.parcel import ParcelError

EXACT = Raw()
WITH_ERROR = (
    BF16(),
    Int8(),
    Int8(zstd=False),
    Int8(block=7, levels=5),
    Int8(block=4096, levels=31),
    Int8(levels=1),
    TopK(0.1),
    TopK(1.0),
)


@st.composite
def numbers(draw):
    """Any shape, sizes from those of gradients to those of nothing at all, and zeros."""
    shape = draw(st.sampled_from([(0,), (), (1,), (65,), (3, 40), (2, 1024), (5000,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-44, 37))
    uneven = torch.rand(shape, generator=generator) ** draw(st.sampled_from([0, 1, 9]))
    kept = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return (x * uneven * kept).clamp(-3e38, 3e38)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def there_and_back(codec, x, generator=None):
    return decode(codec.encode(x, generator), x.numel()).reshape(x.shape)


def error_bound(codec, x):
    """Of each number, flat, when rounded to the nearest, as the codec's docstring tells it."""
    x_N = x.reshape(-1)
    match codec:
        case BF16():
            # bfloat16 has no smaller steps than this, whatever the number.
            return x_N.abs() * 2.0**-8 + 2.0**-133
        case Int8(block, levels):
            rows = torch.split(x_N.abs(), block)
            largest_N = torch.cat([r.amax().expand(len(r)) for r in rows]) if len(x_N) else x_N
            return 0.51 * (1.008 * largest_N.double() / levels).clamp_min(2.0**-126)
    return None


@given(numbers(), st.sampled_from(WITH_ERROR), st.booleans())
def test_the_error_of_every_number_is_within_what_the_codec_says(x, codec, by_chance):
    back = there_and_back(codec, x, seeded() if by_chance else None)
    assert back.dtype == torch.float32 and back.shape == x.shape
    off_N = (back.double() - x.double()).abs().reshape(-1)
    if isinstance(codec, TopK):
        kept_N = back.reshape(-1) != 0
        assert bool((off_N[kept_N] <= x.reshape(-1)[kept_N].abs() * 2.0**-8).all())
        left = x.reshape(-1)[~kept_N].abs()
        if kept_N.any() and len(left) and x.numel() <= SAMPLE:
            assert float(left.max()) <= float(x.reshape(-1)[kept_N].abs().min())
    else:
        bound_N = error_bound(codec, x)
        if by_chance and isinstance(codec, Int8):
            bound_N = bound_N / 0.51
        assert bool((off_N <= bound_N).all())
    assert bool((back[x == 0] == 0).all())  # zero stays zero, whatever the noise


@given(numbers(), st.sampled_from((EXACT, *WITH_ERROR)))
def test_equal_generators_give_equal_bytes(x, codec):
    assert codec.encode(x, seeded(5)) == codec.encode(x.clone(), seeded(5))
    assert codec.encode(x) == codec.encode(x)


@pytest.mark.parametrize("codec", (EXACT, *WITH_ERROR), ids=str)
def test_no_codec_draws_from_the_global_generator(codec):
    before = torch.get_rng_state()
    codec.encode(torch.randn(3 * CHUNK, generator=seeded()))
    codec.encode(torch.randn(3 * CHUNK, generator=seeded()), seeded())
    assert torch.equal(torch.get_rng_state(), before)


@given(numbers(), st.sampled_from([torch.float16, torch.float64, torch.int64, torch.bool]))
def test_raw_is_exact_for_every_dtype(x, dtype):
    value = (x.clamp(-9, 9)).to(dtype)
    coded = Raw().encode(value)
    assert coded.encoding == pb.RAW and len(coded.raw) == value.numel() * value.element_size()
    assert torch.equal(from_raw(coded.raw, dtype).reshape(value.shape), value)


@given(numbers(), st.sampled_from([c for c in WITH_ERROR if isinstance(c, Int8 | BF16)]))
def test_what_was_decoded_is_encoded_to_the_same_bytes(x, codec):
    once = codec.encode(x)
    assert codec.encode(decode(once, x.numel()).reshape(x.shape)) == once


def test_int8_by_hand():
    # The step is 63.5 / 127 = 0.5; bytes count from 128; halves go up.
    coded = Int8(block=4, zstd=False).encode(torch.tensor([63.5, -63.5, 0.25, 0.2, 0.0]))
    steps = torch.tensor([0.5, 2.0**-126], dtype=torch.bfloat16)
    assert coded == Coded(pb.INT8_BLOCKS, raw_bytes(steps) + bytes([255, 1, 129, 128, 128]), 4)
    assert decode(coded, 5).tolist() == [63.5, -63.5, 0.5, 0.0, 0.0]


def test_top_k_by_hand():
    x = torch.tensor([0.0, -3.0, 0.5, 2.0, 0.0, 0.0, 1.0, 0.0])
    coded = TopK(0.25).encode(x)
    # Places 1 and 3: two steps from -1, and two more. bfloat16: -3 is c040, 2 is 4000.
    planes = bytes([2, 2, 0, 0, 0x40, 0x00, 0xC0, 0x40])
    assert zstandard.ZstdDecompressor().decompress(coded.raw) == planes
    assert decode(coded, 8).tolist() == [0, -3, 0, 2, 0, 0, 0, 0]


def test_places_far_apart_are_bridged():
    x = torch.zeros(400_000)
    x[[5, 5 + 65_535, 200_001, 399_999]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(there_and_back(TopK(1e-5), x), x)


def test_top_k_keeps_about_its_share_of_a_large_tensor():
    x = torch.randn(20 * SAMPLE + 17, generator=seeded())
    kept = there_and_back(TopK(0.05), x) != 0
    assert 0.044 < float(kept.float().mean()) < 0.056


@pytest.mark.parametrize("numel", [300, 2 * CHUNK + 1000], ids=["one chunk", "several"])
def test_int8_by_chance_is_right_on_average(numel):
    """Over many draws, in each place, also where chunks share noise."""
    x = torch.linspace(-1, 1, numel)
    codec, draws = Int8(block=numel // 3, levels=3, zstd=False), 400 if numel < CHUNK else 60
    generator = seeded(1)
    total = torch.zeros(numel)
    for _ in range(draws):
        total += there_and_back(codec, x, generator)
    off = total / draws - x
    step = 1 / 3
    # The mean of `draws` roundings varies by at most half a step over their root.
    assert float(off.abs().max()) < 5.5 * 0.5 * step / draws**0.5
    assert abs(float(off.mean())) < 0.01 * step


def test_neighbours_are_rounded_independently():
    x = torch.full((4000,), 0.5)
    x[0] = 127.0  # a step of 1, so each number is rounded to 0 or 1
    up = there_and_back(Int8(block=4000), x, seeded())[1:] > 0.9
    assert 0.45 < float(up.float().mean()) < 0.55
    assert 0.2 < float((up[1:] & up[:-1]).float().mean()) < 0.3


@pytest.mark.parametrize("codec", [Int8(), TopK(0.5)], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 70_000, 140_000])
def test_numbers_that_are_not_finite_are_refused(codec, bad, place):
    x = torch.ones(140_001)
    x[place] = bad
    for generator in (None, seeded()):
        with pytest.raises(ValueError, match="must be finite"):
            codec.encode(x, generator)


def test_a_nan_of_any_bits_is_refused():
    bits = torch.zeros(100, dtype=torch.int32)
    bits[3] = 2**31 - 1
    with pytest.raises(ValueError, match="must be finite"):
        Int8().encode(bits.view(torch.float32), seeded())


def test_what_has_no_step_that_float32_can_hold_is_refused():
    largest = torch.full((100,), torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match="or too large"):
        Int8(levels=1).encode(largest, seeded())


def test_what_is_sent_is_smaller_by_what_is_promised():
    x = torch.randn(2**16, generator=seeded()) * 0.01
    size = {c: len(c.encode(x, seeded()).raw) / (4 * x.numel()) for c in (EXACT, *WITH_ERROR)}
    assert size[Raw()] == 1 and size[BF16()] == 0.5
    assert size[Int8(zstd=False)] == (1 + 2 / 1024) / 4
    assert size[Int8()] < 0.24 and size[Int8(block=4096, levels=31)] < 0.17
    assert size[TopK(0.1)] < 0.1 * (1 + 2) / 4  # a byte and a bit for a gap, two for a value


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Int8(block=0), "block must be between 1 and"),
        (lambda: Int8(block=CHUNK + 1), "block must be between 1 and"),
        (lambda: Int8(levels=128), "levels must be between 1 and 127, got 128"),
        (lambda: TopK(0), "share must be above 0 and at most 1, got 0"),
        (lambda: TopK(float("nan")), "share must be above 0"),
    ],
)
def test_a_codec_that_makes_no_sense_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def zipped(content):
    return zstandard.ZstdCompressor().compress(content)


def pairs(*planes):
    return np.concatenate([np.array(p, dtype=np.uint8) for p in planes]).tobytes()


STEP = raw_bytes(torch.tensor([0.5], dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "coded, text",
    [
        (Coded(pb.BF16, b"\0" * 7), "must take 8 bytes, got 7"),
        (Coded(pb.INT8_BLOCKS, STEP + b"\0" * 3, 4), "must take 4 bytes, got 3"),
        (Coded(pb.INT8_BLOCKS, STEP + b"\0" * 5, 4), "must take 4 bytes, got 5"),
        (Coded(pb.INT8_BLOCKS, b"\0", 4), "must take 2 bytes, got 1"),
        (Coded(pb.INT8_BLOCKS, STEP + b"\0" * 4, 0), "block must be between 1 and"),
        (Coded(pb.INT8_BLOCKS, STEP + b"\0" * 4, 2**31), "block must be between 1 and"),
        (Coded(pb.INT8_BLOCKS, b"\0\0" + b"\0" * 4, 4), "every step must be above 0"),
        (Coded(pb.INT8_BLOCKS, b"\xc0\x7f" + b"\0" * 4, 4), "every step must be above 0"),
        (Coded(pb.INT8_BLOCKS, b"\x80\x7f" + b"\0" * 4, 4), "every step must be above 0"),
        (Coded(pb.INT8_ZSTD, STEP + b"\0" * 40, 4), "not what zstd has compressed"),
        (Coded(pb.INT8_ZSTD, STEP, 4), "not what zstd has compressed"),
        (Coded(pb.INT8_ZSTD, STEP + zipped(b"\0" * 5), 4), "must take 4 bytes, got 5"),
        (Coded(pb.INT8_ZSTD, STEP + zipped(b"\0" * 4)[:-1], 4), "not what zstd has compressed"),
        (Coded(pb.INT8_ZSTD, STEP + zipped(b"\0" * 4) + b"x", 4), "not what zstd has compressed"),
        (Coded(pb.INT8_ZSTD, STEP + zipped(bytes(2**28)), 4), f"4 bytes, got {2**28}"),
        (Coded(pb.TOP_ZSTD, zipped(bytes(2**28))), f"must take 16 bytes, got {2**28}"),
        (Coded(pb.TOP_ZSTD, zipped(b"abc")), "must take 4 bytes each"),
        (Coded(pb.TOP_ZSTD, zipped(pairs([0], [0], [0], [0]))), "places below 4, in order"),
        (Coded(pb.TOP_ZSTD, zipped(pairs([5], [0], [0], [0]))), "places below 4, in order"),
        (Coded(pb.TOP_ZSTD, zipped(pairs([3, 2], [0, 0], [0, 0], [0, 0]))), "places below 4"),
        (Coded(pb.RAW, b"\0" * 16), "is not one of numbers with an error"),
        (Coded(99, b"\0" * 16), "encoding 99 is not one"),
    ],
    ids=str,
)
def test_bytes_that_are_not_four_numbers_are_refused(coded, text):
    with pytest.raises(ParcelError, match=text):
        decode(coded, 4)
