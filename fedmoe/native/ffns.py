"""Feed-forward experts in one compiled pass: sort, gather, two linear maps around a ReLU, add up.

What torch does in a dozen calls and some for every expert is one call forward and one backward
here, with torch's own matrix product. Gradients are written where they stay, once.

Shape suffixes: T tokens, D width, F hidden width, O output width, E experts of the layer, H of them
here, R rows: the pairs of a token and an expert here that it weighs.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmoe.native.blas import sgemm_address
from fedmoe.native.build import compiled

SOURCE = r"""
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

typedef void (*Sgemm)(const char*, const char*, const int*, const int*, const int*, const float*,
                      const float*, const int*, const float*, const int*, const float*, float*,
                      const int*);

namespace {

// Row-major C[m, n] = op(A) op(B); a transposed operand lies as its transpose.
void mm(Sgemm gemm, bool ta, bool tb, int m, int n, int k, const float* a, const float* b,
        float* c) {
  const float one = 1, zero = 0;
  const int lda = ta ? m : k, ldb = tb ? k : n;
  gemm(tb ? "T" : "N", ta ? "T" : "N", &n, &m, &k, &one, b, &ldb, a, &lda, &zero, c, &n);
}

float dot(const float* a, const float* b, int n) {
  float part[16] = {0};
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) part[j] += a[i + j] * b[i + j];
  float sum = 0;
  for (; i < n; i++) sum += a[i] * b[i];
  for (int j = 0; j < 16; j++) sum += part[j];
  return sum;
}

// Memory to work in, in line with the cache.
typedef std::unique_ptr<float, decltype(&std::free)> Room;
Room room(int64_t size) {
  const size_t bytes = (size * sizeof(float) + 63) / 64 * 64;
  return Room(static_cast<float*>(std::aligned_alloc(64, bytes ? bytes : 64)), &std::free);
}

void add_rows(float* y, const float* bias, int64_t rows, int width) {
  for (int64_t r = 0; r < rows; r++)
    for (int i = 0; i < width; i++) y[r * width + i] += bias[i];
}

void sum_rows(float* out, const float* y, int64_t rows, int width) {
  std::memset(out, 0, sizeof(float) * width);
  for (int64_t r = 0; r < rows; r++)
    for (int i = 0; i < width; i++) out[i] += y[r * width + i];
}

}  // namespace

extern "C" {

// How many tokens weigh each expert; returns their sum.
int64_t count_rows(const float* weight_TE, int64_t T, int64_t E, const int64_t* column_H,
                   int64_t H, int64_t* count_H) {
  int64_t rows = 0;
  for (int64_t h = 0; h < H; h++) count_H[h] = 0;
  for (int64_t t = 0; t < T; t++)
    for (int64_t h = 0; h < H; h++) count_H[h] += weight_TE[t * E + column_H[h]] != 0;
  for (int64_t h = 0; h < H; h++) rows += count_H[h];
  return rows;
}

// `next_H` is room to work in. Biases may be null.
void forward(Sgemm gemm, const float* x_TD, const float* weight_TE, int64_t T, int64_t E,
             const int64_t* column_H, int64_t H, const int64_t* count_H, int64_t* next_H, int D,
             int F, int O, const float* const* up_HFD, const float* const* up_HF,
             const float* const* down_HOF, const float* const* down_HO, int64_t* token_R,
             float* x_RD, float* h_RF, float* y_RO, float* y_TO) {
  int64_t begin = 0;
  for (int64_t h = 0; h < H; h++) {
    next_H[h] = begin;
    begin += count_H[h];
  }
  for (int64_t t = 0; t < T; t++)
    for (int64_t h = 0; h < H; h++)
      if (weight_TE[t * E + column_H[h]] != 0) token_R[next_H[h]++] = t;
  std::memset(y_TO, 0, sizeof(float) * T * O);
  begin = 0;
  for (int64_t h = 0; h < H; h++) {
    const int64_t n = count_H[h];
    if (!n) continue;
    const int64_t* token = token_R + begin;
    float *x = x_RD + begin * D, *hid = h_RF + begin * F, *y = y_RO + begin * O;
    for (int64_t r = 0; r < n; r++)
      std::memcpy(x + r * D, x_TD + token[r] * D, sizeof(float) * D);
    mm(gemm, false, true, n, F, D, x, up_HFD[h], hid);
    if (up_HF) add_rows(hid, up_HF[h], n, F);
    // As torch's relu, which lets NaN through.
    for (int64_t i = 0; i < n * F; i++) hid[i] = hid[i] <= 0 ? 0 : hid[i];
    mm(gemm, false, true, n, O, F, hid, down_HOF[h], y);
    if (down_HO) add_rows(y, down_HO[h], n, O);
    for (int64_t r = 0; r < n; r++) {
      const float w = weight_TE[token[r] * E + column_H[h]];
      float* out = y_TO + token[r] * O;
      for (int i = 0; i < O; i++) out[i] += w * y[r * O + i];
    }
    begin += n;
  }
}

// Gradients that nobody asks for are null.
void backward(Sgemm gemm, const float* grad_TO, const float* weight_TE, int64_t T, int64_t E,
              const int64_t* column_H, int64_t H, const int64_t* count_H, int D, int F, int O,
              const float* const* up_HFD, const float* const* down_HOF, const int64_t* token_R,
              const float* x_RD, const float* h_RF, const float* y_RO, float* gx_TD,
              float* gweight_TE, float* const* gup_HFD, float* const* gup_HF,
              float* const* gdown_HOF, float* const* gdown_HO) {
  int64_t most = 0;  // rows of one expert
  for (int64_t h = 0; h < H; h++) most = count_H[h] > most ? count_H[h] : most;
  const Room gy_room = room(most * O), gh_room = room(most * F), gx_room = room(most * D);
  float *gy_RO = gy_room.get(), *gh_RF = gh_room.get(), *gx_RD = gx_room.get();
  if (gx_TD) std::memset(gx_TD, 0, sizeof(float) * T * D);
  if (gweight_TE) std::memset(gweight_TE, 0, sizeof(float) * T * E);
  int64_t begin = 0;
  for (int64_t h = 0; h < H; h++) {
    const int64_t n = count_H[h];
    if (!n) continue;
    const int64_t* token = token_R + begin;
    const float *x = x_RD + begin * D, *hid = h_RF + begin * F, *y = y_RO + begin * O;
    for (int64_t r = 0; r < n; r++) {
      const float* grad = grad_TO + token[r] * O;
      const float w = weight_TE[token[r] * E + column_H[h]];
      for (int i = 0; i < O; i++) gy_RO[r * O + i] = w * grad[i];
      if (gweight_TE) gweight_TE[token[r] * E + column_H[h]] = dot(grad, y + r * O, O);
    }
    if (gdown_HOF[h]) mm(gemm, true, false, O, F, n, gy_RO, hid, gdown_HOF[h]);
    if (gdown_HO[h]) sum_rows(gdown_HO[h], gy_RO, n, O);
    if (gx_TD || gup_HFD[h] || gup_HF[h]) {
      mm(gemm, false, false, n, F, O, gy_RO, down_HOF[h], gh_RF);
      for (int64_t i = 0; i < n * F; i++) gh_RF[i] = hid[i] <= 0 ? 0 : gh_RF[i];
      if (gup_HFD[h]) mm(gemm, true, false, F, D, n, gh_RF, x, gup_HFD[h]);
      if (gup_HF[h]) sum_rows(gup_HF[h], gh_RF, n, F);
    }
    if (gx_TD) {
      mm(gemm, false, false, n, D, F, gh_RF, up_HFD[h], gx_RD);
      for (int64_t r = 0; r < n; r++) {
        float* out = gx_TD + token[r] * D;
        for (int i = 0; i < D; i++) out[i] += gx_RD[r * D + i];
      }
    }
    begin += n;
  }
}

}  // extern "C"
"""

MOST = 2**31 - 1  # of a number that the matrix product takes
PLAIN = (Tensor, torch.nn.Parameter)


class Parameters(NamedTuple):
    """Of experts of the same shapes, each list in the same order; no biases: empty lists."""

    up_HFD: Sequence[Tensor]
    up_HF: Sequence[Tensor]
    down_HOF: Sequence[Tensor]
    down_HO: Sequence[Tensor]


def available() -> bool:
    """Whether there is a compiled pass on this machine."""
    return _library() is not None


def run_ffns(
    x_TD: Tensor, weight_TE: Tensor, columns: Sequence[int], parameters: Parameters
) -> Tensor | None:
    """Each token's weighted sum of the outputs of the experts here, (T, O).

    None where it takes torch to tell, or to say what is wrong: all must be float32 on the CPU, of
    no class of their own, and of shapes that agree. An expert that no token weighs has no gradient,
    and tokens that weigh none have none. The result can be differentiated once.

    Args:
        columns: which column of `weight_TE` weighs each of the experts here.
    """
    if not _fit(x_TD, weight_TE, columns, parameters) or not available():
        return None
    out: Tensor = _FFNs.apply(  # type: ignore[no-untyped-call]
        x_TD.contiguous(),
        weight_TE.contiguous(),
        tuple(columns),
        len(parameters.up_HF) > 0,
        len(parameters.down_HO) > 0,
        *(t for tensors in parameters for t in tensors),
    )
    return out


class _FFNs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TE: Tensor,
        columns: tuple[int, ...],
        up_biased: bool,
        down_biased: bool,
        *tensors: Tensor,
    ) -> Tensor:
        library = _library()
        assert library is not None
        tensors = tuple(t.contiguous() for t in tensors)
        p = Parameters(*_apart(tensors, len(columns), up_biased, down_biased))
        (num_tokens, dim), num_experts, num_here = x_TD.shape, weight_TE.shape[1], len(columns)
        hidden, out_dim = len(p.up_HFD[0]), len(p.down_HOF[0])
        whole_3H = torch.empty(3, num_here, dtype=torch.int64)  # columns, counts, room
        whole_3H[0] = torch.tensor(columns)
        column_H, count_H, next_H = (_at(t) for t in whole_3H)
        rows = library.count_rows(
            _at(weight_TE), num_tokens, num_experts, column_H, num_here, count_H
        )
        token_R = torch.empty(rows, dtype=torch.int64)
        x_RD, h_RF = x_TD.new_empty(rows, dim), x_TD.new_empty(rows, hidden)
        y_RO, y_TO = x_TD.new_empty(rows, out_dim), x_TD.new_empty(num_tokens, out_dim)
        library.forward(
            sgemm_address(),
            _at(x_TD),
            _at(weight_TE),
            num_tokens,
            num_experts,
            column_H,
            num_here,
            count_H,
            next_H,
            dim,
            hidden,
            out_dim,
            _all_at(p.up_HFD),
            _all_at(p.up_HF) if up_biased else None,
            _all_at(p.down_HOF),
            _all_at(p.down_HO) if down_biased else None,
            _at(token_R),
            _at(x_RD),
            _at(h_RF),
            _at(y_RO),
            _at(y_TO),
        )
        ctx.save_for_backward(weight_TE, whole_3H, token_R, x_RD, h_RF, y_RO, *tensors)
        ctx.biased = up_biased, down_biased
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        library = _library()
        assert library is not None
        weight_TE, whole_3H, token_R, x_RD, h_RF, y_RO, *tensors = ctx.saved_tensors
        num_here = whole_3H.shape[1]
        p = Parameters(*_apart(tensors, num_here, *ctx.biased))
        dim, hidden, out_dim = x_RD.shape[1], h_RF.shape[1], y_RO.shape[1]
        num_tokens, num_experts = weight_TE.shape
        counts = whole_3H[1].tolist()
        wants_x, wants_weight = ctx.needs_input_grad[0] and any(counts), ctx.needs_input_grad[1]
        gx_TD = x_RD.new_empty(num_tokens, dim) if wants_x else None
        gweight_TE = torch.empty_like(weight_TE) if wants_weight else None
        wanted = _wanted(ctx.needs_input_grad[5:], counts)
        grads = [torch.empty_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]
        gup_HFD, gup_HF, gdown_HOF, gdown_HO = _apart(grads, num_here, *ctx.biased)
        grad_TO = grad_TO.contiguous()
        nothing: list[Tensor | None] = [None] * num_here
        library.backward(
            sgemm_address(),
            _at(grad_TO),
            _at(weight_TE),
            num_tokens,
            num_experts,
            _at(whole_3H[0]),
            num_here,
            _at(whole_3H[1]),
            dim,
            hidden,
            out_dim,
            _all_at(p.up_HFD),
            _all_at(p.down_HOF),
            _at(token_R),
            _at(x_RD),
            _at(h_RF),
            _at(y_RO),
            None if gx_TD is None else _at(gx_TD),
            None if gweight_TE is None else _at(gweight_TE),
            _all_at(gup_HFD),
            _all_at(gup_HF or nothing),
            _all_at(gdown_HOF),
            _all_at(gdown_HO or nothing),
        )
        return gx_TD, gweight_TE, None, None, None, *grads


def _apart(
    tensors: Sequence[Any], num_here: int, up_biased: bool, down_biased: bool
) -> list[Sequence[Any]]:
    """What belongs to each of `Parameters`, of one flat sequence."""
    parts = []
    for there in (True, up_biased, True, down_biased):
        parts.append(tensors[:num_here] if there else ())
        tensors = tensors[len(parts[-1]) :]
    return parts


def _wanted(needs: Sequence[bool], counts: Sequence[int]) -> list[bool]:
    """Whether each tensor needs a gradient and its expert has rows; experts go round in `needs`."""
    return [need and counts[i % len(counts)] > 0 for i, need in enumerate(needs)]


def _at(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _all_at(tensors: Sequence[Tensor | None]) -> Any:
    at = [None if t is None else t.data_ptr() for t in tensors]
    return (ctypes.c_void_p * len(at))(*at)


def _fit(
    x_TD: Tensor, weight_TE: Tensor, columns: Sequence[int], parameters: Parameters
) -> bool:
    """Whether compiled code would survive these. Asked at every step, so it asks in a few words."""
    up_HFD, up_HF, down_HOF, down_HO = parameters
    num_here = len(columns)
    if not num_here or len(up_HFD) != num_here or len(down_HOF) != num_here:
        return False
    if len(up_HF) not in (0, num_here) or len(down_HO) not in (0, num_here):
        return False
    up, down, x, weight = up_HFD[0].shape, down_HOF[0].shape, x_TD.shape, weight_TE.shape
    if not len(up) == len(down) == len(x) == len(weight) == 2:
        return False
    fit = x[1] == up[1] and down[1] == up[0] and x[0] == weight[0]
    widest = max(up[0], up[1], down[0])
    if not fit or min(columns) < 0 or max(columns) >= weight[1] or x[0] * num_here * widest > MOST:
        return False
    parts: tuple[tuple[Sequence[Tensor], Sequence[int]], ...]
    parts = (
        (up_HFD, up),
        (down_HOF, down),
        (up_HF, up[:1]),
        (down_HO, down[:1]),
        ((x_TD,), x),
        ((weight_TE,), weight),
    )
    return all(
        type(t) in PLAIN and t.dtype is torch.float32 and t.is_cpu and t.shape == shape
        for tensors, shape in parts
        for t in tensors
    )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = None if sgemm_address() is None else compiled(SOURCE)
    if library is not None:
        at: Any = ctypes.c_void_p
        whole: Any = ctypes.c_int64
        number: Any = ctypes.c_int
        library.count_rows.restype = whole
        library.count_rows.argtypes = [at, whole, whole, at, whole, at]
        sizes = [number] * 3
        library.forward.restype = library.backward.restype = None
        library.forward.argtypes = [at] * 3 + [whole, whole, at, whole, at, at] + sizes + [at] * 9
        library.backward.argtypes = [at] * 3 + [whole, whole, at, whole, at] + sizes + [at] * 12
    return library
