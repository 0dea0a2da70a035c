// Walks along a dense row, vector by vector, for the memory-bound kernels.
#pragma once

#include "../view.h"
#include "simd.h"

#define AAJR_LAMBDA __attribute__((always_inline))

namespace aajr {
namespace AAJR_ARCH {

// Tags of a step: W elements, or the first W of n where there are so many.
struct Whole {};
struct Part {
  int64_t n;
};

template <class T>
AAJR_INLINE vf read(const T* p, Whole, float = 0.0f) { return load(p); }
template <class T>
AAJR_INLINE vf read(const T* p, Part part, float rest = 0.0f) {
  return part.n >= W ? load(p) : load_part(p, part.n, rest);
}
template <class T>
AAJR_INLINE void write(T* p, vf x, Whole) { store(p, x); }
template <class T>
AAJR_INLINE void write(T* p, vf x, Part part) {
  if (part.n >= W) store(p, x);
  else store_part(p, x, part.n);
}

// body(i, u, tag) for the vectors of [begin, end): u < U tells independent accumulators apart.
template <int U, class Body>
AAJR_INLINE void walk(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + U * W <= end; i += U * W) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) body(i + u * W, u, Whole{});
  }
  // what is left, up to U - 1 whole vectors and a part of one, shares one copy of the body
  for (; i < end; i += W) body(i, 0, Part{end - i});
}

// N sums over a row at once: body(i, tag, add) calls add(j, vector) for sum j. Blocks keep the float32 chains short
// in very long rows.
template <int N, int U, class Body>
AAJR_INLINE void reduce(int64_t n, double (&total)[N], const Body& body) {
  constexpr int64_t block = 1 << 13;
  for (int64_t begin = 0; begin < n; begin += block) {
    vf part[N][U] = {};
    walk<U>(begin, n - begin < block ? n : begin + block, [&](int64_t i, int u, auto tag) AAJR_LAMBDA {
      body(i, tag, [&](int j, vf x) AAJR_LAMBDA { part[j][u] += x; });
    });
    for (int j = 0; j < N; ++j) {
      vf all = part[j][0];
      for (int u = 1; u < U; ++u) all += part[j][u];
      total[j] += sum(all);
    }
  }
}

// A vector of any storage type as float32.
template <class T>
inline void widen_row(const T* from, float* to, int64_t n, float offset = 0.0f) {
  walk<1>(0, n, [&](int64_t i, int, auto tag) AAJR_LAMBDA { write(to + i, read(from + i, tag) + offset, tag); });
}
inline void widen_row(const char* from, DType dtype, float* to, int64_t n, float offset = 0.0f) {
  if (dtype == DType::f32) widen_row(reinterpret_cast<const float*>(from), to, n, offset);
  else if (dtype == DType::bf16) widen_row(reinterpret_cast<const bf16*>(from), to, n, offset);
  else widen_row(reinterpret_cast<const f16*>(from), to, n, offset);
}

// Sums over rows have two levels: the first takes this many rows before it is emptied into the second.
constexpr int kSumRows = 64;

AAJR_INLINE void clear(float* x, int64_t n) {
  if (x) std::memset(x, 0, n * sizeof(float));
}
AAJR_INLINE void flush(float* from, float* to, int64_t n) {
  if (!from) return;
  for (int64_t i = 0; i < n; ++i) to[i] += from[i], from[i] = 0.0f;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
