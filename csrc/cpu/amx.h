// Products of bfloat16 matrices with float32 sums on the AMX tile registers, and how their operands are laid out.
//
//   C[m, n] = beta C + sum over terms of A_t[m, k_t] B_t[k_t, n]          (beta 0 or 1)
//
// The counterpart of gemm.h for the AMX capabilities. Without AMX instructions (capability amx_emulated) the tile
// operations are loops over the same memory, rounded alike but for subnormal numbers, which the processor takes as 0.
#pragma once

#include "gemm.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace aajr {
// Where problems go that are not for AMX.
#if defined(__AMX_BF16__)
#define AAJR_WITHOUT_AMX ::aajr::avx512
#else
#define AAJR_WITHOUT_AMX ::aajr::avx512_emulated
#endif

namespace AAJR_ARCH {

constexpr int64_t kTileRows = 16;   // of a tile: 16 rows of 64 bytes
constexpr int64_t kDepth = 32;      // numbers in a row of A, rows of B
static_assert(NR == 2 * kTileRows, "a panel of B is two tiles wide");

// One product; k is a multiple of kDepth. A(i, p) = a[i * a_row + p], and B in pairs of rows, in panels of NR columns:
// B(p, j) = b[(j / NR) * b_panel + (p / 2) * 2 NR + 2 (j % NR) + p % 2]. A and C have rows up to a multiple of
// kTileRows; those beyond m may hold anything.
struct PairTerm {
  const bf16* a;
  int64_t a_row;
  const bf16* b;
  int64_t b_panel;
  int64_t k;
};

#if defined(__AMX_BF16__)

// The tile registers of this thread are configured while this lives, and free afterwards.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // GCC's intrinsic says that it reads eight bytes: the others would never be written
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};
// the compiler does not know that tile loads read memory
#define AAJR_TILES __asm__ volatile("" ::: "memory")
#define AAJR_TILE_ZERO(t) _tile_zero(t)
#define AAJR_TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define AAJR_TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define AAJR_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)

#else

class TileScope {
 public:
  TileScope() {}  // not trivial, so that the variable counts as used
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};
struct Tiles {
  vf row[8][kTileRows];
  AAJR_INLINE void zero(int t) {
    for (vf& r : row[t]) r = vf{};
  }
  AAJR_INLINE void load(int t, const void* p, int64_t stride) {
    for (int64_t i = 0; i < kTileRows; ++i) std::memcpy(&row[t][i], static_cast<const char*>(p) + i * stride, 64);
  }
  AAJR_INLINE void store(int t, void* p, int64_t stride) const {
    for (int64_t i = 0; i < kTileRows; ++i) std::memcpy(static_cast<char*>(p) + i * stride, &row[t][i], 64);
  }
  // Sums over even and odd k apart, as the processor does.
  AAJR_INLINE void dot(int c, int a, int b) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const vu left = bit_cast<vu>(row[a][i]);
      vf even{}, odd{};
      for (int64_t p = 0; p < kTileRows; ++p) {
        const vu right = bit_cast<vu>(row[b][p]);
        even += bit_cast<float>(left[p] << 16) * bit_cast<vf>(right << 16);
        odd += bit_cast<float>(left[p] & 0xffff0000u) * bit_cast<vf>(right & 0xffff0000u);
      }
      row[c][i] += even + odd;
    }
  }
};
#define AAJR_TILES Tiles tiles
#define AAJR_TILE_ZERO(t) tiles.zero(t)
#define AAJR_TILE_LOAD(t, p, stride) tiles.load(t, p, stride)
#define AAJR_TILE_STORE(t, p, stride) tiles.store(t, p, stride)
#define AAJR_TILE_DOT(c, a, b) tiles.dot(c, a, b)

#endif

// 32 columns and 16 or 32 rows of C in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
template <bool TALL, bool ACCUMULATE>
inline __attribute__((noinline)) void tile_kernel(const PairTerm* terms, int count, int64_t i, int64_t panel, float* c,
                                                  int64_t ldc) {
  AAJR_TILES;
  const int64_t c_bytes = ldc * 4;
  float* below = c + kTileRows * ldc;
  if constexpr (ACCUMULATE) {
    AAJR_TILE_LOAD(0, c, c_bytes);
    AAJR_TILE_LOAD(1, c + 16, c_bytes);
    if constexpr (TALL) {
      AAJR_TILE_LOAD(2, below, c_bytes);
      AAJR_TILE_LOAD(3, below + 16, c_bytes);
    }
  } else {
    AAJR_TILE_ZERO(0);
    AAJR_TILE_ZERO(1);
    if constexpr (TALL) {
      AAJR_TILE_ZERO(2);
      AAJR_TILE_ZERO(3);
    }
  }
  for (int t = 0; t < count; ++t) {
    const int64_t a_bytes = terms[t].a_row * 2;
    const bf16* a = terms[t].a + i * terms[t].a_row;
    const bf16* b = terms[t].b + panel * terms[t].b_panel;
    for (int64_t p = 0; p < terms[t].k; p += kDepth, a += kDepth, b += kDepth * NR) {
      AAJR_TILE_LOAD(6, b, 4 * NR);
      AAJR_TILE_LOAD(7, b + NR, 4 * NR);
      AAJR_TILE_LOAD(4, a, a_bytes);
      AAJR_TILE_DOT(0, 4, 6);
      AAJR_TILE_DOT(1, 4, 7);
      if constexpr (TALL) {
        AAJR_TILE_LOAD(5, a + kTileRows * terms[t].a_row, a_bytes);
        AAJR_TILE_DOT(2, 5, 6);
        AAJR_TILE_DOT(3, 5, 7);
      }
    }
  }
  AAJR_TILE_STORE(0, c, c_bytes);
  AAJR_TILE_STORE(1, c + 16, c_bytes);
  if constexpr (TALL) {
    AAJR_TILE_STORE(2, below, c_bytes);
    AAJR_TILE_STORE(3, below + 16, c_bytes);
  }
}

// Within a TileScope. n is a multiple of NR.
template <bool ACCUMULATE>
inline void gemm(int64_t m, int64_t n, const PairTerm* terms, int count, float* c, int64_t ldc) {
  for (int64_t panel = 0; panel * NR < n; ++panel)
    for (int64_t i = 0; i < m; i += 2 * kTileRows) {
      float* to = c + i * ldc + panel * NR;
      if (i + kTileRows < m) tile_kernel<true, ACCUMULATE>(terms, count, i, panel, to, ldc);
      else tile_kernel<false, ACCUMULATE>(terms, count, i, panel, to, ldc);
    }
}

// Two vectors rounded to bfloat16, one after the other, or their numbers in turns.
#if defined(__AVX512BF16__)
AAJR_INLINE void store_halves(bf16* p, vf first, vf second) {
  const __m512i h = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  _mm512_storeu_si512(p, h);
}
AAJR_INLINE void store_pairs(bf16* p, vf even, vf odd) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i h = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  _mm512_storeu_si512(p, _mm512_maskz_permutexvar_epi16(__mmask32(-1), _mm512_load_si512(order), h));
}
#else
AAJR_INLINE void store_halves(bf16* p, vf first, vf second) {
  store(p, first);
  store(p + W, second);
}
AAJR_INLINE void store_pairs(bf16* p, vf even, vf odd) {
  const vu pairs = narrow_bits(even) | narrow_bits(odd) << 16;
  std::memcpy(p, &pairs, sizeof pairs);
}
#endif

// Copies of bfloat16 rows; what is beyond `rows` and `width` is zero up to the padded sizes.
//
// As they are: padded is a multiple of kDepth.
inline void pair_left(const bf16* src, int64_t stride, int64_t rows, int64_t width, bf16* dst, int64_t padded) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(dst + i * padded, src + i * stride, width * sizeof(bf16));
    std::memset(dst + i * padded + width, 0, (padded - width) * sizeof(bf16));
  }
}
// Transposed, as A: dst[d * padded + i].
inline void pair_left_transposed(const bf16* src, int64_t stride, int64_t rows, int64_t width, bf16* dst,
                                 int64_t padded) {
  for (int64_t d = 0; d < width; ++d)
    for (int64_t i = 0; i < padded; ++i) dst[d * padded + i] = i < rows ? src[i * stride + d] : bf16{0};
}
// As B: one panel, columns [0, width) of at most NR, an even number of rows.
inline void pair_right(const bf16* src, int64_t stride, int64_t rows, int64_t width, bf16* dst, int64_t padded) {
  for (int64_t i = 0; i < padded; i += 2, dst += 2 * NR)
    for (int64_t d = 0; d < NR; d += W) {
      bf16 two[2][W] = {};
      const int64_t count = width - d < W ? width - d : W;
      for (int64_t e = 0; count > 0 && e < 2 && i + e < rows; ++e)
        std::memcpy(two[e], src + (i + e) * stride + d, count * sizeof(bf16));
      const vu pairs = __builtin_convertvector(load_raw<vh>(two[0]), vu) |
                       __builtin_convertvector(load_raw<vh>(two[1]), vu) << 16;
      std::memcpy(dst + 2 * d, &pairs, sizeof pairs);
    }
}
// Transposed, as B: one panel of the rows [0, rows) as columns, at most NR of them. A pair is one 32-bit number.
inline void pair_right_transposed(const bf16* src, int64_t stride, int64_t rows, int64_t width, bf16* dst,
                                  int64_t padded) {
  for (int64_t d = 0; d < padded; d += 2, dst += 2 * NR) {
    const int64_t count = width - d < 2 ? (width - d < 0 ? 0 : width - d) : 2;
    uint32_t pairs[NR] = {};
    if (count == 2)
      for (int64_t j = 0; j < rows; ++j) std::memcpy(&pairs[j], src + j * stride + d, 4);
    else if (count == 1)
      for (int64_t j = 0; j < rows; ++j) pairs[j] = src[j * stride + d].bits;
    std::memcpy(dst, pairs, sizeof pairs);
  }
}

}  // namespace AAJR_ARCH
}  // namespace aajr
