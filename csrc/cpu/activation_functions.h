// Activations with their first and second derivatives on vectors.
//
// Every struct has first(x, f, f1) and second(x, f, f1, f2). None of the formulas takes a difference that cancels in the
// tails: sigma(x) and sigma(-x), tanh and its slope, the normal distribution and its density come in pairs.
#pragma once

#include "math.h"

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

}  // namespace AAJR_ARCH
}  // namespace aajr
