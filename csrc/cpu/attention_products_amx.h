// Operands of attention's products in bfloat16, for the tile registers; names and roles are those of
// attention_products.h. Queries, keys, values and cotangents are bfloat16 already; tiles are rounded once.
//
// Products with a tile as the left factor (P V, dS K) take it by rows. Those with its transpose (P^T G, dS^T Q) are
// formed transposed, G^T P and Q^T dS, since a tile becomes a right factor by interleaving pairs of its rows.
#pragma once

#include "amx.h"

namespace aajr {
namespace AAJR_ARCH {

using Number = bf16;
using ProductTerm = PairTerm;
constexpr int64_t QB = 64;
constexpr int64_t KB = 256;
constexpr int64_t LD = KB + 16;
constexpr int64_t kLeft = KB + kDepth;  // row stride of a rounded tile
constexpr bool kRounded = true;

// Tiles are held whole.
AAJR_INLINE int64_t extent(int64_t, int64_t, int64_t padded) { return padded; }
AAJR_INLINE void clear_beyond(float*, int64_t, int64_t) {}
template <bool ACCUMULATE, class Shape>
inline void gemm(int64_t m, int64_t n, const PairTerm* terms, int count, float* c, int64_t ldc, const Shape&) {
  gemm<ACCUMULATE>(m, n, terms, count, c, ldc);
}

// The rows, and where `both` their transpose.
struct QueryOperand {
  bf16 *rows, *columns;
  int64_t width, ld;
  static int64_t numbers(int64_t width, bool both) { return (both ? 2 : 1) * QB * round_up(width, kDepth); }
  QueryOperand(bf16* memory, int64_t width, bool both)
      : rows(memory), width(width), ld(round_up(width, kDepth)) {
    columns = both ? memory + QB * ld : nullptr;
  }
  // without the factor, which would cost digits: scores get it
  void load(const bf16* src, int64_t stride, int64_t count, float) const {
    pair_left(src, stride, count, width, rows, ld);
    if (columns) pair_left_transposed(src, stride, count, width, columns, QB);
  }
};

struct TileOperand {
  const bf16 *left, *right;
  static int64_t numbers() { return QB * (kLeft + KB); }
  // Rounds mb rows and `padded` columns of a tile to `memory`.
  TileOperand(const float* tile, bf16* memory, int64_t mb, int64_t padded, bool as_left, bool as_right)
      : left(memory), right(memory + QB * kLeft) {
    bf16* to_right = memory + QB * kLeft;
    for (int64_t i = 0; i < round_up(mb, kDepth); i += 2)
      for (int64_t j = 0; j < padded; j += NR) {
        vf x[2][2] = {};
        for (int64_t e = 0; e < 2 && i + e < mb; ++e)
          for (int64_t v = 0; v < 2; ++v) x[e][v] = load(tile + (i + e) * LD + j + v * W);
        if (as_left)
          for (int64_t e = 0; e < 2; ++e) store_halves(memory + (i + e) * kLeft + j, x[e][0], x[e][1]);
        if (as_right)
          for (int64_t v = 0; v < 2; ++v)
            store_pairs(to_right + j * QB + i * NR + v * 2 * W, x[0][v], x[1][v]);
      }
  }
};

struct Panels {
  bf16* data;
  int64_t source, width, stack;
  Panels(bf16* data, int64_t rows, int64_t width)
      : data(data), source(width), width(round_up(width, kDepth)), stack(round_up(rows, NR) * this->width) {}
  PairTerm times(const QueryOperand& a, int64_t index, int64_t first) const {
    return {a.rows, a.ld, data + index * stack + first * width, width * NR, width};
  }
  void pack(const bf16* src, int64_t stride, int64_t index, int64_t first, int64_t count) const {
    for (int64_t j = 0; j < count; j += NR)
      pair_right_transposed(src + j * stride, stride, count - j < NR ? count - j : NR, source,
                            data + index * stack + (first + j) * width, width);
  }
};
struct Dense {
  bf16* data;
  int64_t rows, width, stack;
  Dense(bf16* data, int64_t rows, int64_t width)
      : data(data), rows(round_up(rows, kDepth)), width(width), stack(this->rows * round_up(width, NR)) {}
  PairTerm times(const TileOperand& a, int64_t index, int64_t first, int64_t k) const {
    return {a.left, kLeft, data + index * stack + first * NR, rows * NR, round_up(k, kDepth)};
  }
  void pack(const bf16* src, int64_t stride, int64_t index, int64_t first, int64_t count) const {
    for (int64_t d = 0; d < width; d += NR)
      pair_right(src + d, stride, count, width - d, data + index * stack + d * rows + first * NR,
                 round_up(count, kDepth));
  }
};

// Sums over queries, transposed: [stacks][width][keys].
struct KeySums {
  float* data;
  int64_t width, ld, stack;
  // columns of tiles must not all fall into one cache set, hence a stride that is no power of two
  KeySums(float* data, int64_t rows, int64_t width)
      : data(data), width(width), ld(round_up(rows, NR) + 16), stack(round_up(width, kTileRows) * ld) {}
  static PairTerm term(const TileOperand& tile, const QueryOperand& rows, int64_t mb) {
    return {rows.columns, QB, tile.right, QB * NR, round_up(mb, kDepth)};
  }
  struct Target {
    int64_t m, n;
    float* c;
    int64_t ldc;
  };
  Target target(int64_t index, int64_t first, int64_t count) const {
    return {width, round_up(count, NR), data + index * stack + first, ld};
  }
  void read(int64_t index, int64_t j, int64_t parts, int64_t part_stride, float* row) const {
    for (int64_t d = 0; d < width; ++d) {
      const float* from = data + index * stack + d * ld + j;
      float total = *from;
      for (int64_t part = 1; part < parts; ++part) total += from[part * part_stride];
      row[d] = total;
    }
  }
};

}  // namespace AAJR_ARCH
}  // namespace aajr
