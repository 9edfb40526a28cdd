'''Weighted values onto a grid of whole numbers and into sums of 64 bits, in one pass over memory.

A term is value * scale, rounded to the nearest whole number, halves to even. It is found by adding
1.5 * 2**52, where a double has no fraction left: the last bits of the sum are the term. So terms
must be below 2**51, and value * scale exact, which it is for scales of at most 29 bits. Sums wrap
around at 64 bits, so what must not have been added is taken away again exactly, be it NaN.

Memory is what it waits for. So two values are added at a time, at four places in turn, and each is
asked for some time before it is needed.
'''

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe.native.build import compiled

TOGETHER = 2  # values that are added in one pass
LARGE = 2**22  # bytes from which on it pays to ask for large pages
MOST_TERM = 2.0**51
MOST_WEIGHT = 2**29  # times a power of two it is a scale of 29 bits

Addresses = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]  # of dtype ROW

ROW = np.dtype(
    [
        ("total", np.uint64),  # address of int64; 0: there is none
        ("value", np.uint64, TOGETHER),  # addresses of float32
        ("scale", np.float64, TOGETHER),
        ("most", np.float64, TOGETHER),  # largest magnitude of each value, NaN if it has any
        ("num", np.int64),  # of the values, 1 to TOGETHER
        ("count", np.int64),  # numbers at each address
        ("begin", np.int64),  # not 0: whatever is in the total is no part of it
    ]
)

SOURCE = r"""
#include <cstdint>
#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

const double SHIFT = 6755399441055744.0;  // 1.5 * 2^52
const int64_t BLOCK = 32;     // values of one place before the next place's turn
const int64_t PLACES = 4;
const int64_t AHEAD = 1024;   // bytes
const int64_t LINE = 64;      // bytes

inline uint64_t bits_of(double d) { uint64_t b; memcpy(&b, &d, 8); return b; }

inline uint64_t term(float x, double scale) {
    return bits_of((double)x * scale + SHIFT) - bits_of(SHIFT);
}

inline uint32_t magnitude(float x) {  // as a whole number, which orders NaN above infinity
    uint32_t b; memcpy(&b, &x, 4); return b & 0x7fffffffu;
}

inline float as_float(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

template <typename T> inline void soon(const T* p, int64_t count) {
    for (int64_t at = 0; at < count * (int64_t)sizeof(T); at += LINE)
        __builtin_prefetch((const char*)p + at + AHEAD, 0, 2);
}

struct Measure {
    const float* two;
    uint32_t most;
    void ask(int64_t i) { soon(two + i, BLOCK); }
    void run(int64_t from, int64_t to) {
        uint32_t m = most;
        for (int64_t i = from; i < to; i++) { uint32_t u = magnitude(two[i]); m = u > m ? u : m; }
        most = m;
    }
};

// Adds NUM values to each total, and measures them.
template <int NUM, bool BEGIN> struct Sum {
    uint64_t* total;
    const float* const* value;
    const double* scale;
    uint32_t most[NUM];
    void ask(int64_t i) {
        for (int n = 0; n < NUM; n++) soon(value[n] + i, BLOCK);
        soon(total + i, BLOCK);
    }
    void run(int64_t from, int64_t to) {
        uint64_t* __restrict__ sum = total;
        const float* __restrict__ x = value[0];
        const float* __restrict__ y = value[NUM - 1];
        const double scale_x = scale[0], scale_y = scale[NUM - 1];
        uint32_t most_x = most[0], most_y = most[NUM - 1];
        for (int64_t i = from; i < to; i++) {
            const uint32_t u = magnitude(x[i]);
            most_x = u > most_x ? u : most_x;
            uint64_t more = term(x[i], scale_x);
            if (NUM > 1) {
                const uint32_t v = magnitude(y[i]);
                most_y = v > most_y ? v : most_y;
                more += term(y[i], scale_y);
            }
            sum[i] = BEGIN ? more : sum[i] + more;
        }
        most[0] = most_x;
        if (NUM > 1) most[NUM - 1] = most_y;
    }
};

struct Away {
    uint64_t* total;
    const float* value;
    double scale;
    void ask(int64_t i) { soon(value + i, BLOCK); soon(total + i, BLOCK); }
    void run(int64_t from, int64_t to) {
        uint64_t* __restrict__ sum = total;
        const float* __restrict__ x = value;
        for (int64_t i = from; i < to; i++) sum[i] -= term(x[i], scale);
    }
};

struct Divide {
    float* out;
    const int64_t* total;
    double weight, share, unit;  // share: 1 / weight
    void ask(int64_t i) { soon(total + i, BLOCK); }
    double over_weight(double t) const {
#ifdef __FMA__
        // Markstein: two steps of correction by an exact remainder end at the quotient as division
        // rounds it, in a fifth of its time.
        double q = t * share;
        q = __builtin_fma(__builtin_fma(-q, weight, t), share, q);
        return __builtin_fma(__builtin_fma(-q, weight, t), share, q);
#else
        return t / weight;
#endif
    }
    void run(int64_t from, int64_t to) {
        float* __restrict__ mean = out;
        const int64_t* __restrict__ sum = total;
        for (int64_t i = from; i < to; i++)
            mean[i] = (float)(over_weight((double)sum[i]) * unit);
    }
};

template <typename Work> void everywhere(Work& work, int64_t count) {
    const int64_t each = count / (PLACES * BLOCK) * BLOCK;
    for (int64_t at = 0; at < each; at += BLOCK)
        for (int64_t place = 0; place < PLACES; place++) {
            const int64_t i = place * each + at;
            work.ask(i);
            work.run(i, i + BLOCK);
        }
    work.run(PLACES * each, count);
}

}  // namespace

struct Row {
    uint64_t* total;
    const float* value[2];
    double scale[2], most[2];
    int64_t num, count, begin;
};

template <int NUM, bool BEGIN> void add(Row& r) {
    Sum<NUM, BEGIN> work{r.total, r.value, r.scale, {}};
    everywhere(work, r.count);
    for (int n = 0; n < NUM; n++) r.most[n] = as_float(work.most[n]);
}

extern "C" bool arrive(int64_t rows, Row* row) {
    for (Row* r = row; r < row + rows; r++)
        if (r->num < 1 || r->num > 2) return false;
    for (Row* r = row; r < row + rows; r++) {
        if (!r->total) {
            Measure work{r->value[0], 0};
            everywhere(work, r->count);
            r->most[0] = as_float(work.most);
        } else if (r->num == 2) {
            if (r->begin) add<2, true>(*r); else add<2, false>(*r);
        } else {
            if (r->begin) add<1, true>(*r); else add<1, false>(*r);
        }
    }
    return true;
}

extern "C" void take_away(int64_t rows, const Row* row, int64_t which) {
    for (const Row* r = row; r < row + rows; r++) {
        Away work{r->total, r->value[which], r->scale[which]};
        everywhere(work, r->count);
    }
}

extern "C" void divide(
    int64_t rows, const Row* row, float* const* out, double weight, double unit) {
    for (int64_t r = 0; r < rows; r++) {
        Divide work{out[r], (const int64_t*)row[r].total, weight, 1 / weight, unit};
        everywhere(work, row[r].count);
    }
}

extern "C" void large_pages(uint64_t at, uint64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uint64_t page = 4096;
    const uint64_t from = (at + page - 1) / page * page, to = (at + bytes) / page * page;
    if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}
"""


def available() -> bool:
    """Whether the kernel is there, and what follows may be called."""
    return _library() is not None


def addresses(
    tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], dtype: torch.dtype
) -> Addresses:
    """Where the tensors' numbers are, for `ROW`. Whoever has these keeps the tensors.

    Raises:
        ValueError: one is not on the CPU, in one piece, of this dtype and of its shape.
    """
    # Test by test: there may be hundreds of tensors, and what is done for each takes its time.
    if (
        [t.shape for t in tensors] == shapes
        and {t.dtype for t in tensors} <= {dtype}
        and all(map(Tensor.is_contiguous, tensors))
        and False not in [t.is_cpu for t in tensors]
    ):
        return np.fromiter(map(Tensor.data_ptr, tensors), np.uint64, len(tensors))
    kinds = {(t.dtype, tuple(t.shape), t.device.type, t.is_contiguous()) for t in tensors}
    raise ValueError(
        f"tensors must be {dtype} on the CPU, in one piece, of shapes "
        f"{[tuple(shape) for shape in shapes]}, got {sorted(map(str, kinds))}"
    )


def joined(rows: Sequence[Rows]) -> Rows:
    """As np.concatenate, which takes ten times as long for such rows."""
    if len(rows) == 1:
        return rows[0]
    return np.frombuffer(bytearray().join([r.tobytes() for r in rows]), ROW)


def arrive(rows: Rows) -> None:
    """Add the values of each row to its total, and measure them, in one pass.

    Where there is no total, the first value is measured.
    """
    if not _call().arrive(*_checked(rows)):
        raise ValueError(f"num must be from 1 to {TOGETHER}, got {rows['num'].tolist()}")


def take_away(rows: Rows, which: int) -> None:
    """Undo what `arrive` did of one of the values, the first (0) or the second (1)."""
    if which not in range(TOGETHER):
        raise ValueError(f"which must be from 0 to {TOGETHER - 1}, got {which}")
    _call().take_away(*_checked(rows), which)


def divide(out: Addresses, rows: Rows, weight: int, unit: float) -> None:
    """Put total / weight * unit, a power of two, into `out`, float32 and one for each row."""
    num_rows, at = _checked(rows)
    if len(out) != num_rows:
        raise ValueError(f"out must be of {num_rows} rows, got {len(out)}")
    _call().divide(num_rows, at, out.ctypes.data, weight, unit)


def large_pages(new: Tensor) -> None:
    """Let memory that has not been written yet come in large pages, which takes half the time."""
    if new.nbytes >= LARGE:
        _call().large_pages(new.data_ptr(), new.nbytes)


def _checked(rows: Rows) -> tuple[int, int]:
    if rows.dtype != ROW or not rows.flags.c_contiguous:
        raise ValueError(f"rows must be of dtype ROW and in one piece, got {rows.dtype}")
    return len(rows), rows.ctypes.data


def _call() -> Any:
    library = _library()
    if library is None:
        raise RuntimeError("the kernel is not there: ask `available` first")
    return library


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = compiled(SOURCE)
    if library is not None:
        at: Any = ctypes.c_void_p
        whole: Any = ctypes.c_int64
        real: Any = ctypes.c_double
        for function in (library.take_away, library.divide, library.large_pages):
            function.restype = None
        library.arrive.restype = ctypes.c_bool
        library.large_pages.argtypes = [whole, whole]
        library.arrive.argtypes = [whole, at]
        library.take_away.argtypes = [whole, at, whole]
        library.divide.argtypes = [whole, at, at, real, real]
    return library
