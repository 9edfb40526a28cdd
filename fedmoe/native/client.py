"""All local steps of one client in one call: a compiled loop over batches and stages.

Small models spend a step of torch on calling operations. Here a client's part of the model is
copied side by side into memory that stays in the cache, padded to whole vectors, trained there by
stochastic gradient descent, and copied back. Experts that are not held are not there; experts
without tokens in a step are skipped. With plain steps no gradient of a weight is ever stored: it is
added to the weight as its product is formed. Matrix products are written here, since the batches of
small models are too small for a BLAS. The result does not depend on who else is trained, but its
last bits depend on how wide the processor's vectors are.

Shape suffixes: N examples, E experts, L MoE layers, D width.
"""

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedmoe.native.build import compiled

Activation = Literal["relu", "gelu"] | None
ACTIVATIONS: Mapping[Activation, int] = {None: 0, "relu": 1, "gelu": 2}


class Weight(NamedTuple):
    """A parameter, trained in place: contiguous float32 on the CPU."""

    value: Tensor
    moves: bool = True
    received: Tensor | None = None  # what a proximal term pulls towards, and slopes begin at
    shift: Tensor | None = None  # added to each step's gradient, before it is clipped
    met: "Met | None" = None  # what the gradients were, without the shift


class Met(NamedTuple):
    """Written in training."""

    total: Tensor  # the sum of a parameter's gradients, of its shape
    steps: Tensor  # (1,) int64: in how many steps it had one


class Linear(NamedTuple):
    weight: Weight  # (out, in)
    bias: Weight | None


class Dense(NamedTuple):
    map: Linear
    activation: Activation


class Expert(NamedTuple):
    up: Linear
    down: Linear
    activation: Activation


class Mixture(NamedTuple):
    gate: Weight  # (E, D)
    known_E: Sequence[bool]  # experts whose gate rows count
    experts: Mapping[int, Expert]  # those held, by number
    k: int
    full: bool  # weights are scores; else the scores of the k chosen, over their sum
    residual: bool
    scale: float = 1.0  # of weights that are not scores


class Norm(NamedTuple):
    """Batch normalisation, by the means and variances of each step's examples."""

    weight: Weight  # (channels,)
    bias: Weight
    mean: Tensor  # running, as all that follow is for use after training; written
    var: Tensor
    momentum: float  # the share of a step's own in the running ones
    eps: float


class Convolution(NamedTuple):
    weight: Weight  # (out channels, kernel height, kernel width, in channels)
    bias: Weight
    size: tuple[int, int]  # of the pictures that come in
    pool: tuple[int, int]
    last: bool  # no convolution follows: what comes out is flat, channel by channel
    norm: Norm | None = None  # before the pool


class Embedding(NamedTuple):
    """Every code that comes in gives its row; an example's rows lie side by side."""

    table: Weight  # (number of codes, width)


Stage = Dense | Mixture | Convolution | Embedding


class Settings(NamedTuple):
    lr: float
    batch_size: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    balance: float = 0.0
    z: float = 0.0
    clip: float | None = None
    proximal: float = 0.0
    slope: bool = False  # whether it is wanted


class Used(NamedTuple):
    """How it went, summed over examples and epochs."""

    loss: float  # not a finite number where the training got lost
    count_LE: Tensor
    weight_LE: Tensor
    score_LE: Tensor
    # The sum over steps of the inner product of a step's gradient, before shifts and clipping, and
    # the distance of the weights from those received; 0 where it is not wanted.
    slope: float = 0.0


def available() -> bool:
    """Whether `train` can be called here."""
    return compiled(SOURCE) is not None


def train(
    stages: Sequence[Stage],
    x_N: Tensor,
    y_N: Tensor,
    order: Tensor,
    num_classes: int,
    num_experts: int,
    settings: Settings,
) -> Used:
    """Train in place, once through each row of `order`, (epochs, N) indices of examples.

    Args:
        x_N: float32, channels last where the first stage is a convolution; codes, as int32, where
            it is an embedding.
        num_experts: E of the result; a layer with fewer has zeros behind its last one.

    Raises:
        RuntimeError: compiled kernels cannot be had here, or memory cannot.
        ValueError: tensors do not fit each other, or are not what the kernel can take.
    """
    library = compiled(SOURCE)
    if library is None:
        raise RuntimeError("compiled kernels are not available here: train in torch")
    codes = [len(s.table.value) for s in stages[:1] if isinstance(s, Embedding)]
    _check_examples(x_N, y_N, order, codes, num_classes, settings)
    told = _Telling()
    width = told.tell(stages, tuple(x_N.shape[1:]))
    if width != num_classes:
        raise ValueError(f"the last stage must have {num_classes} outputs, got {width}")
    layers = sum(isinstance(s, Mixture) for s in stages)
    shape = max(layers, 1), max(num_experts, 1)
    for s in stages:
        if isinstance(s, Mixture) and len(s.known_E) > num_experts:
            raise ValueError(f"num_experts must be at least {len(s.known_E)}, got {num_experts}")
    count_LE = torch.zeros(shape, dtype=torch.int64)
    weight_LE, score_LE = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    loss, slope = ctypes.c_double(0.0), ctypes.c_double(0.0)
    weights, compares = told.weights, settings.proximal != 0 or settings.slope
    program = told.program()
    failed = library.train(
        (ctypes.c_int64 * len(program))(*program),
        _pointers([w.value for w in weights]),
        _pointers([w.received if compares and w.moves else None for w in weights]),
        _pointers([w.shift if w.moves else None for w in weights]),
        _pointers([w.met.total if w.met and w.moves else None for w in weights]),
        _pointers([w.met.steps if w.met and w.moves else None for w in weights]),
        ctypes.byref(_settings(settings, num_classes, x_N[0].numel())),
        ctypes.c_void_p(x_N.data_ptr()),
        ctypes.c_void_p(y_N.data_ptr()),
        ctypes.c_void_p(order.data_ptr()),
        ctypes.c_int64(len(order)),
        ctypes.c_int64(len(y_N)),
        ctypes.byref(loss),
        ctypes.byref(slope),
        ctypes.c_void_p(count_LE.data_ptr()),
        ctypes.c_void_p(weight_LE.data_ptr()),
        ctypes.c_void_p(score_LE.data_ptr()),
        ctypes.c_int64(shape[1]),
    )
    if failed:
        raise RuntimeError("there is not enough memory to train this model")
    end = layers, num_experts
    count_LE, weight_LE, score_LE = (
        t[: end[0], : end[1]] for t in (count_LE, weight_LE, score_LE)
    )
    return Used(loss.value, count_LE, weight_LE, score_LE, slope.value)


class _Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in (
            "lr", "momentum", "weight_decay", "label_smoothing", "balance", "z", "clip", "proximal"
        )),
        *((name, ctypes.c_int64) for name in ("clips", "slopes", "batch", "classes", "features")),
    ]


def _settings(s: Settings, num_classes: int, features: int) -> _Settings:
    clip = 0.0 if s.clip is None else s.clip
    return _Settings(
        s.lr, s.momentum, s.weight_decay, s.label_smoothing, s.balance, s.z, clip, s.proximal,
        s.clip is not None, s.slope, s.batch_size, num_classes, features,
    )


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(0 if t is None else t.data_ptr() for t in tensors))


def _check_examples(
    x_N: Tensor,
    y_N: Tensor,
    order: Tensor,
    codes: Sequence[int],  # how many there are, where x_N is codes
    num_classes: int,
    settings: Settings,
) -> None:
    num = len(y_N)
    if not num or len(x_N) != num or order.shape[1:] != (num,) or not len(order):
        raise ValueError(
            f"x, y and order must tell of the same examples, and of some, got {tuple(x_N.shape)}, "
            f"{tuple(y_N.shape)} and {tuple(order.shape)}"
        )
    _check_tensor("x", x_N, torch.int32 if codes else torch.float32)
    for name, t in (("y", y_N), ("order", order)):
        _check_tensor(name, t, torch.int64)
    limits = [("labels", y_N, num_classes), ("order", order, num)]
    for name, t, limit in (*limits, *(("codes", x_N, n) for n in codes)):
        low, high = (int(v) for v in t.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must be from 0 to {limit - 1}, got {low} to {high}")
    if settings.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {settings.batch_size}")


def _check_tensor(name: str, t: Tensor, dtype: torch.dtype) -> None:
    if t.dtype != dtype or not t.is_cpu or not t.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} on the CPU, got {t.dtype} on {t.device} with "
            f"strides {t.stride()}"
        )


class _Telling:
    """Stages as whole numbers, in the order in which the compiled reader takes them."""

    def __init__(self) -> None:
        self.weights: list[Weight] = []
        self.shapes: list[int] = []
        self.numbers: list[int] = []

    def program(self) -> list[int]:
        return [len(self.weights), *self.shapes, *self.numbers]

    def tell(self, stages: Sequence[Stage], shape: tuple[int, ...]) -> int:
        """Returns the width of what comes out."""
        if not stages:
            raise ValueError("stages must be at least 1, got none")
        self.numbers.append(len(stages))
        picture: tuple[int, ...] | None = shape if isinstance(stages[0], Convolution) else None
        width = 1
        for n in shape:
            width *= n
        for i, stage in enumerate(stages):
            if isinstance(stage, Convolution):
                if picture is None:
                    raise ValueError("a convolution must come before all else")
                picture, width = self._convolution(stage, picture, i == 0)
                picture = None if stage.last else picture
                continue
            if picture is not None:
                raise ValueError("the convolution before another stage must be the last")
            match stage:
                case Dense(map, activation):
                    self.numbers.append(0)
                    width = self._linear(map, width, flip=i == 0)
                    self.numbers.append(ACTIVATIONS[activation])
                case Mixture():
                    width = self._mixture(stage, width)
                case Embedding(table):
                    if i:
                        raise ValueError("an embedding must come before all else")
                    rows, each = table.value.shape
                    self.numbers += [3, width, each, self._weight(table, (rows, each), 0)]
                    width *= each
        if picture is not None:
            raise ValueError("the last convolution must say so")
        return width

    def _linear(self, map: Linear, width: int, flip: bool = False) -> int:
        out, wide = map.weight.value.shape
        if wide != width:
            raise ValueError(f"a linear map must take width {width}, got {wide}")
        # Kept such that the product over the longer side is the one that runs along rows.
        layout = 1 if flip or wide < out else 0
        self.numbers += [wide, out, self._weight(map.weight, (out, wide), layout)]
        self.numbers.append(-1 if map.bias is None else self._weight(map.bias, (1, out), 2))
        return int(out)

    def _mixture(self, m: Mixture, width: int) -> int:
        outs = {len(e.down.weight.value) for e in m.experts.values()}
        hiddens = {len(e.up.weight.value) for e in m.experts.values()}
        num = len(m.known_E)
        if len(outs) != 1 or len(hiddens) != 1:
            raise ValueError("a MoE layer must hold experts, and all of the same widths")
        [out], [hidden] = outs, hiddens
        if not 1 <= m.k <= len(m.experts):
            raise ValueError(f"k must be from 1 to the {len(m.experts)} held, got {m.k}")
        if any(not 0 <= e < num or not m.known_E[e] for e in m.experts):
            raise ValueError(f"held experts must be among the {num} known, got {[*m.experts]}")
        if m.residual and out != width:
            raise ValueError(f"a residual must keep width {width}, got {out}")
        self.numbers += [1, width, out, hidden, num, m.k, m.full, m.residual, _bits(m.scale)]
        self.numbers.append(self._weight(m.gate, (num, width), 0))
        self.numbers += [int(known) for known in m.known_E]
        self.numbers.append(len(m.experts))
        for e in sorted(m.experts):
            up, down, activation = m.experts[e]
            self.numbers += [e, ACTIVATIONS[activation]]
            self._linear(up, width)
            self._linear(down, hidden)
        return out

    def _convolution(
        self, c: Convolution, shape: tuple[int, ...], first: bool
    ) -> tuple[tuple[int, int, int], int]:
        out, kh, kw, channels = c.weight.value.shape
        (height, width), (ph, pw) = c.size, c.pool
        if shape != (height, width, channels):
            raise ValueError(f"a convolution must take {shape}, got {(height, width, channels)}")
        high, wide = (height - kh + 1) // ph, (width - kw + 1) // pw
        if high < 1 or wide < 1:
            raise ValueError(f"a picture must be larger than kernel and pool, got {c.size}")
        self.numbers += [2, first, channels, c.last, height, width, kh, kw, ph, pw, out]
        cols = kh * kw * channels
        self.numbers.append(self._weight(c.weight, (out, cols), 1))
        self.numbers.append(self._weight(c.bias, (1, out), 2))
        self.numbers.append(c.norm is not None)
        if c.norm is not None:
            self._norm(c.norm, out, (height - kh + 1) * (width - kw + 1))
        return (high, wide, out), high * wide * out

    def _norm(self, n: Norm, channels: int, area: int) -> None:
        if area < 2:
            raise ValueError("a normalised picture must have more than one place, got 1")
        shape = 1, channels
        self.numbers += [self._weight(w, shape, 2) for w in (n.weight, n.bias)]
        self.numbers += [
            self._weight(Weight(t, moves=False), shape, 2, written=True) for t in (n.mean, n.var)
        ]
        self.numbers += [_bits(n.momentum), _bits(n.eps)]

    def _weight(
        self, w: Weight, shape: tuple[int, int], layout: int, written: bool = False
    ) -> int:
        """`written`: it has no gradient, and is brought back all the same."""
        for t in (w.value, w.received, w.shift, w.met and w.met.total):
            if t is None:
                continue
            _check_tensor("a parameter", t, torch.float32)
            if t.numel() != shape[0] * shape[1]:
                raise ValueError(f"a parameter must be {shape}, got {tuple(t.shape)}")
        if w.met is not None:
            _check_tensor("steps", w.met.steps, torch.int64)
        self.weights.append(w)
        self.shapes += [*shape, w.moves, layout, written]
        return len(self.weights) - 1


def _bits(number: float) -> int:
    """A float64 as the whole number of the same bits."""
    [whole] = struct.unpack("<q", struct.pack("<d", number))
    return int(whole)


SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDEST = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, WIDEST = 2;
#else
constexpr int LANES = 4, WIDEST = 2;
#endif
constexpr int TALLEST = 6;  // rows times vectors of a block, and one row of vectors, fit registers

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

static inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// ---- Matrix products. All widths are whole vectors: what lies behind a row's end is zeros.

enum Then { SET, ADD, STEP };  // c = ab, c += ab, c += alpha ab

// The left operand's row i and depth p are at i * row + p * depth. The depth of a picture's window
// is cut into `turns` pieces, each `leap` further on in the left operand, `leap_b` in the right.
struct Walk { int64_t row, depth, turns = 1, leap = 0, leap_b = 0; };

template <int M, int N, Then THEN>
static void block(const float* a, Walk s, const float* b, int64_t ldb, float* c, int64_t ldc,
                  int64_t depth, float alpha) {
  Vec sum[M][N] = {};
  for (int64_t t = 0; t < s.turns; t++) {
    const float *at = a + t * s.leap, *bt = b + t * s.leap_b;
    for (int64_t p = 0; p < depth; p++, at += s.depth, bt += ldb) {
      Vec row[N];
      for (int j = 0; j < N; j++) row[j] = load(bt + j * LANES);
      for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sum[i][j] += at[i * s.row] * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      float* out = c + i * ldc + j * LANES;
      if (THEN == SET) store(out, sum[i][j]);
      if (THEN == ADD) store(out, load(out) + sum[i][j]);
      if (THEN == STEP) store(out, load(out) + alpha * sum[i][j]);
    }
}

template <int N, Then THEN>
static void panel(const float* a, Walk s, const float* b, int64_t ldb, float* c, int64_t ldc,
                  int64_t rows, int64_t depth, float alpha) {
  for (int64_t left = rows; left > 0;) {
    int64_t blocks = (left + TALLEST - 1) / TALLEST, m = (left + blocks - 1) / blocks;
    switch (m) {
      case 1: block<1, N, THEN>(a, s, b, ldb, c, ldc, depth, alpha); break;
      case 2: block<2, N, THEN>(a, s, b, ldb, c, ldc, depth, alpha); break;
      case 3: block<3, N, THEN>(a, s, b, ldb, c, ldc, depth, alpha); break;
      case 4: block<4, N, THEN>(a, s, b, ldb, c, ldc, depth, alpha); break;
      case 5: block<5, N, THEN>(a, s, b, ldb, c, ldc, depth, alpha); break;
      case 6: block<6, N, THEN>(a, s, b, ldb, c, ldc, depth, alpha); break;
    }
    a += m * s.row;
    c += m * ldc;
    left -= m;
  }
}

template <Then THEN>
static void product(const float* a, Walk s, const float* b, int64_t ldb, float* c, int64_t ldc,
                    int64_t rows, int64_t width, int64_t depth, float alpha = 1) {
  int64_t j = 0;
  for (; j + WIDEST * LANES <= width; j += WIDEST * LANES)
    panel<WIDEST, THEN>(a, s, b + j, ldb, c + j, ldc, rows, depth, alpha);
  if (WIDEST > 2 && j + 2 * LANES <= width) {
    panel<2, THEN>(a, s, b + j, ldb, c + j, ldc, rows, depth, alpha);
    j += 2 * LANES;
  }
  for (; j + LANES <= width; j += LANES)
    panel<1, THEN>(a, s, b + j, ldb, c + j, ldc, rows, depth, alpha);
}

// One vector with the sums of LANES vectors, by halving their number again and again.
template <int S>
static inline void fold(Vec* v) {
  Ints low, high;
  for (int l = 0; l < LANES; l++) {
    low[l] = l & S ? LANES + l - S : l;
    high[l] = l & S ? LANES + l : l + S;
  }
  for (int i = 0; i < LANES / S; i += 2) {
    Vec x = v[i], y = v[i + 1];
    v[i / 2] = __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, high);
  }
  if constexpr (2 * S < LANES) fold<2 * S>(v);
}

// c = a b^T, rows of b in whole vectors too.
static void dots(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                 int64_t rows, int64_t width, int64_t depth) {
  for (int64_t j = 0; j < width; j += LANES)
    for (int64_t i = 0; i < rows; i++) {
      Vec sum[LANES] = {};
      for (int64_t p = 0; p < depth; p += LANES) {
        Vec x = load(a + i * lda + p);
        for (int l = 0; l < LANES; l++) sum[l] += x * load(b + (j + l) * ldb + p);
      }
      fold<1>(sum);
      store(c + i * ldc + j, sum[0]);
    }
}

static float dot(const float* a, const float* b, int64_t width) {
  Vec sum = {};
  for (int64_t j = 0; j < width; j += LANES) sum += load(a + j) * load(b + j);
  float total = 0;
  for (int l = 0; l < LANES; l++) total += sum[l];
  return total;
}

// The inner product of a and b - c.
static float along(const float* a, const float* b, const float* c, int64_t width) {
  Vec sum = {};
  for (int64_t j = 0; j < width; j += LANES) sum += load(a + j) * (load(b + j) - load(c + j));
  float total = 0;
  for (int l = 0; l < LANES; l++) total += sum[l];
  return total;
}

static void add_scaled(float* to, const float* from, float by, int64_t width) {
  for (int64_t j = 0; j < width; j += LANES) store(to + j, load(to + j) + by * load(from + j));
}

// ---- Memory of one call, kept by the thread for its next: whole cache lines, zeros.

struct Arena {
  float* memory = nullptr;
  int64_t capacity = 0, used = 0;
  bool counting = true;  // first it is only counted how much is wanted

  float* take(int64_t size) {
    int64_t at = used;
    used += (size + 15) / 16 * 16;
    return counting ? nullptr : memory + at;
  }
  bool begin() {
    if (used > capacity) {
      std::free(memory);
      memory = static_cast<float*>(std::aligned_alloc(64, used * sizeof(float)));
      capacity = memory ? used : 0;
    }
    if (memory) std::memset(memory, 0, used * sizeof(float));
    used = 0;
    counting = false;
    return memory != nullptr;
  }
  ~Arena() { std::free(memory); }
};

// ---- Parameters.

struct Settings {
  double lr, momentum, weight_decay, label_smoothing, balance, z, clip, proximal;
  int64_t clips, slopes, batch, classes, features;
};

// A parameter as we keep it: padded, and transposed where that makes for better products.
struct Matrix {
  float *theirs = nullptr, *their_met = nullptr;
  const float *received = nullptr, *their_shift = nullptr;
  int64_t* steps = nullptr;  // in which it had a gradient; wanted where `met` is
  int64_t rows = 0, cols = 0, chunk = 0, chunk_padded = 0;
  bool moves = false, flipped = false, vector = false, touched = false, written = false;
  int64_t height = 0, width = 0;
  // Weight, gradient, momentum, what it is pulled to, its shift, and the gradients' sum.
  float *w = nullptr, *g = nullptr, *v = nullptr, *r = nullptr, *shift = nullptr, *met = nullptr;

  int64_t size() const { return height * width; }
  // Calls `pass(theirs, ours, n)` with the places of n numbers; in tiles, so that what is
  // transposed goes through the cache well.
  template <class Pass>
  void runs(Pass pass) const {
    constexpr int64_t TILE = 16;
    for (int64_t top = 0; top < rows; top += TILE)
      for (int64_t begin = 0; begin < cols; begin += chunk)
        for (int64_t left = 0; left < chunk; left += flipped ? TILE : chunk)
          for (int64_t i = top; i < std::min(top + TILE, rows); i++) {
            int64_t n = flipped ? std::min(TILE, chunk - left) : chunk;
            int64_t at = begin / chunk * chunk_padded + left;
            pass(i * cols + begin + left, flipped ? at * width + i : i * width + at, n);
          }
  }
  void copy(const float* from, float* to) const {
    runs([&](int64_t a, int64_t b, int64_t n) {
      if (flipped)
        for (int64_t j = 0; j < n; j++) to[b + j * width] = from[a + j];
      else
        std::memcpy(to + b, from + a, n * sizeof(float));
    });
  }
  void give_back(const float* from, float* to) const {
    runs([&](int64_t a, int64_t b, int64_t n) {
      if (flipped)
        for (int64_t j = 0; j < n; j++) to[a + j] = from[b + j * width];
      else
        std::memcpy(to + a, from + b, n * sizeof(float));
    });
  }
};

enum Activation { NONE, RELU, GELU };

static void activate(float* a, float* before, int64_t size, int how) {
  if (how == RELU)
    for (int64_t i = 0; i < size; i++) a[i] = a[i] < 0 ? 0 : a[i];  // NaN stays
  if (how == GELU)
    for (int64_t i = 0; i < size; i++) {
      float x = before[i] = a[i];
      a[i] = 0.5f * x * (1 + std::erf(x * 0.70710678118654752f));
    }
}

static void deactivate(float* g, const float* a, const float* before, int64_t size, int how) {
  if (how == RELU)
    for (int64_t i = 0; i < size; i++) g[i] = a[i] > 0 ? g[i] : 0;
  if (how == GELU)
    for (int64_t i = 0; i < size; i++) {
      float x = before[i];
      float share = 0.5f * (1 + std::erf(x * 0.70710678118654752f));
      g[i] *= share + x * 0.39894228040143268f * std::exp(-0.5f * x * x);
    }
}

struct Linear {
  Matrix *weight = nullptr, *bias = nullptr;
  int64_t in = 0, out = 0;  // padded
};

// ---- Stages: what a model does, one after another.

struct Dense {
  Linear map;
  int how = NONE;
  float* before = nullptr;
};

struct Expert {
  int64_t number;
  Linear up, down;
  int how;
};

struct Mixture {
  int64_t experts = 0, k = 1;
  bool full = false, residual = false;
  double scale = 1;
  Matrix* gate = nullptr;
  std::vector<uint8_t> known, held;
  std::vector<int> slot;  // of an expert's number among the held
  std::vector<Expert> held_experts;
  int64_t in = 0, out = 0, hidden = 0, wide = 0;  // padded; `wide` is that of gate rows
  float *y, *gy, *logit, *glogit, *score, *x_R, *a_R, *before_R, *y_R, *gy_R, *ga_R, *gx_R;
  float *row_weight, *choice_weight;  // by sorted row; by token and choice
  int32_t *chosen, *token_R, *row_of;
  std::vector<int64_t> start, tally;
  int64_t *count;
  double *weight_sum, *score_sum;
};

// Batch normalisation of a convolution's output.
struct Norm {
  Matrix *weight = nullptr, *bias = nullptr, *mean = nullptr, *var = nullptr;
  double momentum = 0, eps = 0;
  float *by, *one, *other;  // by channel: one over a step's deviation, and two sums
};

// A convolution of whole pictures (channels last), the largest of each pool, and a ReLU.
struct Conv {
  Matrix *weight = nullptr, *bias = nullptr;
  bool normed = false;
  Norm norm;
  int64_t height, width, channels;        // of the input; channels padded unless it is the first
  int64_t kh, kw, ph, pw;                 // of kernel and pool
  int64_t oh, ow, out;                    // after the convolution; channels padded
  int64_t qh, qw, real;                   // after the pool; channels without padding
  bool last = false;                      // the last gives (channels, height, width), flat
  float *full, *gfull, *y, *gy, *flat, *gflat, *turned;
  int32_t* best;
  int64_t flat_width;
};

// Rows of a table side by side, one for each code of an example.
struct Embedding {
  Matrix* table = nullptr;
  int64_t codes = 0, each = 0;  // of an example; numbers of a row, without padding
  float* sum = nullptr;         // a step's gradient

  static int64_t code(const float* x) {  // codes are int32, where other models have numbers
    int32_t code;
    std::memcpy(&code, x, sizeof code);
    return code;
  }
};

enum Kind { DENSE, MIXTURE, CONV, EMBEDDING };

struct Stage {
  int kind;
  Dense dense;
  Mixture mix;
  Conv conv;
  Embedding embed;
  float *out = nullptr, *gout = nullptr;
  int64_t width = 0;  // of `out`
};

struct Client {
  Settings set;
  std::vector<Matrix> params;
  std::vector<Stage> stages;
  std::vector<uint8_t> wanted;  // of a stage's input: its gradient
  bool fused = false, broken = false;
  float* x = nullptr;
  int64_t x_width = 0;
  double slope = 0;

  void linear(const Linear& m, const float* x, int64_t ldx, float* y, int64_t ldy, int64_t rows) {
    if (m.weight->flipped)
      product<SET>(x, {ldx, 1}, m.weight->w, m.weight->width, y, ldy, rows, m.out, m.in);
    else
      dots(x, ldx, m.weight->w, m.weight->width, y, ldy, rows, m.out, m.in);
    if (m.bias)
      for (int64_t i = 0; i < rows; i++) add_scaled(y + i * ldy, m.bias->w, 1, m.out);
  }

  // gx = gy W
  void linear_back(const Linear& m, const float* gy, int64_t ldy, float* gx, int64_t ldx,
                   int64_t rows) {
    if (m.weight->flipped)
      dots(gy, ldy, m.weight->w, m.weight->width, gx, ldx, rows, m.in, m.out);
    else
      product<SET>(gy, {ldy, 1}, m.weight->w, m.weight->width, gx, ldx, rows, m.in, m.out);
  }

  // The gradient of a weight, or at once the step along it.
  void learn(Matrix* m, const float* a, Walk s, const float* b, int64_t ldb, int64_t rows) {
    if (!m->moves) return;
    if (fused)
      product<STEP>(a, s, b, ldb, m->w, m->width, m->height, m->width, rows, -float(set.lr));
    else if (m->touched)
      product<ADD>(a, s, b, ldb, m->g, m->width, m->height, m->width, rows);
    else
      product<SET>(a, s, b, ldb, m->g, m->width, m->height, m->width, rows);
    m->touched = true;
  }

  void learn_bias(Matrix* m, const float* gy, int64_t ldy, int64_t rows) {
    if (!m || !m->moves) return;
    float *to = learned(m), by = pace();
    for (int64_t j = 0; j < m->width; j += LANES) {
      Vec sum = {};
      for (int64_t i = 0; i < rows; i++) sum += load(gy + i * ldy + j);
      store(to + j, load(to + j) + by * sum);
    }
  }

  // What a weight's gradient, times `pace`, is added to: a gradient, zeros at first, or the weight.
  float* learned(Matrix* m) {
    if (!fused && !m->touched) std::memset(m->g, 0, m->size() * sizeof(float));
    m->touched = true;
    return fused ? m->w : m->g;
  }
  float pace() const { return fused ? -float(set.lr) : 1; }

  void learn_linear(const Linear& m, const float* x, int64_t ldx, const float* gy, int64_t ldy,
                    int64_t rows) {
    if (m.weight->flipped)
      learn(m.weight, x, {1, ldx}, gy, ldy, rows);
    else
      learn(m.weight, gy, {1, ldy}, x, ldx, rows);
    learn_bias(m.bias, gy, ldy, rows);
  }

  // ---- Mixture

  void route(Mixture& m, const float* h, int64_t tokens) {
    dots(h, m.in, m.gate->w, m.gate->width, m.logit, m.wide, tokens, m.wide, m.in);
    std::fill(m.tally.begin(), m.tally.end(), 0);
    for (int64_t t = 0; t < tokens; t++) {
      const float* logit = m.logit + t * m.wide;
      float* score = m.score + t * m.wide;
      const auto& counted = m.full ? m.known : m.held;
      float most = -std::numeric_limits<float>::infinity(), sum = 0;
      for (int64_t e = 0; e < m.experts; e++) {
        if (logit[e] != logit[e]) broken = true;
        if (counted[e] && logit[e] > most) most = logit[e];
      }
      for (int64_t e = 0; e < m.experts; e++)
        sum += score[e] = counted[e] ? std::exp(logit[e] - most) : 0;
      for (int64_t e = 0; e < m.experts; e++) {
        score[e] /= sum;
        m.score_sum[e] += score[e];
      }
      const float* by = m.full ? score : logit;
      int32_t* chosen = m.chosen + t * m.k;
      float* weight = m.choice_weight + t * m.k;
      for (int64_t i = 0; i < m.k; i++) {
        int best = -1;
        for (int64_t e = 0; e < m.experts; e++) {
          if (!m.held[e] || std::find(chosen, chosen + i, e) != chosen + i) continue;
          if (best < 0 || by[e] > by[best]) best = int(e);
        }
        chosen[i] = best;
      }
      if (m.full) {
        for (int64_t i = 0; i < m.k; i++) weight[i] = score[chosen[i]];
      } else {
        float total = 0;
        for (int64_t i = 0; i < m.k; i++)
          total += weight[i] = std::exp(logit[chosen[i]] - logit[chosen[0]]);
        for (int64_t i = 0; i < m.k; i++) weight[i] *= float(m.scale) / total;
      }
      for (int64_t i = 0; i < m.k; i++) {
        if (weight[i] != weight[i]) broken = true;
        if (weight[i] == 0) continue;
        m.tally[m.slot[chosen[i]]]++;
        m.count[chosen[i]]++;
        m.weight_sum[chosen[i]] += weight[i];
      }
    }
    m.start[0] = 0;
    for (size_t s = 0; s < m.held_experts.size(); s++) m.start[s + 1] = m.start[s] + m.tally[s];
    std::vector<int64_t>& next = m.tally;
    std::copy(m.start.begin(), m.start.end() - 1, next.begin());
    for (int64_t c = 0; c < tokens * m.k; c++) {
      m.row_of[c] = -1;
      if (m.choice_weight[c] == 0) continue;
      int64_t row = next[m.slot[m.chosen[c]]]++;
      m.row_of[c] = int32_t(row);
      m.token_R[row] = int32_t(c / m.k);
      m.row_weight[row] = m.choice_weight[c];
    }
  }

  void forward(Mixture& m, const float* h, int64_t tokens) {
    route(m, h, tokens);
    int64_t rows = m.start.back();
    for (int64_t r = 0; r < rows; r++)
      std::memcpy(m.x_R + r * m.in, h + m.token_R[r] * m.in, m.in * sizeof(float));
    for (size_t s = 0; s < m.held_experts.size(); s++) {
      const Expert& e = m.held_experts[s];
      int64_t at = m.start[s], n = m.start[s + 1] - at;
      if (!n) continue;
      float* a = m.a_R + at * m.hidden;
      linear(e.up, m.x_R + at * m.in, m.in, a, m.hidden, n);
      activate(a, m.before_R + at * m.hidden, n * m.hidden, e.how);
      linear(e.down, a, m.hidden, m.y_R + at * m.out, m.out, n);
    }
    if (m.residual)
      std::memcpy(m.y, h, tokens * m.out * sizeof(float));
    else
      std::memset(m.y, 0, tokens * m.out * sizeof(float));
    for (int64_t c = 0; c < tokens * m.k; c++)
      if (m.row_of[c] >= 0)
        add_scaled(m.y + c / m.k * m.out, m.y_R + m.row_of[c] * m.out, m.choice_weight[c], m.out);
  }

  // gh += what flows back; the gate's losses included.
  void backward(Mixture& m, const float* h, float* gh, int64_t tokens) {
    int64_t rows = m.start.back();
    std::memset(m.glogit, 0, tokens * m.wide * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
      const float* gy = m.gy + m.token_R[r] * m.out;
      float by = m.row_weight[r];
      for (int64_t j = 0; j < m.out; j += LANES)
        store(m.gy_R + r * m.out + j, by * load(gy + j));
    }
    gate_back(m, tokens);
    for (size_t s = 0; s < m.held_experts.size(); s++) {
      const Expert& e = m.held_experts[s];
      int64_t at = m.start[s], n = m.start[s + 1] - at;
      if (!n) continue;
      float *a = m.a_R + at * m.hidden, *ga = m.ga_R + at * m.hidden;
      float *gy = m.gy_R + at * m.out, *x = m.x_R + at * m.in;
      linear_back(e.down, gy, m.out, ga, m.hidden, n);
      deactivate(ga, a, m.before_R + at * m.hidden, n * m.hidden, e.how);
      if (gh) linear_back(e.up, ga, m.hidden, m.gx_R + at * m.in, m.in, n);
      learn_linear(e.down, a, m.hidden, gy, m.out, n);
      learn_linear(e.up, x, m.in, ga, m.hidden, n);
    }
    if (gh) {
      product<SET>(m.glogit, {m.wide, 1}, m.gate->w, m.gate->width, gh, m.in, tokens, m.in,
                   m.experts);
      if (m.residual)
        for (int64_t t = 0; t < tokens; t++) add_scaled(gh + t * m.in, m.gy + t * m.out, 1, m.in);
      for (int64_t r = 0; r < rows; r++)
        add_scaled(gh + m.token_R[r] * m.in, m.gx_R + r * m.in, 1, m.in);
    }
    learn(m.gate, m.glogit, {1, m.wide}, h, m.in, tokens);
  }

  void gate_back(Mixture& m, int64_t tokens) {
    int64_t all = 0, present = int64_t(m.held_experts.size());
    for (size_t s = 0; s < m.held_experts.size(); s++) all += m.start[s + 1] - m.start[s];
    for (int64_t t = 0; t < tokens; t++) {
      float *score = m.score + t * m.wide, *g = m.glogit + t * m.wide;
      float mean = 0;
      for (int64_t i = 0; i < m.k; i++) {
        int64_t c = t * m.k + i, r = m.row_of[c];
        if (r < 0) continue;
        float gw = dot(m.gy + t * m.out, m.y_R + r * m.out, m.out);
        g[m.chosen[c]] = gw * m.choice_weight[c];
        mean += gw * m.choice_weight[c];
      }
      // Through the softmax: over all that it knows, or over the chosen alone.
      if (m.full)
        for (int64_t e = 0; e < m.experts; e++) g[e] -= score[e] * mean;
      else
        for (int64_t i = 0; i < m.k; i++) {
          int64_t c = t * m.k + i;
          g[m.chosen[c]] -= m.choice_weight[c] / float(m.scale) * mean;
        }
      if (set.balance == 0 && set.z == 0) continue;
      float sum = 0, mean_share = 0, lse = 0;
      for (int64_t e = 0; e < m.experts; e++) sum += m.held[e] ? score[e] : 0;
      float by = 1 / std::max(sum, std::numeric_limits<float>::min());
      for (size_t s = 0; s < m.held_experts.size(); s++) {
        float share = float(m.start[s + 1] - m.start[s]) / float(std::max<int64_t>(all, 1));
        mean_share += share * score[m.held_experts[s].number] * by;
      }
      if (set.z != 0) {
        const float* logit = m.logit + t * m.wide;
        float most = -std::numeric_limits<float>::infinity(), total = 0;
        for (const Expert& e : m.held_experts) most = std::max(most, logit[e.number]);
        for (const Expert& e : m.held_experts) total += std::exp(logit[e.number] - most);
        lse = most + std::log(total);
      }
      for (size_t s = 0; s < m.held_experts.size(); s++) {
        int64_t e = m.held_experts[s].number;
        float q = score[e] * by;
        float share = float(m.start[s + 1] - m.start[s]) / float(std::max<int64_t>(all, 1));
        g[e] += float(set.balance) * present * q * (share - mean_share) / tokens;
        g[e] += float(set.z) * 2 * lse * q / tokens;
      }
    }
  }

  // ---- Convolution

  void forward(Conv& c, const float* x, int64_t n) {
    int64_t row = c.width * c.channels, piece = c.kw * c.channels;
    int64_t whole = c.normed ? c.oh * c.ow * c.out : 0;  // with a norm all pictures are kept
    for (int64_t b = 0; b < n; b++) {
      for (int64_t y = 0; y < c.oh; y++) {
        float* to = c.full + b * whole + y * c.ow * c.out;
        for (int64_t j = 0; j < c.ow; j++)
          std::memcpy(to + j * c.out, c.bias->w, c.out * sizeof(float));
        product<ADD>(x + (b * c.height + y) * row, {c.channels, 1, c.kh, row, piece * c.out},
                     c.weight->w, c.out, to, c.out, c.ow, c.out, piece);
      }
      if (!c.normed) pool<false>(c, c.full, b);
    }
    if (!c.normed) return;
    normalise(c, n);
    for (int64_t b = 0; b < n; b++) pool<true>(c, c.full + b * whole, b);
  }

  // The sums over all places of `of(r, i, j)`, the channels from j on at place i of row r; row by
  // row, so that rounding does not add up over all of them.
  template <class Of>
  static void add_places(float* total, int64_t rows, int64_t places, int64_t out, Of of) {
    std::memset(total, 0, out * sizeof(float));
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < out; j += LANES) {
        Vec even = {}, odd = {};
        for (int64_t i = 0; i + 1 < places; i += 2) {
          even += of(r, i, j);
          odd += of(r, i + 1, j);
        }
        if (places % 2) even += of(r, places - 1, j);
        store(total + j, load(total + j) + (even + odd));
      }
  }

  // What is kept is what has mean 0 and variance 1: weight and bias are put to it in the pool.
  void normalise(Conv& c, int64_t n) {
    Norm& m = c.norm;
    int64_t rows = n * c.oh, count = rows * c.ow;
    float *mean = m.one, *var = m.other, *full = c.full;
    auto at = [&](int64_t r, int64_t i, int64_t j) { return full + (r * c.ow + i) * c.out + j; };
    add_places(mean, rows, c.ow, c.out,
               [&](int64_t r, int64_t i, int64_t j) { return load(at(r, i, j)); });
    for (int64_t j = 0; j < c.out; j++) mean[j] /= float(count);
    add_places(var, rows, c.ow, c.out, [&](int64_t r, int64_t i, int64_t j) {
      Vec away = load(at(r, i, j)) - load(mean + j);
      return away * away;
    });
    float share = float(m.momentum);
    for (int64_t j = 0; j < c.out; j++) {
      m.by[j] = 1 / std::sqrt(var[j] / float(count) + float(m.eps));
      m.mean->w[j] += share * (mean[j] - m.mean->w[j]);
      m.var->w[j] += share * (var[j] / float(count - 1) - m.var->w[j]);
    }
    for (int64_t i = 0; i < count; i++)
      for (int64_t j = 0; j < c.out; j += LANES) {
        float* to = full + i * c.out + j;
        store(to, (load(to) - load(mean + j)) * load(m.by + j));
      }
  }

  // The gradient of what was normalised, in place, from that of what came of it.
  void normalise_back(Conv& c, int64_t margin, int64_t wide, int64_t n) {
    Norm& m = c.norm;
    int64_t rows = n * c.oh;
    float part = 1 / float(rows * c.ow), *of_bias = m.one, *of_weight = m.other;
    auto grad = [&](int64_t r, int64_t i, int64_t j) {
      return c.gfull + (r * wide + margin + i) * c.out + j;
    };
    auto kept = [&](int64_t r, int64_t i, int64_t j) {
      return load(c.full + (r * c.ow + i) * c.out + j);
    };
    add_places(of_bias, rows, c.ow, c.out,
               [&](int64_t r, int64_t i, int64_t j) { return load(grad(r, i, j)); });
    add_places(of_weight, rows, c.ow, c.out, [&](int64_t r, int64_t i, int64_t j) {
      return load(grad(r, i, j)) * kept(r, i, j);
    });
    for (int64_t j = 0; j < c.out; j++) m.by[j] *= m.weight->w[j];
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < c.ow; i++)
        for (int64_t j = 0; j < c.out; j += LANES) {
          Vec all = load(of_bias + j) + kept(r, i, j) * load(of_weight + j);
          store(grad(r, i, j), load(m.by + j) * (load(grad(r, i, j)) - part * all));
        }
    if (m.weight->moves) add_scaled(learned(m.weight), of_weight, pace(), c.out);
    if (m.bias->moves) add_scaled(learned(m.bias), of_bias, pace(), c.out);
  }

  // The largest of each pool, the first of equals, NaN above all; and a ReLU.
  template <bool NORMED>
  void pool(Conv& c, const float* full, int64_t b) {
    const float *weight = NORMED ? c.norm.weight->w : nullptr;
    const float *bias = NORMED ? c.norm.bias->w : nullptr;
    auto value = [&](const float* from, int64_t j) {
      return NORMED ? load(weight + j) * load(from) + load(bias + j) : load(from);
    };
    for (int64_t y = 0; y < c.qh; y++)
      for (int64_t x = 0; x < c.qw; x++) {
        int64_t at = ((b * c.qh + y) * c.qw + x) * c.out;
        const float* from = full + (y * c.ph * c.ow + x * c.pw) * c.out;
        for (int64_t j = 0; j < c.out; j += LANES) {
          Vec most = value(from + j, j);
          Ints best = {};
          for (int64_t v = 0; v < c.ph; v++)
            for (int64_t u = 0; u < c.pw; u++) {
              Vec other = value(from + (v * c.ow + u) * c.out + j, j);
              Ints better = (other > most) | (other != other);
              most = better ? other : most;
              best = better ? Ints{} + int32_t(v * c.pw + u) : best;
            }
          most = most < Vec{} ? Vec{} : most;
          best = most > Vec{} ? best : Ints{} - 1;
          store(c.y + at + j, most);
          std::memcpy(c.best + at + j, &best, sizeof best);
        }
      }
    if (!c.last) return;
    int64_t area = c.qh * c.qw;
    for (int64_t i = 0; i < area; i++)
      for (int64_t j = 0; j < c.real; j++)
        c.flat[b * c.flat_width + j * area + i] = c.y[(b * area + i) * c.out + j];
  }

  void backward(Conv& c, const float* x, float* gx, int64_t n) {
    int64_t row = c.width * c.channels, piece = c.kw * c.channels, area = c.qh * c.qw;
    int64_t margin = gx ? c.kw - 1 : 0, wide = c.ow + 2 * margin, whole = c.oh * wide * c.out;
    std::memset(c.gfull, 0, n * whole * sizeof(float));
    if (c.last)
      for (int64_t b = 0; b < n; b++)
        for (int64_t i = 0; i < area; i++)
          for (int64_t j = 0; j < c.real; j++)
            c.gy[(b * area + i) * c.out + j] = c.gflat[b * c.flat_width + j * area + i];
    for (int64_t b = 0; b < n; b++)
      for (int64_t y = 0; y < c.qh; y++)
        for (int64_t q = 0; q < c.qw; q++) {
          int64_t at = (b * area + y * c.qw + q) * c.out;
          float* to = c.gfull + b * whole + (y * c.ph * wide + margin + q * c.pw) * c.out;
          for (int64_t j = 0; j < c.out; j += LANES) {
            Vec g = load(c.gy + at + j);
            Ints best;
            std::memcpy(&best, c.best + at + j, sizeof best);
            for (int64_t v = 0; v < c.ph; v++)
              for (int64_t u = 0; u < c.pw; u++)
                store(to + (v * wide + u) * c.out + j,
                      best == int32_t(v * c.pw + u) ? g : Vec{});
          }
        }
    if (c.normed) normalise_back(c, margin, wide, n);
    if (gx) {
      turn(c);
      for (int64_t b = 0; b < n; b++)
        spread(c, c.gfull + b * whole, wide, gx + b * c.height * row);
    }
    if (c.weight->moves) {
      Matrix* m = c.weight;
      float* to = learned(m);
      for (int64_t b = 0; b < n; b++)
        for (int64_t dy = 0; dy < c.kh; dy++)
          product<STEP>(x + (b * c.height + dy) * row,
                        {1, c.channels, c.oh, row, wide * c.out},
                        c.gfull + b * whole + margin * c.out, c.out, to + dy * piece * c.out,
                        c.out, piece, c.out, c.ow, pace());
    }
    learn_bias(c.bias, c.gfull, c.out, n * c.oh * wide);
  }

  // The kernel turned round from left to right, and from output channels to input channels.
  void turn(Conv& c) {
    for (int64_t dy = 0; dy < c.kh; dy++)
      for (int64_t dx = 0; dx < c.kw; dx++)
        for (int64_t o = 0; o < c.out; o++)
          for (int64_t i = 0; i < c.channels; i++)
            c.turned[((dy * c.kw + c.kw - 1 - dx) * c.out + o) * c.channels + i] =
                c.weight->w[((dy * c.kw + dx) * c.channels + i) * c.out + o];
  }

  // One picture's gradient from the output's, which has kw - 1 zeros on either side.
  void spread(Conv& c, const float* g, int64_t wide, float* gx) {
    constexpr int64_t SIDE = 4;  // narrow, to meet few of those zeros
    std::memset(gx, 0, c.height * c.width * c.channels * sizeof(float));
    for (int64_t y = 0; y < c.height; y++) {
      int64_t low = std::max<int64_t>(0, y - c.oh + 1), high = std::min(y, c.kh - 1);
      for (int64_t x = 0; x < c.width; x += SIDE) {
        int64_t side = std::min(SIDE, c.width - x);
        int64_t from = std::max<int64_t>(0, c.kw - x - side);
        int64_t to = std::min(c.kw, c.ow + c.kw - 1 - x);
        if (low > high || from >= to) continue;
        product<ADD>(g + ((y - low) * wide + x + from) * c.out,
                     {c.out, 1, high - low + 1, -wide * c.out, c.kw * c.out * c.channels},
                     c.turned + (low * c.kw + from) * c.out * c.channels, c.channels,
                     gx + (y * c.width + x) * c.channels, c.channels, side, c.channels,
                     (to - from) * c.out);
      }
    }
  }

  // ---- Embedding

  void forward(const Embedding& e, const float* x, float* y, int64_t ldy, int64_t n) {
    for (int64_t b = 0; b < n; b++)
      for (int64_t t = 0; t < e.codes; t++)
        std::memcpy(y + b * ldy + t * e.each,
                    e.table->w + e.code(x + b * x_width + t) * e.table->width,
                    e.each * sizeof(float));
  }

  // Summed before weights are touched: a row that is met often would be rounded as often.
  void backward(const Embedding& e, const float* x, const float* gy, int64_t ldy, int64_t n) {
    Matrix* m = e.table;
    if (!m->moves) return;
    std::memset(e.sum, 0, m->size() * sizeof(float));
    for (int64_t b = 0; b < n; b++)
      for (int64_t t = 0; t < e.codes; t++) {
        float* row = e.sum + e.code(x + b * x_width + t) * m->width;
        const float* g = gy + b * ldy + t * e.each;
        for (int64_t j = 0; j < e.each; j++) row[j] += g[j];
      }
    add_scaled(learned(m), e.sum, pace(), m->size());
  }

  // ---- A step

  const float* stage_forward(Stage& s, const float* x, int64_t n) {
    if (s.kind == DENSE) {
      linear(s.dense.map, x, s.dense.map.in, s.out, s.width, n);
      activate(s.out, s.dense.before, n * s.width, s.dense.how);
    }
    if (s.kind == MIXTURE) forward(s.mix, x, n);
    if (s.kind == CONV) forward(s.conv, x, n);
    if (s.kind == EMBEDDING) forward(s.embed, x, s.out, s.width, n);
    return s.out;
  }

  void stage_backward(Stage& s, const float* x, float* gx, int64_t n) {
    if (s.kind == DENSE) {
      const Linear& m = s.dense.map;
      deactivate(s.gout, s.out, s.dense.before, n * s.width, s.dense.how);
      if (gx) linear_back(m, s.gout, s.width, gx, m.in, n);
      learn_linear(m, x, m.in, s.gout, s.width, n);
    }
    if (s.kind == MIXTURE) backward(s.mix, x, gx, n);
    if (s.kind == CONV) backward(s.conv, x, gx, n);
    if (s.kind == EMBEDDING) backward(s.embed, x, s.gout, s.width, n);
  }

  // Mean cross-entropy; the logits' gradient into `g`.
  float cross_entropy(const float* logit, float* g, const int64_t* label, int64_t n,
                      int64_t width) {
    double total = 0;
    float smooth = float(set.label_smoothing), classes = float(set.classes);
    for (int64_t b = 0; b < n; b++, logit += width, g += width) {
      float most = logit[0], sum = 0, mean = 0;
      for (int64_t c = 1; c < set.classes; c++) most = std::max(most, logit[c]);
      for (int64_t c = 0; c < set.classes; c++) sum += g[c] = std::exp(logit[c] - most);
      float log_sum = most + std::log(sum);
      for (int64_t c = 0; c < set.classes; c++) {
        mean += log_sum - logit[c];
        g[c] = (g[c] / sum - smooth / classes - (c == label[b] ? 1 - smooth : 0)) / float(n);
      }
      total += (1 - smooth) * (log_sum - logit[label[b]]) + smooth * mean / classes;
    }
    return float(total / double(n));
  }

  void settle() {
    double norm = 0;
    for (Matrix& m : params) {
      if (!m.touched) continue;
      if (set.slopes)
        for (int64_t i = 0; i < m.height; i++)
          slope += along(m.g + i * m.width, m.w + i * m.width, m.r + i * m.width, m.width);
      if (set.proximal != 0)
        for (int64_t i = 0; i < m.size(); i += LANES)
          store(m.g + i, load(m.g + i) + float(set.proximal) * (load(m.w + i) - load(m.r + i)));
      if (m.met) {
        add_scaled(m.met, m.g, 1, m.size());
        ++*m.steps;
      }
      if (m.shift) add_scaled(m.g, m.shift, 1, m.size());
      if (set.clips)
        for (int64_t i = 0; i < m.height; i++)
          norm += dot(m.g + i * m.width, m.g + i * m.width, m.width);
    }
    float by = set.clips ? float(std::min(1.0, set.clip / (std::sqrt(norm) + 1e-6))) : 1;
    float decay = float(set.weight_decay), momentum = float(set.momentum), lr = float(set.lr);
    for (Matrix& m : params) {
      if (!m.touched) continue;
      m.touched = false;
      for (int64_t i = 0; i < m.size(); i += LANES) {
        Vec w = load(m.w + i), g = by * load(m.g + i);
        if (decay != 0) g += decay * w;
        if (momentum != 0) {
          g += momentum * load(m.v + i);
          store(m.v + i, g);
        }
        store(m.w + i, w - lr * g);
      }
    }
  }

  float step(const int64_t* label, int64_t n) {
    const float* at = x;
    for (Stage& s : stages) at = stage_forward(s, at, n);
    Stage& last = stages.back();
    float loss = cross_entropy(at, last.gout, label, n, last.width);
    for (size_t i = stages.size(); i-- > 0;)
      stage_backward(stages[i], i ? stages[i - 1].out : x,
                     i && wanted[i] ? stages[i - 1].gout : nullptr, n);
    if (!fused) settle();
    return loss;
  }
};

// ---- From whole numbers to a client.

struct Reader {
  const int64_t* at;
  int64_t next() { return *at++; }
  double number() {
    double d;
    std::memcpy(&d, at++, sizeof d);
    return d;
  }
};

static Matrix* maybe(Client& c, int64_t index) { return index < 0 ? nullptr : &c.params[index]; }

static Linear read_linear(Client& c, Reader& in) {
  Linear m;
  m.in = padded(in.next());
  m.out = padded(in.next());
  m.weight = maybe(c, in.next());
  m.bias = maybe(c, in.next());
  return m;
}

static void read(Client& c, Reader& in) {
  c.params.resize(in.next());
  for (Matrix& m : c.params) {
    m.rows = in.next();
    m.cols = in.next();
    m.moves = in.next();
    int64_t way = in.next();
    m.written = in.next();
    m.flipped = way == 1;
    m.vector = way == 2;
    m.chunk = m.chunk_padded = m.cols;
  }
  c.stages.resize(in.next());
  for (Stage& s : c.stages) {
    s.kind = int(in.next());
    if (s.kind == DENSE) {
      s.dense.map = read_linear(c, in);
      s.dense.how = int(in.next());
      s.width = s.dense.map.out;
    } else if (s.kind == MIXTURE) {
      Mixture& m = s.mix;
      m.in = padded(in.next());
      m.out = s.width = padded(in.next());
      m.hidden = padded(in.next());
      m.experts = in.next();
      m.wide = padded(m.experts);
      m.k = in.next();
      m.full = in.next();
      m.residual = in.next();
      m.scale = in.number();
      m.gate = maybe(c, in.next());
      for (int64_t e = 0; e < m.experts; e++) m.known.push_back(uint8_t(in.next()));
      m.held.assign(m.experts, 0);
      m.slot.assign(m.experts, -1);
      m.held_experts.resize(in.next());
      for (size_t i = 0; i < m.held_experts.size(); i++) {
        Expert& e = m.held_experts[i];
        e.number = in.next();
        e.how = int(in.next());
        e.up = read_linear(c, in);
        e.down = read_linear(c, in);
        m.held[e.number] = 1;
        m.slot[e.number] = int(i);
      }
      m.start.assign(m.held_experts.size() + 1, 0);
      m.tally.assign(m.held_experts.size(), 0);
    } else if (s.kind == EMBEDDING) {
      Embedding& e = s.embed;
      e.codes = in.next();
      e.each = in.next();
      e.table = maybe(c, in.next());
      s.width = padded(e.codes * e.each);
    } else {
      Conv& v = s.conv;
      int64_t first = in.next(), channels = in.next();
      v.last = in.next();
      v.channels = first ? channels : padded(channels);
      v.height = in.next();
      v.width = in.next();
      v.kh = in.next();
      v.kw = in.next();
      v.ph = in.next();
      v.pw = in.next();
      v.real = in.next();
      v.out = padded(v.real);
      v.weight = maybe(c, in.next());
      v.bias = maybe(c, in.next());
      v.normed = in.next();
      if (v.normed) {
        for (Matrix** m : {&v.norm.weight, &v.norm.bias, &v.norm.mean, &v.norm.var})
          *m = maybe(c, in.next());
        v.norm.momentum = in.number();
        v.norm.eps = in.number();
      }
      v.weight->chunk = channels;
      v.weight->chunk_padded = v.channels;
      v.oh = v.height - v.kh + 1;
      v.ow = v.width - v.kw + 1;
      v.qh = v.oh / v.ph;
      v.qw = v.ow / v.pw;
      v.flat_width = padded(v.qh * v.qw * v.real);
      s.width = v.last ? v.flat_width : v.qh * v.qw * v.out;
    }
  }
  // A gradient is wanted of all that has something to learn before it.
  c.wanted.assign(c.stages.size(), 0);
  bool learns = false;
  for (size_t i = 0; i < c.stages.size(); i++) {
    c.wanted[i] = learns;
    Stage& s = c.stages[i];
    auto moves = [](const Matrix* m) { return m && m->moves; };
    if (s.kind == DENSE) learns |= moves(s.dense.map.weight) || moves(s.dense.map.bias);
    if (s.kind == CONV)
      learns |= moves(s.conv.weight) || moves(s.conv.bias) || moves(s.conv.norm.weight) ||
                moves(s.conv.norm.bias);
    if (s.kind == EMBEDDING) learns |= moves(s.embed.table);
    if (s.kind == MIXTURE) {
      learns |= moves(s.mix.gate);
      for (const Expert& e : s.mix.held_experts)
        learns |= moves(e.up.weight) || moves(e.up.bias) || moves(e.down.weight) ||
                  moves(e.down.bias);
    }
  }
}

// All memory of a call; called twice, first to count it.
static void lay_out(Client& c, Arena& arena) {
  int64_t n = c.set.batch;
  auto floats = [&](int64_t size) { return arena.take(size); };
  auto ints = [&](int64_t size) { return reinterpret_cast<int32_t*>(arena.take(size)); };
  for (Matrix& m : c.params) {
    int64_t wide = m.cols / m.chunk * m.chunk_padded;
    m.height = m.vector ? 1 : padded(m.flipped ? wide : m.rows);
    m.width = padded(m.flipped ? m.rows : wide);
    m.w = floats(m.size());
    if (m.moves && !c.fused) m.g = floats(m.size());
    if (m.moves && c.set.momentum != 0) m.v = floats(m.size());
    if (m.moves && (c.set.proximal != 0 || c.set.slopes)) m.r = floats(m.size());
    if (m.their_shift) m.shift = floats(m.size());
    if (m.their_met) m.met = floats(m.size());
  }
  c.x = floats(n * c.x_width);
  for (Stage& s : c.stages) {
    s.out = floats(n * s.width);
    s.gout = floats(n * s.width);
    if (s.kind == DENSE && s.dense.how == GELU) s.dense.before = floats(n * s.width);
    if (s.kind == MIXTURE) {
      Mixture& m = s.mix;
      int64_t rows = n * m.k;
      m.y = s.out;
      m.gy = s.gout;
      for (float** p : {&m.logit, &m.glogit, &m.score}) *p = floats(n * m.wide);
      for (float** p : {&m.x_R, &m.gx_R}) *p = floats(rows * m.in);
      for (float** p : {&m.y_R, &m.gy_R}) *p = floats(rows * m.out);
      for (float** p : {&m.a_R, &m.before_R, &m.ga_R}) *p = floats(rows * m.hidden);
      for (float** p : {&m.row_weight, &m.choice_weight}) *p = floats(rows);
      for (int32_t** p : {&m.chosen, &m.token_R, &m.row_of}) *p = ints(rows);
    }
    if (s.kind == EMBEDDING && s.embed.table->moves) s.embed.sum = floats(s.embed.table->size());
    if (s.kind == CONV) {
      Conv& v = s.conv;
      int64_t pooled = n * v.qh * v.qw * v.out;
      v.full = floats((v.normed ? n : 1) * v.oh * v.ow * v.out);
      if (v.normed)
        for (float** p : {&v.norm.by, &v.norm.one, &v.norm.other}) *p = floats(v.out);
      v.gfull = floats(n * v.oh * (v.ow + 2 * (v.kw - 1)) * v.out);
      v.best = ints(pooled);
      v.turned = floats(v.kh * v.kw * v.channels * v.out);
      v.y = v.last ? floats(pooled) : s.out;
      v.gy = v.last ? floats(pooled) : s.gout;
      v.flat = s.out;
      v.gflat = s.gout;
    }
  }
}

// Trains all epochs of one phase, in place. Returns 0, or 1 where there is not enough memory.
extern "C" int train(const int64_t* program, float* const* theirs, const float* const* received,
                     const float* const* shift, float* const* met, int64_t* const* steps,
                     const Settings* set, const float* x_N, const int64_t* y_N,
                     const int64_t* order, int64_t epochs, int64_t num, double* loss_sum,
                     double* slope, int64_t* count, double* weight_sum, double* score_sum,
                     int64_t most_experts) {
  static thread_local Arena arena;
  Client c;
  c.set = *set;
  c.fused = set->momentum == 0 && set->weight_decay == 0 && set->proximal == 0 && !set->clips &&
            !set->slopes;
  Reader in{program};
  read(c, in);
  for (size_t i = 0; i < c.params.size(); i++) {
    Matrix& m = c.params[i];
    m.their_shift = shift[i];
    m.their_met = met[i];
    m.steps = steps[i];
    if (shift[i] || met[i]) c.fused = false;
  }
  const Stage& first = c.stages.front();
  c.x_width = first.kind == CONV ? first.conv.height * first.conv.width * first.conv.channels
                                 : padded(set->features);
  arena.used = 0;
  arena.counting = true;
  lay_out(c, arena);
  if (!arena.begin()) return 1;
  lay_out(c, arena);
  for (size_t i = 0; i < c.params.size(); i++) {
    Matrix& m = c.params[i];
    m.theirs = theirs[i];
    m.copy(theirs[i], m.w);
    if (m.r) m.copy(received[i], m.r);
    if (m.shift) m.copy(m.their_shift, m.shift);
  }
  int64_t layer = 0;
  for (Stage& s : c.stages)
    if (s.kind == MIXTURE) {
      s.mix.count = count + layer * most_experts;
      s.mix.weight_sum = weight_sum + layer * most_experts;
      s.mix.score_sum = score_sum + layer * most_experts;
      layer++;
    }
  std::vector<int64_t> label(set->batch);
  double total = 0;
  for (int64_t epoch = 0; epoch < epochs; epoch++)
    for (int64_t at = 0; at < num; at += set->batch) {
      int64_t n = std::min(set->batch, num - at);
      for (int64_t b = 0; b < n; b++) {
        int64_t from = order[epoch * num + at + b];
        std::memcpy(c.x + b * c.x_width, x_N + from * set->features,
                    set->features * sizeof(float));
        label[b] = y_N[from];
      }
      total += double(c.step(label.data(), n)) * double(n);
    }
  *slope = c.slope;
  *loss_sum += c.broken ? std::numeric_limits<double>::quiet_NaN() : total;
  for (const Matrix& m : c.params) {
    if (m.moves || m.written) m.give_back(m.w, m.theirs);
    if (m.met) m.give_back(m.met, m.their_met);
  }
  return 0;
}
"""
