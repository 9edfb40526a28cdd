"""The weights of a top-k gate in one compiled pass over its logits.

Shape suffixes: T tokens, E experts, K chosen.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmoe.native.build import compiled

SOURCE = r"""
#include <cmath>
#include <cstdint>

namespace {

// The K highest of the row, which is used up; false where a number is missing or not one.
bool pick(float* rest_E, int64_t E, int64_t K, int64_t* best) {
  int strange = 0;
  for (int64_t e = 0; e < E; e++) strange |= rest_E[e] != rest_E[e];
  if (strange) return false;
  for (int64_t i = 0; i < K; i++) {
    float most = -INFINITY;
    int64_t place = -1;
    for (int64_t e = 0; e < E; e++) {  // without a branch, which nobody could foretell
      const bool more = rest_E[e] > most;
      most = more ? rest_E[e] : most;
      place = more ? e : place;
    }
    if (place < 0) return false;
    best[i] = place;
    rest_E[place] = -INFINITY;
  }
  return true;
}

// As `pick`, for any row; false if there are fewer than K.
bool pick_slowly(const float* logit, const bool* choosable_E, int64_t E, int64_t K, int64_t* best) {
  int64_t found = 0;  // best[0..found) are in order of logit
  for (int64_t e = 0; e < E; e++) {
    if (!choosable_E[e]) continue;
    const float v = logit[e];
    int64_t place = found;
    while (place > 0) {
      const float other = logit[best[place - 1]];
      if (!(v > other || (v != v && other == other))) break;
      place--;
    }
    if (place >= K) continue;
    if (found < K) found++;
    for (int64_t i = found - 1; i > place; i--) best[i] = best[i - 1];
    best[place] = e;
  }
  return found == K;
}

}  // namespace

extern "C" {

// Softmax over each row's k highest choosable logits, highest first; of equal ones, the first wins,
// and NaN, which shall show in the loss, wins over all. False if there are fewer than K.
// `rest_E` is room to work in.
bool weigh(const float* logit_TE, const bool* choosable_E, int64_t T, int64_t E, int64_t K,
           float* rest_E, int64_t* best_TK, float* weight_TK, float* weight_TE) {
  for (int64_t t = 0; t < T; t++) {
    const float* logit = logit_TE + t * E;
    int64_t* best = best_TK + t * K;
    float *w = weight_TK + t * K, *out = weight_TE + t * E;
    for (int64_t e = 0; e < E; e++) {
      rest_E[e] = choosable_E[e] ? logit[e] : -INFINITY;
      out[e] = 0;
    }
    if (!pick(rest_E, E, K, best) && !pick_slowly(logit, choosable_E, E, K, best)) return false;
    float sum = 0;
    for (int64_t i = 0; i < K; i++) {
      w[i] = std::exp(logit[best[i]] - logit[best[0]]);
      sum += w[i];
    }
    for (int64_t i = 0; i < K; i++) {
      w[i] /= sum;
      out[best[i]] = w[i];
    }
  }
  return true;
}

void grade(const int64_t* best_TK, const float* weight_TK, const float* grad_TE, int64_t T,
           int64_t E, int64_t K, float* glogit_TE) {
  for (int64_t t = 0; t < T; t++) {
    const int64_t* best = best_TK + t * K;
    const float *w = weight_TK + t * K, *grad = grad_TE + t * E;
    float* out = glogit_TE + t * E;
    float mean = 0;
    for (int64_t e = 0; e < E; e++) out[e] = 0;
    for (int64_t i = 0; i < K; i++) mean += w[i] * grad[best[i]];
    for (int64_t i = 0; i < K; i++) out[best[i]] = w[i] * (grad[best[i]] - mean);
  }
}

}  // extern "C"
"""


def available() -> bool:
    """Whether there is a compiled pass on this machine."""
    return _library() is not None


def top_k_softmax(logit_TE: Tensor, choosable_E: Tensor, k: int) -> Tensor:
    """Softmax over each row's k highest choosable logits, 0 elsewhere; (T, E).

    Of equal logits, lower expert numbers win. It can be differentiated once.

    Raises:
        ValueError: logits are not float32 on the CPU, or fewer than k experts are choosable.
    """
    if logit_TE.dtype != torch.float32 or logit_TE.device.type != "cpu" or logit_TE.dim() != 2:
        raise ValueError(
            f"logit_TE must be float32 on the CPU with 2 dimensions, got {logit_TE.dtype} on "
            f"{logit_TE.device} with {logit_TE.dim()}"
        )
    if choosable_E.dtype != torch.bool or choosable_E.shape != logit_TE.shape[1:]:
        raise ValueError(
            f"choosable_E must be bool of shape {tuple(logit_TE.shape[1:])}, got "
            f"{choosable_E.dtype} of shape {tuple(choosable_E.shape)}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1 expert, got {k}")
    out: Tensor = _TopKSoftmax.apply(logit_TE, choosable_E, k)  # type: ignore[no-untyped-call]
    return out


class _TopKSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logit_TE: Tensor, choosable_E: Tensor, k: int) -> Tensor:
        library = _library()
        assert library is not None
        logit_TE, choosable_E = logit_TE.contiguous(), choosable_E.contiguous()
        num_tokens, num_experts = logit_TE.shape
        best_TK = torch.empty(num_tokens, k, dtype=torch.int64)
        rest_E = logit_TE.new_empty(num_experts)
        weight_TK, weight_TE = logit_TE.new_empty(num_tokens, k), torch.empty_like(logit_TE)
        enough = library.weigh(
            logit_TE.data_ptr(),
            choosable_E.data_ptr(),
            num_tokens,
            num_experts,
            k,
            rest_E.data_ptr(),
            best_TK.data_ptr(),
            weight_TK.data_ptr(),
            weight_TE.data_ptr(),
        )
        if not enough:
            raise ValueError(
                f"k must be at most the {int(choosable_E.sum())} choosable experts, got {k}"
            )
        ctx.save_for_backward(best_TK, weight_TK)
        return weight_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None, None]:
        library = _library()
        assert library is not None
        best_TK, weight_TK = ctx.saved_tensors
        grad_TE = grad_TE.contiguous()
        glogit_TE = torch.empty_like(grad_TE)
        library.grade(
            best_TK.data_ptr(),
            weight_TK.data_ptr(),
            grad_TE.data_ptr(),
            *grad_TE.shape,
            best_TK.shape[1],
            glogit_TE.data_ptr(),
        )
        return glogit_TE, None, None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = compiled(SOURCE)
    if library is not None:
        at: Any = ctypes.c_void_p
        whole: Any = ctypes.c_int64
        library.weigh.restype, library.grade.restype = ctypes.c_bool, None
        library.weigh.argtypes = [at, at, whole, whole, whole, at, at, at, at]
        library.grade.argtypes = [at, at, at, whole, whole, whole, at]
    return library
