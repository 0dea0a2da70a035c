// Elementary functions on vectors of float. Errors are in units in the last place (ulp), measured over all floats of
// the stated range by tests/native/test_math.py.
#pragma once

#include "simd.h"

namespace aajr {
namespace AAJR_ARCH {

// Two to the power n, for integers -126 <= n <= 127.
AAJR_INLINE vf power_of_two(vi n) { return bit_cast<vf>((n + 127) << 23); }

// e^x: 0 for x < -104 and -inf, inf above 88.73, NaN for NaN; subnormal results are kept.
AAJR_INLINE vf exp(vf x) {
  const vf bounded = vmin(vmax(x, splat(-104.0f)), splat(89.0f));
  // n = round(x / ln 2): the addition pushes the fraction out of the mantissa
  const vf shifted = bounded * 1.44269504088896341f + 12582912.0f;
  const vf n = shifted - 12582912.0f;
  const vf r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = r * 0x1.6d110ap-10f + 0x1.11d94ep-7f;
  p = p * r + 0x1.55551ap-5f;
  p = p * r + 0x1.555526p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, since n reaches 128 and -150
  const vi whole = bit_cast<vi>(shifted) - 0x4b400000;
  const vi half = whole >> 1;
  const vf result = p * power_of_two(half) * power_of_two(whole - half);
  return select(x == x, result, x);
}

}  // namespace AAJR_ARCH
}  // namespace aajr
