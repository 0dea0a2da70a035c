// Small matrix products in registers: the arithmetic of attention and of the head.
//
//   C[m, n] = beta C + sum over terms of A_t[m, k_t] B_t[k_t, n]          (beta 0 or 1)
//
// A tile of MR rows and NR columns stays in registers over all terms, so C is touched once however many products it
// sums. Products of a tile on the diagonal of causal attention leave out what is not wanted or zero. Contracts: n is a
// multiple of NR (allocate tiles with round_up(n, NR) columns and zero the padding), columns are contiguous within a
// panel of NR, C has row stride ldc. A has arbitrary strides, so a transposed A needs no copy.
#pragma once

#include <type_traits>

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

// Parts of a product that need not be formed: the rows of a panel before first_row, the depths outside [from, to).
struct Whole {
  int64_t first_row(int64_t) const { return 0; }
  int64_t from(int64_t) const { return 0; }
  int64_t to(int64_t) const { return INT64_MAX; }
};
// C(i, j) is wanted for j <= i + diagonal only.
struct LowerResult : Whole {
  int64_t diagonal;
  explicit LowerResult(int64_t diagonal) : diagonal(diagonal) {}
  int64_t first_row(int64_t column) const { return column <= diagonal ? 0 : (column - diagonal) / MR * MR; }
};
// A(i, p) is zero for p > i + diagonal.
struct LowerLeft : Whole {
  int64_t diagonal;
  explicit LowerLeft(int64_t diagonal) : diagonal(diagonal) {}
  int64_t to(int64_t last_row) const { return last_row + diagonal + 1; }
};
// A(i, p) is zero for i > p + diagonal.
struct UpperLeft : Whole {
  int64_t diagonal;
  explicit UpperLeft(int64_t diagonal) : diagonal(diagonal) {}
  int64_t from(int64_t row) const { return row <= diagonal ? 0 : row - diagonal; }
};

// body(0), ..., body(N - 1) with constants: arrays that are indexed by them stay in registers.
template <int N, int I = 0, class Body>
AAJR_INLINE void unrolled(const Body& body) {
  if constexpr (I < N) {
    body(std::integral_constant<int, I>());
    unrolled<N, I + 1>(body);
  }
}

template <int ROWS, bool ACCUMULATE>
inline __attribute__((noinline)) void micro_kernel(const Term* terms, int count, int64_t i, int64_t panel, int64_t from,
                                                   int64_t to, float* c, int64_t ldc) {
  // C often lies in an outer cache: it is on its way while the products are formed, and added at the end, so that a sum
  // of many calls rounds like a sum of blocks and not like one long chain
  for (int r = 0; r < ROWS; ++r) __builtin_prefetch(c + r * ldc, 1);
  vf acc[ROWS * NV];
  unrolled<ROWS * NV>([&](auto e) { acc[e] = vf{}; });
  for (const Term* const end = terms + count; terms != end; ++terms) {
    const int64_t a_row = terms->a_row, a_col = terms->a_col, b_row = terms->b_row;
    const int64_t k = terms->k < to ? terms->k : to;
    const float* a = terms->a + i * a_row + from * a_col;
    const float* b = terms->b + panel * terms->b_panel + from * b_row;
    for (int64_t p = from; p < k; ++p) {
      vf right[NV];
      unrolled<NV>([&](auto v) { right[v] = load(b + v * W); });
      unrolled<ROWS>([&](auto r) {
        const float left = a[r * a_row];
        unrolled<NV>([&](auto v) { acc[r * NV + v] += left * right[v]; });
      });
      a += a_col;
      b += b_row;
    }
  }
  unrolled<ROWS>([&](auto r) {
    unrolled<NV>([&](auto v) {
      float* to = c + r * ldc + v * W;
      store(to, ACCUMULATE ? load(to) + acc[r * NV + v] : acc[r * NV + v]);
    });
  });
}

template <int ROWS, bool ACCUMULATE, class Shape>
inline void row_block(const Term* terms, int count, int64_t& i, int64_t m, int64_t panel, float* c, int64_t ldc,
                      const Shape& shape) {
  for (; i + ROWS <= m; i += ROWS)
    micro_kernel<ROWS, ACCUMULATE>(terms, count, i, panel, shape.from(i), shape.to(i + ROWS - 1), c + i * ldc, ldc);
  // few rows leave the multipliers waiting for one another, so what remains goes in as few blocks as possible
  constexpr int kNext = ROWS > 8 ? 8 : ROWS > 4 ? 4 : ROWS > 2 ? 2 : 1;
  if constexpr (ROWS > 1) row_block<kNext, ACCUMULATE>(terms, count, i, m, panel, c, ldc, shape);
}

// The panel of B stays in the first-level cache while the rows of A pass by.
template <bool ACCUMULATE, class Shape = Whole>
inline void gemm(int64_t m, int64_t n, const Term* terms, int count, float* c, int64_t ldc,
                 const Shape& shape = Shape()) {
  for (int64_t panel = 0; panel * NR < n; ++panel) {
    int64_t i = shape.first_row(panel * NR);
    row_block<MR, ACCUMULATE>(terms, count, i, m, panel, c + panel * NR, ldc, shape);
  }
}

// The same with the number of terms known to the compiler.
template <int TERMS, bool ACCUMULATE>
inline void gemm(int64_t m, int64_t n, const Term (&terms)[TERMS], float* c, int64_t ldc) {
  gemm<ACCUMULATE>(m, n, terms, TERMS, c, ldc);
}

}  // namespace AAJR_ARCH
}  // namespace aajr
