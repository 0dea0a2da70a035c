// Elementary functions on vectors of float: polynomials and one division, no tables, no library calls.
//
// Errors are in units in the last place of the exact result (a subnormal result counts in units of 2^-149), the
// largest of every capability, asserted by tests/backends/cpu/test_math.py:
//   exp, exp_flushed 1.25   log 1   sigmoid 3, its complement 3   tanh 2.5, its slope 5   normal density 2.5, cumulative 8
// NaN gives NaN, infinities give the limits, signed zeros keep their sign where the function is odd.
#pragma once

#include "simd.h"

namespace aajr {
namespace AAJR_ARCH {

// Two to the power n, for integers -126 <= n <= 127.
AAJR_INLINE vf power_of_two(vi n) { return bit_cast<vf>((n + 127) << 23); }

// e^(x + tail), where |tail| < 1 holds what x could not; without the check for NaN.
AAJR_INLINE vf exp_of_sum(vf x, vf tail) {
  const vf bounded = vmin(vmax(x, splat(-104.0f)), splat(89.0f));
  // n = round(x / ln 2): the addition pushes the fraction out of the mantissa
  const vf shifted = (bounded + tail) * 1.44269504088896341f + 12582912.0f;
  const vf n = shifted - 12582912.0f;
  const vf r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f + tail;
  vf p = r * 0x1.6d110ap-10f + 0x1.11d94ep-7f;
  p = p * r + 0x1.55551ap-5f;
  p = p * r + 0x1.555526p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, since n reaches 128 and -150
  const vi whole = bit_cast<vi>(shifted) - 0x4b400000;
  const vi half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}

// e^x: 0 for x < -104 and -inf, inf above 88.73; subnormal results are kept.
AAJR_INLINE vf exp(vf x) { return select(x == x, exp_of_sum(x, vf{}), x); }

// e^x for x < 88, as a softmax needs it: subnormal results are flushed to zero, NaN stays. Half the work of exp.
AAJR_INLINE vf exp_flushed(vf x) {
  const vi tiny = x < -87.33f;
  const vf bounded = select(tiny, splat(-87.33f), x);
  const vf shifted = bounded * 1.44269504088896341f + 12582912.0f;
  const vf n = shifted - 12582912.0f;
  const vf r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = r * 0x1.6d110ap-10f + 0x1.11d94ep-7f;
  p = p * r + 0x1.55551ap-5f;
  p = p * r + 0x1.555526p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return select(tiny, vf{}, p * power_of_two(bit_cast<vi>(shifted) - 0x4b400000));
}

// Natural logarithm: -inf at 0, NaN below; subnormal arguments count.
AAJR_INLINE vf log(vf x) {
  const vi tiny = x < 0x1p-126f;
  const vu bits = bit_cast<vu>(select(tiny, x * 0x1p25f, x));  // unsigned, for the bits of numbers below 0 overflow
  // x = 2^e (1 + f) with 1 + f between the roots of 1/2 and 2
  const vi e = bit_cast<vi>(bits - 0x3f3504f3u) >> 23;
  const vf f = bit_cast<vf>(bits - (bit_cast<vu>(e) << 23)) - 1.0f;
  const vf n = __builtin_convertvector(e, vf) - select(tiny, splat(25.0f), vf{});
  vf p = f * 0x1.14760cp-4f - 0x1.de02bcp-4f;
  p = p * f + 0x1.e6bf3ap-4f;
  p = p * f - 0x1.fc2886p-4f;
  p = p * f + 0x1.233ba8p-3f;
  p = p * f - 0x1.555c46p-3f;
  p = p * f + 0x1.99a476p-3f;
  p = p * f - 0x1.000006p-2f;
  p = p * f + 0x1.555548p-2f;
  const vf square = f * f;
  const vf small = (square * f) * p - n * 2.12194440e-4f;
  const vf result = n * 0.693359375f + (f + (small - 0.5f * square));
  const vf limit = select(x == 0.0f, splat(-__builtin_inff()), select(x > 0.0f, x, splat(__builtin_nanf(""))));
  return select((x > 0.0f) & (x < __builtin_inff()), result, limit);
}

// The logistic function at x and at -x, both to full relative accuracy: what 1 - p would lose is not lost.
struct Sigmoid { vf p, rest; };
AAJR_INLINE Sigmoid sigmoid(vf x) {
  const vf e = exp(-vabs(x));
  const vf large = 1.0f / (1.0f + e);
  const vf small = e * large;
  return {select(x < 0.0f, small, large), select(x < 0.0f, large, small)};
}

// tanh x and its derivative 1 - tanh², the latter from e^(-2|x|) since the difference would cancel.
struct Tanh { vf t, slope; };
AAJR_INLINE Tanh tanh(vf x) {
  const vf a = vabs(x), square = a * a;
  const vf e = exp(-2.0f * a);
  const vf r = 1.0f / (1.0f + e);
  vf p = square * -0x1.828776p-8f + 0x1.54c3c2p-6f;
  p = p * square - 0x1.b89abap-5f;
  p = p * square + 0x1.1109bep-3f;
  p = p * square - 0x1.55553ep-2f;
  const vf t = select(a < 0.6f, a + a * (square * p), (1.0f - e) * r);
  const vi sign = bit_cast<vi>(x) ^ bit_cast<vi>(a);
  return {bit_cast<vf>(bit_cast<vi>(t) | sign), 4.0f * e * (r * r)};
}

// The normal distribution Φ(x) and its density φ(x). The lower tail is φ times Mills' ratio (1 - Φ)/φ, which is a
// rational function of |x| with positive coefficients: full relative accuracy down to the subnormal numbers.
struct Normal { vf cdf, density; };
AAJR_INLINE Normal normal(vf x) {
  const vf a = vmin(vabs(x), splat(15.0f));
  // a² in two parts, the first exact: an error in it is multiplied by up to 100
  const vf head = bit_cast<vf>(bit_cast<vi>(a) & splati(~0xfff));
  const vf density =
      0.398942280401432678f * exp_of_sum(-0.5f * (head * head), -0.5f * ((a - head) * (a + head)));
  vf p = a * 0x1.5521e4p-7f + 0x1.a3bc66p-4f;
  p = p * a + 0x1.d836c8p-2f;
  p = p * a + 0x1.19e394p0f;
  p = p * a + 0x1.40d932p0f;
  vf q = a * 0x1.5520f4p-7f + 0x1.a3c2cep-4f;
  q = q * a + 0x1.e2ba12p-2f;
  q = q * a + 0x1.349f64p0f;
  q = q * a + 0x1.ad2c66p0f;
  q = q * a + 1.0f;
  const vf tail = density * (p / q);
  return {select(x == x, select(x < 0.0f, tail, 1.0f - tail), x), select(x == x, density, x)};
}

}  // namespace AAJR_ARCH
}  // namespace aajr
