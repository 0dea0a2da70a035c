// Small matrix products in registers: the arithmetic of attention and of the head.
//
//   C[m, n] = beta C + sum over terms of A_t[m, k_t] B_t[k_t, n]          (beta 0 or 1)
//
// A tile of MR rows and NR columns stays in registers over all terms, so C is touched once however many products it
// sums. Contracts: n is a multiple of NR (allocate tiles with round_up(n, NR) columns and zero the padding), columns
// are contiguous within a panel of NR, C has row stride ldc. A has arbitrary strides, so a transposed A needs no copy.
#pragma once

#include "simd.h"

namespace aajr {
namespace AAJR_ARCH {

// Accumulators fill the register file: 12 of 16 registers (SSE2, AVX2), 24 of 32 (AVX-512, NEON).
#if AAJR_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif
constexpr int NV = 2;
constexpr int NR = NV * W;

AAJR_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// One product. A(i, p) = a[i * a_row + p * a_col]; B(p, j) = b[(j / NR) * b_panel + p * b_row + j % NR]: b_panel = NR
// and b_row = ld for a row-major matrix, b_panel = k * NR and b_row = NR for packed panels.
struct Term {
  const float* a;
  int64_t a_row, a_col;
  const float* b;
  int64_t b_row, b_panel;
  int64_t k;
};

AAJR_INLINE Term row_major(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k) {
  return {a, lda, 1, b, ldb, NR, k};
}
AAJR_INLINE Term packed(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t k) {
  return {a, a_row, a_col, b, NR, k * NR, k};
}
// A(i, p) = a[p * lda + i]: the transpose of a row-major matrix.
AAJR_INLINE Term transposed(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k) {
  return {a, 1, lda, b, ldb, NR, k};
}

template <int ROWS, bool ACCUMULATE>
inline __attribute__((noinline)) void micro_kernel(const Term* terms, int count, int64_t i, int64_t panel, float* c,
                                                   int64_t ldc) {
  // C often lies in an outer cache: it is on its way while the products are formed, and added at the end, so that a sum
  // of many calls rounds like a sum of blocks and not like one long chain
  for (int r = 0; r < ROWS; ++r) __builtin_prefetch(c + r * ldc, 1);
  vf acc[ROWS][NV];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = vf{};
  for (int t = 0; t < count; ++t) {
    const int64_t k = terms[t].k, a_row = terms[t].a_row, a_col = terms[t].a_col, b_row = terms[t].b_row;
    const float* a = terms[t].a + i * a_row;
    const float* b = terms[t].b + panel * terms[t].b_panel;
    for (int64_t p = 0; p < k; ++p) {
      vf right[NV];
      for (int v = 0; v < NV; ++v) right[v] = load(b + v * W);
      for (int r = 0; r < ROWS; ++r) {
        const float left = a[r * a_row];
        for (int v = 0; v < NV; ++v) acc[r][v] += left * right[v];
      }
      a += a_col;
      b += b_row;
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < NV; ++v) {
      float* to = c + r * ldc + v * W;
      store(to, ACCUMULATE ? load(to) + acc[r][v] : acc[r][v]);
    }
}

template <int ROWS, bool ACCUMULATE>
inline void row_block(const Term* terms, int count, int64_t& i, int64_t m, int64_t panel, float* c, int64_t ldc) {
  for (; i + ROWS <= m; i += ROWS) micro_kernel<ROWS, ACCUMULATE>(terms, count, i, panel, c + i * ldc, ldc);
  if constexpr (ROWS > 1) row_block<ROWS / 2, ACCUMULATE>(terms, count, i, m, panel, c, ldc);
}

// The panel of B stays in the first-level cache while the rows of A pass by.
template <bool ACCUMULATE>
inline void gemm(int64_t m, int64_t n, const Term* terms, int count, float* c, int64_t ldc) {
  for (int64_t panel = 0; panel * NR < n; ++panel) {
    int64_t i = 0;
    row_block<MR, ACCUMULATE>(terms, count, i, m, panel, c + panel * NR, ldc);
  }
}

// The same with the number of terms known to the compiler.
template <int TERMS, bool ACCUMULATE>
inline void gemm(int64_t m, int64_t n, const Term (&terms)[TERMS], float* c, int64_t ldc) {
  gemm<ACCUMULATE>(m, n, terms, TERMS, c, ldc);
}

}  // namespace AAJR_ARCH
}  // namespace aajr
