// Shared by attention's forward and backward: which keys a block of queries sees, packed operands, masked scores.
#pragma once

#include <cmath>

#include "attention.h"
#if defined(AAJR_AMX_PRODUCTS)
#include "attention_products_amx.h"
#else
#include "attention_products.h"
#endif
#include "math.h"
#include "parallel.h"

namespace aajr {
namespace AAJR_ARCH {

constexpr float kInf = __builtin_inff();

template <class A>
AAJR_INLINE A smaller(A a, A b) { return a < b ? a : b; }
template <class A>
AAJR_INLINE A larger(A a, A b) { return a > b ? a : b; }

// One batch row, or one packed sequence, and one part of its keys: where the rows lie and how many there are. `offset`
// counts keys from the first of the part, which is number `before` of all.
struct Sequence {
  int64_t batch, q0, n, k0, m, offset, before;
};

inline Sequence sequence(const AttentionProblem& p, const KeyPart& part, int64_t b) {
  if (p.q_start == nullptr) return {b, 0, p.N, 0, part.rows, p.offset - part.before, part.before};
  const int64_t n = p.q_start[b + 1] - p.q_start[b], m = p.k_start[b + 1] - p.k_start[b];
  return {0, p.q_start[b], n, p.k_start[b], m, p.align_right ? m - n : p.offset, 0};
}

// Blocks of KB keys, of one part after the other.
struct KeyBlock {
  int part;
  int64_t first;
};
inline int64_t key_blocks(const KeyPart& part) { return (part.longest + KB - 1) / KB; }
inline int64_t key_blocks(const AttentionProblem& p) {
  int64_t blocks = 0;
  for (int part = 0; part < p.part_count; ++part) blocks += key_blocks(p.parts[part]);
  return blocks;
}
inline KeyBlock key_block(const AttentionProblem& p, int64_t index) {
  const int64_t earlier = p.part_count > 1 ? key_blocks(p.parts[0]) : 0;
  if (index < earlier) return {0, index * KB};
  return {p.part_count - 1, (index - earlier) * KB};
}

struct Span {
  int64_t low, high;  // keys [low, high), low a multiple of NR
};

// The keys that some query in [first, last) may see.
inline Span visible(const AttentionProblem& p, const Sequence& s, int64_t first, int64_t last) {
  if (!p.causal) return {0, s.m};
  const int64_t high = larger<int64_t>(0, smaller(s.m, last + s.offset));
  int64_t low = p.window ? larger<int64_t>(0, first + s.offset - p.window + 1) : 0;
  return {low / NR * NR, high};
}

// The last key that the first query of a tile sees, counted from the tile's first key. What works on whole tiles knows
// no diagonal.
inline int64_t diagonal_of(const AttentionProblem& p, const Sequence& s, int64_t i0, int64_t j0) {
  const bool whole = !p.causal || p.softcap > 0.0f || p.mask.is_bias();
  return whole ? KB : i0 + s.offset - j0;
}

inline const float* stat_row(const float* stats, const AttentionProblem& p, const Sequence& s, int64_t h) {
  return stats + (s.batch * p.H + h) * p.N + s.q0;
}
inline float* stat_row(float* stats, const AttentionProblem& p, const Sequence& s, int64_t h) {
  return stats + (s.batch * p.H + h) * p.N + s.q0;
}

template <class T>
AAJR_INLINE T* at(const Rows& x, int64_t stack, int64_t batch, int64_t head, int64_t row) {
  return reinterpret_cast<T*>(x.data) + stack * x.stack + batch * x.batch + head * x.head + row * x.row;
}

// Row of a sequence's queries (or of anything that has a row for each query).
template <class T>
AAJR_INLINE T* row_of(const Rows& x, const Sequence& s, int64_t head, int64_t stack, int64_t row) {
  return at<T>(x, stack, s.batch, head, s.q0 + row);
}

template <class T>
AAJR_INLINE void write_row(T* out, const float* from, int64_t width, float factor) {
  int64_t d = 0;
  for (; d + W <= width; d += W) store(out + d, load(from + d) * factor);
  if (d < width) store_part(out + d, load_part(from + d, width - d) * factor, width - d);
}

// Add the bias to a tile of scores, and set the positions that are not allowed to -inf. Columns [nb, padded) are
// padding. i0 and j0 are the tile's first query and key.
template <class B>
inline void add_bias(const B* from, int64_t col, float* to, int64_t nb) {
  int64_t j = 0;
  if (col == 1)
    for (; j + W <= nb; j += W) store(to + j, load(to + j) + load(from + j));
  for (; j < nb; ++j) to[j] += get(from + j * col);
}

inline void add_bias_row(const Mask& mask, int64_t element, float* to, int64_t nb) {
  if (mask.dtype == DType::f32) add_bias(reinterpret_cast<const float*>(mask.data) + element, mask.col, to, nb);
  else if (mask.dtype == DType::bf16) add_bias(reinterpret_cast<const bf16*>(mask.data) + element, mask.col, to, nb);
  else add_bias(reinterpret_cast<const f16*>(mask.data) + element, mask.col, to, nb);
}

inline void mask_scores(const AttentionProblem& p, const Sequence& s, int64_t h, int64_t i0, int64_t mb, int64_t j0,
                        int64_t nb, int64_t padded, int64_t diagonal, float* tile) {
  const Mask& mask = p.mask;
  if (mask.data != nullptr) {
    for (int64_t i = 0; i < mb; ++i) {
      const int64_t element = s.batch * mask.batch + h * mask.head + (i0 + i) * mask.row +
                              (s.before + j0) * mask.col;
      float* row = tile + i * LD;
      if (mask.is_bias()) {
        add_bias_row(mask, element, row, nb);
      } else {
        // bytes: memory that was viewed as bool may hold others than 0 and 1
        const uint8_t* allowed = reinterpret_cast<const uint8_t*>(mask.data) + element;
        if (mask.col == 1)
          for (int64_t j = 0; j < nb; ++j) row[j] = allowed[j] ? row[j] : -kInf;
        else
          for (int64_t j = 0; j < nb; ++j) row[j] = allowed[j * mask.col] ? row[j] : -kInf;
      }
    }
  }
  for (int64_t i = 0; i < mb; ++i) {
    float* row = tile + i * LD;
    int64_t high = nb, low = 0;
    if (p.causal) {
      const int64_t last = i0 + i + s.offset;  // the last key this query sees
      high = larger<int64_t>(0, smaller(nb, last + 1 - j0));
      if (p.window) low = smaller(high, larger<int64_t>(0, last - p.window + 1 - j0));
    }
    for (int64_t j = 0; j < low; ++j) row[j] = -kInf;
    const int64_t held = extent(i, diagonal, padded);
    for (int64_t j = high; j < held; ++j) row[j] = -kInf;
  }
}

// Dropout: the factors of a query's weights, 0 or 1 / (1 - p), from the mask that the caller drew.
struct Dropout {
  float keep_factor = 1.0f;
  int64_t columns = 0;

  explicit Dropout(const AttentionProblem& p)
      : keep_factor(p.dropout >= 1.0f ? 0.0f : 1.0f / (1.0f - p.dropout)), columns(p.columns) {}
  static const uint8_t* row(const AttentionProblem& p, const Sequence& s, int64_t h, int64_t i) {
    return p.keep == nullptr ? nullptr : p.keep + ((s.batch * p.H + h) * p.N + s.q0 + i) * p.columns;
  }
  AAJR_INLINE vf factor(const uint8_t* row, int64_t column) const {
    using Bytes = uint8_t __attribute__((vector_size(W)));
    Bytes bytes{};
    if (column + W <= columns) __builtin_memcpy(&bytes, row + column, W);
    else
      for (int64_t e = 0; column + e < columns; ++e) bytes[e] = row[column + e];
    return __builtin_convertvector(bytes, vu) != 0 ? splat(keep_factor) : vf{};
  }
};

// Pack the rows [first, first + count) of every stack; first is a multiple of NR.
template <class T, class Operand>
inline void pack(const Rows& x, const Sequence& s, int64_t head, int64_t first, int64_t count, const Operand& to) {
  for (int j = 0; j < x.stacks; ++j)
    to.pack(at<const T>(x, j, s.batch, head, s.k0 + first), x.row, j, first, count);
}

// Factor that is left to multiply scores with: float32 queries carry the scale, bfloat16 ones would lose digits by it.
AAJR_INLINE float scale_of_products(const AttentionProblem& p) { return kRounded ? p.scale : 1.0f; }

AAJR_INLINE void scale_tile(float scale, int64_t mb, int64_t padded, float* tile) {
  for (int64_t i = 0; i < mb; ++i)
    for (int64_t j = 0; j < padded; j += W) store(tile + i * LD + j, load(tile + i * LD + j) * scale);
}

#if defined(AAJR_AMX_PRODUCTS)
// Whether the tile registers help: a few queries would leave most of their rows empty.
inline bool fits_tiles(const AttentionProblem& p) { return p.dtype == DType::bf16 && p.longest_q >= 4; }
#endif

// Floats that hold so many factors of products, in whole cache lines.
AAJR_INLINE int64_t floats_for(int64_t numbers) {
  return round_up(numbers * static_cast<int64_t>(sizeof(Number)), 64) / static_cast<int64_t>(sizeof(float));
}
AAJR_INLINE Number* as_numbers(float* memory) { return reinterpret_cast<Number*>(memory); }

// How many (batch row, key head) pairs to have packed at a time: enough for all threads, bounded in memory.
inline int64_t pairs_at_once(int64_t pairs, int64_t units_per_pair, int64_t floats_per_pair, int threads) {
  const int64_t wanted = (4 * threads + units_per_pair - 1) / larger<int64_t>(units_per_pair, 1);
  const int64_t budget = (int64_t{64} << 20) / larger<int64_t>(4 * floats_per_pair, 1);
  const int64_t least = (threads + units_per_pair - 1) / larger<int64_t>(units_per_pair, 1);
  return smaller(pairs, larger(smaller(wanted, budget), larger<int64_t>(least, 1)));
}

}  // namespace AAJR_ARCH
}  // namespace aajr
