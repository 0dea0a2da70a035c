// Vectors of float in the compiler's own notation, so that one source serves SSE2, AVX2, AVX-512 and NEON.
//
// Included only by kernel files, which are compiled once per capability with AAJR_ARCH (the namespace) and
// AAJR_VECTOR_BYTES defined. Everything lives in the namespace of the capability and is inlined: a function that the
// linker could share between capabilities would bring AVX-512 instructions into the baseline. For the same reason no
// kernel file instantiates standard containers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define AAJR_INLINE inline __attribute__((always_inline))

namespace aajr {
namespace AAJR_ARCH {

constexpr int W = AAJR_VECTOR_BYTES / 4;  // floats in a vector

typedef float vf __attribute__((vector_size(AAJR_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(AAJR_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(AAJR_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(AAJR_VECTOR_BYTES / 2)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

AAJR_INLINE vf splat(float x) { return x - vf{}; }
AAJR_INLINE vi splati(int32_t x) { return x - vi{}; }
template <class To, class From>
AAJR_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast");
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}
AAJR_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
// A product as a number of its own: a subtraction that follows is not fused with it, so that x - x is zero.
AAJR_INLINE vf rounded(vf x) {
  __asm__("" : "+m"(x));
  return x;
}
AAJR_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
AAJR_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
AAJR_INLINE vf vabs(vf a) { return bit_cast<vf>(bit_cast<vi>(a) & splati(0x7fffffff)); }

// Half precision. bf16 rounds to nearest even; NaN stays NaN.
AAJR_INLINE vf widen(vh h, bf16) { return bit_cast<vf>(__builtin_convertvector(h, vu) << 16); }
AAJR_INLINE vu narrow_bits(vf x) {  // in the lower halves
  const vu bits = bit_cast<vu>(x);
  const vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const vu nan = (bits >> 16) | 0x40u;
  return x == x ? rounded >> 16 : nan;
}
AAJR_INLINE vh narrow(vf x, bf16) { return __builtin_convertvector(narrow_bits(x), vh); }
AAJR_INLINE vf widen(vh h, f16) {
  // exponent and mantissa move up; the multiplication by 2^112 rebuilds the exponent, subnormals included
  const vu bits = __builtin_convertvector(h, vu);
  const vu sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  const vf scaled = bit_cast<vf>(rest) * 0x1p112f;
  const vu special = rest | 0x7f800000u;  // infinity and NaN
  return bit_cast<vf>((rest >= (0x7c00u << 13) ? special : bit_cast<vu>(scaled)) | sign);
}
AAJR_INLINE vh narrow(vf x, f16) {
  const vu bits = bit_cast<vu>(x), sign = bits & 0x80000000u, mag = bits ^ sign;
  // normal results: round the mantissa to nearest even in integers; smaller ones: let an addition round
  const vu normal = (mag - (112u << 23) + 0xfffu + ((mag >> 13) & 1u)) >> 13;
  const vu small = bit_cast<vu>(bit_cast<vf>(mag) + 0.5f) - 0x3f000000u;
  const vu large = mag > 0x7f800000u ? vu{} + 0x7e00u : vu{} + 0x7c00u;
  vu out = mag < (113u << 23) ? small : normal;
  out = mag >= (143u << 23) ? large : out;
  return __builtin_convertvector(out | (sign >> 16), vh);
}

template <class V, class T>
AAJR_INLINE V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
AAJR_INLINE vf load(const float* p) { return load_raw<vf>(p); }
AAJR_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
// The compiler converts between 16 and 32 bits in twice as many instructions as the processor needs.
#if defined(__AVX2__) && AAJR_VECTOR_BYTES == 32
AAJR_INLINE vf load(const bf16* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
AAJR_INLINE void store(bf16* p, vf x) {
  const __m256i h = (__m256i)narrow_bits(x);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}
#elif defined(__AVX512BW__) && AAJR_VECTOR_BYTES == 64
AAJR_INLINE vf load(const bf16* p) {
  const __m512i h = _mm512_maskz_cvtepu16_epi32(__mmask16(-1), _mm256_loadu_si256((const __m256i*)p));
  return (vf)_mm512_maskz_slli_epi32(__mmask16(-1), h, 16);
}
AAJR_INLINE void store(bf16* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(__mmask16(-1), (__m512i)narrow_bits(x)));
}
#else
AAJR_INLINE vf load(const bf16* p) { return widen(load_raw<vh>(p), bf16{}); }
AAJR_INLINE void store(bf16* p, vf x) {
  const vh h = narrow(x, bf16{});
  std::memcpy(p, &h, sizeof h);
}
#endif
#if defined(__F16C__) && AAJR_VECTOR_BYTES == 32
AAJR_INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
AAJR_INLINE void store(f16* p, vf x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0)); }
#elif defined(__AVX512F__) && AAJR_VECTOR_BYTES == 64
// the forms with a mask: gcc 12 warns of an uninitialised operand inside the others
AAJR_INLINE vf load(const f16* p) { return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p)); }
AAJR_INLINE void store(f16* p, vf x) { _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0)); }
#else
AAJR_INLINE vf load(const f16* p) { return widen(load_raw<vh>(p), f16{}); }
AAJR_INLINE void store(f16* p, vf x) {
  const vh h = narrow(x, f16{});
  std::memcpy(p, &h, sizeof h);
}
#endif

// The first n < W elements; the others read as `rest` and are not written. Out of line: the rare path is long, and used
// in many places.
template <class T>
inline __attribute__((noinline)) vf load_part(const T* p, int64_t n, float rest = 0.0f) {
  T buffer[W] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  vf x = load(buffer);
  if (rest != 0.0f)
    for (int i = 0; i < W; ++i)
      if (i >= n) x[i] = rest;
  return x;
}
template <class T>
inline __attribute__((noinline)) void store_part(T* p, vf x, int64_t n) {
  T buffer[W];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}

// One number of a storage type.
AAJR_INLINE float get(const float* p) { return *p; }
AAJR_INLINE float get(const bf16* p) { return bit_cast<float>(static_cast<uint32_t>(p->bits) << 16); }
AAJR_INLINE float get(const f16* p) { return load_part(p, 1)[0]; }
template <class T>
AAJR_INLINE void put(T* p, float x) { store_part(p, splat(x), 1); }
AAJR_INLINE void put(float* p, float x) { *p = x; }

// Horizontal reductions, in a fixed order.
AAJR_INLINE float sum(vf x) {
  typedef float quarter __attribute__((vector_size(16)));
  quarter part[W / 4];
  std::memcpy(part, &x, sizeof x);
#pragma GCC unroll 4
  for (int step = W / 8; step > 0; step /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < step; ++i) part[i] += part[i + step];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}
AAJR_INLINE float maximum(vf x) {
  float part[W];
  store(part, x);
  float best = part[0];
  for (int i = 1; i < W; ++i) best = part[i] > best ? part[i] : best;
  return best;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
