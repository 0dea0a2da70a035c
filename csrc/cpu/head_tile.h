// Tiles of the streamed head, words by tokens: zᵀ = W hᵀ, so that rows of the weight are used as they lie in memory,
// statistics of a token stay in one lane of a vector, and words need no padding.
//
// Tokens come in chunks (what bounds the memory) of equal blocks. A tile has a row for every word of its block and a
// column for every active stack and token: stack a of token t is column a * block + t. Padding columns hold hidden
// states of zero and get cotangents of zero.
#pragma once

#include "gemm.h"
#include "head.h"
#include "parallel.h"
#include "simd.h"

namespace aajr {
namespace AAJR_ARCH {

constexpr int64_t kWords = 144;                     // words of a tile, a multiple of MR
constexpr int64_t kColumns = 288;                   // its columns at most, unless there are more than 36 stacks
constexpr int64_t kInner = NR > 16 ? 256 : 384;     // a panel of B of that many rows stays in the first-level cache
constexpr int64_t kChunk = 1 << 22;                 // floats of the hidden states of a chunk
constexpr int64_t kPartials = 1 << 24;              // and of the partial sums of their cotangents over all threads

AAJR_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
AAJR_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
AAJR_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Row stride of at least n floats that visits all sets of the first-level cache: an odd number of cache lines.
AAJR_INLINE int64_t spread(int64_t n) { return round_up(n, 16) + (round_up(n, 16) / 16 % 2 == 0 ? 16 : 0); }

// Which stacks take part: `logits` without labels or cap needs no primal, `l2` no tangents, and so on.
struct Active {
  bool primal;
  int64_t tangents;
  int64_t count() const { return primal + tangents; }
  int64_t first() const { return primal ? 0 : 1; }
};

struct Layout {
  Active active;
  int64_t size, padded;     // C, and C rounded up to whole panels
  int64_t chunk, block;     // tokens of a chunk (the last may have fewer) and of a block, padded to whole vectors
  int64_t columns, ld;      // of a tile
  int64_t w_ld;             // of a block of the weight
  int parts;                // shares of the vocabulary, one a thread

  int64_t blocks(int64_t tokens) const { return ceil_div(tokens, block); }
  int64_t hidden() const { return columns * size; }         // floats of a block of hᵀ
  int64_t hidden_rows() const { return columns * padded; }  // and of h, or its cotangent, in rows
};

inline Layout layout_of(const HeadInput& p, Active active) {
  Layout l{};
  l.active = active;
  l.size = p.size;
  l.padded = round_up(p.size, NR);
  l.w_ld = spread(l.padded);
  const int64_t most = max64(1, kColumns / (active.count() * W)) * W;  // tokens of a block
  const int64_t floats = max64(1, active.count() * l.padded);
  l.parts = static_cast<int>(max64(1, min64(p.threads, ceil_div(p.words, 32))));
  const int64_t fit = min64(kChunk / floats, kPartials / (floats * l.parts));
  l.chunk = max64(round_up(128, most), fit / most * most);
  if (l.chunk > p.tokens) l.chunk = p.tokens;
  if (p.kept != nullptr) l.chunk = p.tokens;
  l.block = p.kept != nullptr ? round_up(p.tokens, W)  // all in one
                              : round_up(ceil_div(l.chunk, max64(1, ceil_div(l.chunk, most))), W);
  l.columns = round_up(active.count() * l.block, NR);
  l.ld = spread(l.columns);
  return l;
}

template <class T>
AAJR_INLINE void copy_wide(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
}
template <class T>
AAJR_INLINE void copy_narrow(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
}

// Elements [offset, offset + n) of a tensor to floats, and back.
inline void widen_row(const char* from, DType dtype, int64_t offset, int64_t n, float* to) {
  if (dtype == DType::f32) copy_wide(reinterpret_cast<const float*>(from) + offset, n, to);
  else if (dtype == DType::bf16) copy_wide(reinterpret_cast<const bf16*>(from) + offset, n, to);
  else copy_wide(reinterpret_cast<const f16*>(from) + offset, n, to);
}
inline void narrow_row(const float* from, DType dtype, int64_t offset, int64_t n, char* to) {
  if (dtype == DType::f32) copy_narrow(from, n, reinterpret_cast<float*>(to) + offset);
  else if (dtype == DType::bf16) copy_narrow(from, n, reinterpret_cast<bf16*>(to) + offset);
  else copy_narrow(from, n, reinterpret_cast<f16*>(to) + offset);
}

// A block of hidden states as right operands: hᵀ in panels over its columns, for the logits, and h in panels over C,
// for the cotangent of the weight (null where that is not needed). `row` holds spread(padded) floats.
inline void pack_hidden(const HeadInput& p, const Layout& l, int64_t token, int64_t tokens, float* transposed,
                        float* rows, float* row) {
  for (int64_t i = 0; i < l.hidden(); ++i) transposed[i] = 0.0f;
  if (rows != nullptr)
    for (int64_t i = 0; i < l.hidden_rows(); ++i) rows[i] = 0.0f;
  for (int64_t c = 0; c < l.padded; ++c) row[c] = 0.0f;
  for (int64_t a = 0; a < l.active.count(); ++a) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t offset = (l.active.first() + a) * p.h_stack + (token + t) * p.h_row, column = a * l.block + t;
      widen_row(p.h, p.dtype, offset, p.size, row);
      float* to = transposed + column / NR * (p.size * NR) + column % NR;
      for (int64_t c = 0; c < p.size; ++c) to[c * NR] = row[c];
      if (rows == nullptr) continue;
      for (int64_t c = 0; c < l.padded; c += W)
        store(rows + (c / NR * l.columns + column) * NR + c % NR, load(row + c));
    }
  }
}

// A block of the weight in rows and, where `panels` is not null, as right operand in panels over C.
inline void pack_words(const HeadInput& p, const Layout& l, int64_t word, int64_t words, float* rows, float* panels,
                       float* bias) {
  for (int64_t v = 0; v < words; ++v) {
    float* row = rows + v * l.w_ld;
    widen_row(p.weight, p.dtype, (word + v) * p.w_row, p.size, row);
    if (panels == nullptr) continue;
    for (int64_t c = p.size; c < l.padded; ++c) row[c] = 0.0f;
    for (int64_t c = 0; c < l.padded; c += W) store(panels + (c / NR * words + v) * NR + c % NR, load(row + c));
  }
  if (p.bias != nullptr) widen_row(p.bias, p.dtype, word, words, bias);
  else
    for (int64_t v = 0; v < words; ++v) bias[v] = 0.0f;
}

inline void product(int64_t m, int64_t n, const Term& term, bool accumulate, float* c, int64_t ldc) {
  const Term terms[1] = {term};
  if (accumulate) gemm<1, true>(m, n, terms, c, ldc);
  else gemm<1, false>(m, n, terms, c, ldc);
}

// z[words, columns] = W hᵀ
inline void logits_product(const Layout& l, int64_t words, const float* weight, const float* transposed, float* z) {
  int64_t c = 0;
  do {
    const int64_t inner = min64(kInner, l.size - c);
    const Term term{weight + c, l.w_ld, 1, transposed + c * NR, NR, l.size * NR, inner};
    product(words, l.columns, term, c > 0, z, l.ld);
    c += inner;
  } while (c < l.size);
}

// h_bar[columns, C] (+)= z_barᵀ W
inline void hidden_product(const Layout& l, int64_t words, const float* z_bar, const float* panels, bool accumulate,
                           float* h_bar) {
  const Term term{z_bar, 1, l.ld, panels, NR, words * NR, words};
  product(l.columns, l.padded, term, accumulate, h_bar, l.padded);
}

// w_bar[words, C] (+)= z_bar h
inline void weight_product(const Layout& l, int64_t words, const float* z_bar, const float* rows, bool accumulate,
                           float* w_bar) {
  const Term term{z_bar, l.ld, 1, rows, NR, l.columns * NR, l.columns};
  product(words, l.padded, term, accumulate, w_bar, l.padded);
}

}  // namespace AAJR_ARCH
}  // namespace aajr
