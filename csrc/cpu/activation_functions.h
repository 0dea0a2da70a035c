// Activations with their first and second derivatives on vectors, and the loop over rows that kernels of them share.
//
// Every struct has first(x, f, f1) and second(x, f, f1, f2). None of the formulas takes a difference that cancels in the
// tails: sigma(x) and sigma(-x), tanh and its slope, the normal distribution and its density come in pairs.
#pragma once

#include "activation.h"
#include "math.h"
#include "parallel.h"

namespace aajr {
namespace AAJR_ARCH {

struct Relu {
  static AAJR_INLINE void first(vf x, vf& f, vf& f1) {
    f = select(x <= 0.0f, vf{}, x);  // NaN passes
    f1 = select(x > 0.0f, splat(1.0f), vf{});
  }
  static AAJR_INLINE void second(vf x, vf& f, vf& f1, vf& f2) {
    first(x, f, f1);
    f2 = vf{};
  }
};

struct Relu2 {
  static AAJR_INLINE void first(vf x, vf& f, vf& f1) {
    const vf positive = select(x <= 0.0f, vf{}, x);
    f = positive * positive;
    f1 = positive + positive;
  }
  static AAJR_INLINE void second(vf x, vf& f, vf& f1, vf& f2) {
    first(x, f, f1);
    f2 = select(x > 0.0f, splat(2.0f), vf{});
  }
};

struct TanhActivation {
  static AAJR_INLINE void first(vf x, vf& f, vf& f1) {
    const Tanh v = tanh(x);
    f = v.t;
    f1 = v.slope;
  }
  static AAJR_INLINE void second(vf x, vf& f, vf& f1, vf& f2) {
    first(x, f, f1);
    f2 = -2.0f * f * f1;
  }
};

struct SigmoidActivation {
  static AAJR_INLINE void second(vf x, vf& f, vf& f1, vf& f2) {
    const Sigmoid s = sigmoid(x);
    f = s.p;
    f1 = s.p * s.rest;
    f2 = f1 * (s.rest - s.p);
  }
  static AAJR_INLINE void first(vf x, vf& f, vf& f1) {
    vf f2;
    second(x, f, f1, f2);
  }
};

// x Φ(x): f' = Φ + xφ, f'' = φ(2 − x²). Beyond 40 the density is zero, and x² must not overflow.
struct Gelu {
  static AAJR_INLINE void second(vf x, vf& f, vf& f1, vf& f2) {
    const Normal v = normal(x);
    const vf near = vmin(vmax(x, splat(-40.0f)), splat(40.0f));
    f = x * v.cdf;
    f1 = v.cdf + near * v.density;
    f2 = v.density * (2.0f - near * near);
  }
  static AAJR_INLINE void first(vf x, vf& f, vf& f1) {
    vf f2;
    second(x, f, f1, f2);
  }
};

// xσ(w) with w = βx: with s = σ(w)σ(−w), f' = σ + βxs and f'' = 2βs + β²xs(σ(−w) − σ(w)).
template <class Beta>
struct XSigmoid {
  static AAJR_INLINE void second(vf x, vf& f, vf& f1, vf& f2) {
    const Sigmoid s = sigmoid(Beta::value * x);
    const vf slope = s.p * s.rest, x_slope = x * slope;  // βx may overflow
    f = x * s.p;
    f1 = s.p + Beta::value * x_slope;
    f2 = Beta::value * (slope + slope + Beta::value * x_slope * (s.rest - s.p));
  }
  static AAJR_INLINE void first(vf x, vf& f, vf& f1) {
    vf f2;
    second(x, f, f1, f2);
  }
};
struct One { static constexpr float value = 1.0f; };
struct QuickBeta { static constexpr float value = 1.702f; };
using Silu = XSigmoid<One>;
using QuickGelu = XSigmoid<QuickBeta>;

// xσ(w) with w = 2√(2/π)(x + 0.044715x³), since (1 + tanh v)/2 = σ(2v): f' = σ + w'xs and
// f'' = 2w's + xs(w'' + w'²(σ(−w) − σ(w))). Beyond 40 σ is 0 or 1, and x³ must not overflow.
struct GeluTanh {
  static AAJR_INLINE void second(vf x, vf& f, vf& f1, vf& f2) {
    constexpr float scale = 1.5957691216057308f, cubic = 0.044715f;
    const vf near = vmin(vmax(x, splat(-40.0f)), splat(40.0f));
    const vf square = near * near;
    const Sigmoid s = sigmoid(select(x == x, (square * cubic + 1.0f) * near * scale, x));
    const vf slope = s.p * s.rest, x_slope = near * slope;
    const vf w1 = (square * (3.0f * cubic) + 1.0f) * scale, w2 = near * (6.0f * cubic * scale);
    f = x * s.p;
    f1 = s.p + x_slope * w1;
    f2 = slope * (w1 + w1) + x_slope * (w2 + (s.rest - s.p) * (w1 * w1));
  }
  static AAJR_INLINE void first(vf x, vf& f, vf& f1) {
    vf f2;
    second(x, f, f1, f2);
  }
};

// A whole vector, or the first n elements of one. The rare path is kept out of line: it is long, and used many times.
template <class T>
__attribute__((noinline)) vf take_part(const T* p, int64_t n) { return load_part(p, n); }
template <class T>
__attribute__((noinline)) void give_part(T* p, vf x, int64_t n) { store_part(p, x, n); }
template <class T>
AAJR_INLINE vf take(const T* p, int64_t n) { return n >= W ? load(p) : take_part(p, n); }
template <class T>
AAJR_INLINE void give(T* p, vf x, int64_t n) {
  if (n >= W)
    store(p, x);
  else
    give_part(p, x, n);
}

// body(pointers, n) for every piece of a row, `pointers[i]` its first element in streams[i] (null where that is null).
// Pieces are whole rows or multiples of the vector length. Every thread has one contiguous share.
template <class T, int N, class Body>
inline void for_rows(const RowLayout& layout, const Stream* const (&streams)[N], int64_t stacks, int threads,
                     const Body& body) {
  constexpr int64_t piece = 2048, least = 1 << 14;  // elements; below the latter a second thread does not pay
  const int64_t per_row = (layout.size + piece - 1) / piece, units = layout.rows() * per_row;
  if (layout.rows() * layout.size * stacks < least) threads = 1;
  parallel_ranges(units, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t start = unit % per_row * piece;
      int64_t offset[N];
      for (int i = 0; i < N; ++i) offset[i] = start;
      int64_t row = unit / per_row;
      for (int axis = layout.outer - 1; axis >= 0; --axis) {
        const int64_t index = axis ? row % layout.outer_size[axis] : row;
        row /= layout.outer_size[axis];
        for (int i = 0; i < N; ++i) offset[i] += index * streams[i]->outer[axis];
      }
      T* pointers[N];
      for (int i = 0; i < N; ++i)
        pointers[i] = streams[i]->data ? reinterpret_cast<T*>(streams[i]->data) + offset[i] : nullptr;
      const int64_t rest = layout.size - start;
      body(pointers, rest < piece ? rest : piece);
    }
  });
}

}  // namespace AAJR_ARCH
}  // namespace aajr
