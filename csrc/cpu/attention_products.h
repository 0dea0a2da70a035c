// Operands of attention's products in float32: tiles and rows are used where they lie.
//
// attention_products_amx.h has the same names for bfloat16 products; the kernels are written once for both.
#pragma once

#include "gemm.h"

namespace aajr {
namespace AAJR_ARCH {

using Number = float;       // what products multiply
using ProductTerm = Term;
constexpr int64_t QB = 48;         // queries in a tile
constexpr int64_t KB = 128;        // keys in a tile
constexpr int64_t LD = KB + 16;    // row stride of a tile: not a power of two, so that columns spread over cache sets
constexpr bool kRounded = false;   // whether operands have fewer digits than float32

struct TileScope {
  TileScope() {}
};

// Columns of row i that a tile holds: products form row blocks and panels with a key that some query of the row block
// sees, key j being seen by queries i >= j - diagonal. One more panel is zeroed for products that run over columns.
AAJR_INLINE int64_t extent(int64_t i, int64_t diagonal, int64_t padded) {
  const int64_t seen = i / MR * MR + MR + diagonal;
  return seen >= padded ? padded : seen <= 0 ? 0 : round_up(seen, NR);
}
AAJR_INLINE void clear_beyond(float* row, int64_t extent, int64_t padded) {
  if (extent < padded)
    for (int64_t j = extent; j < extent + NR; j += W) store(row + j, vf{});
}

// rows x width numbers, times `factor`, to a dense float tile of row stride ld >= width, zero beyond the width.
template <class T>
inline void load_rows(const T* src, int64_t stride, int64_t rows, int64_t width, float factor, float* dst, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = src + i * stride;
    float* to = dst + i * ld;
    int64_t d = 0;
    for (; d + W <= width; d += W) store(to + d, load(from + d) * factor);
    if (d < width) store_part(to + d, load_part(from + d, width - d) * factor, width - d);
    for (d = width; d < ld; ++d) to[d] = 0.0f;
  }
}

// Panels of NR rows of `src`, transposed: dst[(panel * width + d) * NR + j] = src[panel * NR + j][d], zero rows beyond.
template <class T>
inline void pack_transposed(const T* src, int64_t stride, int64_t rows, int64_t width, float* dst) {
  for (int64_t j0 = 0; j0 < rows; j0 += NR, dst += width * NR) {
    const int64_t count = rows - j0 < NR ? rows - j0 : NR;
    int64_t d = 0;
    for (; d + W <= width; d += W) {
      float block[NR][W];
      for (int64_t j = 0; j < count; ++j) store(block[j], load(src + (j0 + j) * stride + d));
      for (int64_t j = count; j < NR; ++j) store(block[j], vf{});
      for (int e = 0; e < W; ++e)
        for (int j = 0; j < NR; ++j) dst[(d + e) * NR + j] = block[j][e];
    }
    for (; d < width; ++d)
      for (int64_t j = 0; j < NR; ++j) dst[d * NR + j] = j < count ? get(src + (j0 + j) * stride + d) : 0.0f;
  }
}

// A block's rows of queries (times the scale) or cotangents.
struct QueryOperand {
  float* data;
  int64_t width, ld;
  static int64_t numbers(int64_t width, bool) { return QB * round_up(width, NR); }
  QueryOperand(float* memory, int64_t width, bool) : data(memory), width(width), ld(round_up(width, NR)) {}
  template <class T>
  void load(const T* src, int64_t stride, int64_t rows, float factor) const {
    load_rows(src, stride, rows, width, factor, data, ld);
  }
};

// A tile of numbers for each query and key.
struct TileOperand {
  const float* data;
  static int64_t numbers() { return 0; }
  TileOperand(const float* tile, float*, int64_t, int64_t, bool, bool) : data(tile) {}
};

// The keys and values of one (batch row, key head) as operands of the products; stacks follow one another.
struct Panels {  // [stacks][round_up(rows, NR) / NR][width][NR]: the transpose, in panels
  float* data;
  int64_t width, stack;
  Panels(float* data, int64_t rows, int64_t width) : data(data), width(width), stack(round_up(rows, NR) * width) {}
  // Product with rows [first, ...) of the packed matrix as columns; first is a multiple of NR.
  Term times(const QueryOperand& a, int64_t index, int64_t first) const {
    return packed(a.data, a.ld, 1, data + index * stack + first * width, width);
  }
  template <class T>
  void pack(const T* src, int64_t stride, int64_t index, int64_t first, int64_t count) const {
    pack_transposed(src, stride, count, width, data + index * stack + first * width);
  }
};
struct Dense {  // [stacks][round_up(width, NR) / NR][rows][NR]: the rows themselves, in panels; zero beyond the width
  float* data;
  int64_t rows, width, stack;
  Dense(float* data, int64_t rows, int64_t width)
      : data(data), rows(rows), width(width), stack(rows * round_up(width, NR)) {}
  Term times(const TileOperand& a, int64_t index, int64_t first, int64_t k) const {
    return {a.data, LD, 1, data + index * stack + first * NR, NR, rows * NR, k};
  }
  template <class T>
  void pack(const T* src, int64_t stride, int64_t index, int64_t first, int64_t count) const {
    for (int64_t d = 0; d < width; d += NR)
      load_rows(src + d, stride, count, width - d < NR ? width - d : NR, 1.0f,
                data + index * stack + d * rows + first * NR, NR);
  }
};

// Sums over queries that have a row for each key: [stacks][rows][ld].
struct KeySums {
  float* data;
  int64_t ld, stack;
  KeySums(float* data, int64_t rows, int64_t width)
      : data(data), ld(round_up(width, NR)), stack(rows * ld) {}
  // tile^T times rows, over mb queries
  static Term term(const TileOperand& tile, const QueryOperand& rows, int64_t mb) {
    return transposed(tile.data, LD, rows.data, rows.ld, mb);
  }
  // The sum of all keys [first, first + count) of a stack, as a product's result.
  struct Target {
    int64_t m, n;
    float* c;
    int64_t ldc;
  };
  Target target(int64_t index, int64_t first, int64_t count) const {
    return {count, ld, data + index * stack + first * ld, ld};
  }
  // Row j of the sum of `parts` such sums.
  void read(int64_t index, int64_t j, int64_t parts, int64_t part_stride, float* row) const {
    const float* from = data + index * stack + j * ld;
    for (int64_t d = 0; d < ld; d += W) {
      vf total = load(from + d);
      for (int64_t part = 1; part < parts; ++part) total += AAJR_ARCH::load(from + part * part_stride + d);
      store(row + d, total);
    }
  }
};

}  // namespace AAJR_ARCH
}  // namespace aajr
