// The elementwise part of attention's backward: what a tile holds and how its cotangents follow from it.
#pragma once

#include "attention_tiles.h"

namespace aajr {
namespace AAJR_ARCH {

// C += (or =) a sum of products of any number of terms.
template <class Shape>
class Product {
 public:
  Product(const Shape& shape, int64_t m, int64_t n, float* c, int64_t ldc, bool accumulate = true)
      : shape_(shape), m_(m), n_(n), c_(c), ldc_(ldc), accumulate_(accumulate) {}
  Product(const Shape& shape, const KeySums::Target& to) : Product(shape, to.m, to.n, to.c, to.ldc) {}
  void add(const ProductTerm& term) {
    if (count_ == kMost) run();
    terms_[count_++] = term;
  }
  void run() {
    if (accumulate_) gemm<true>(m_, n_, terms_, count_, c_, ldc_, shape_);
    else gemm<false>(m_, n_, terms_, count_, c_, ldc_, shape_);
    accumulate_ = true;
    count_ = 0;
  }

 private:
  static constexpr int kMost = 8;
  Shape shape_;
  int64_t m_, n_;
  float* c_;
  int64_t ldc_;
  bool accumulate_;
  int count_ = 0;
  ProductTerm terms_[kMost];
};

// Operands of one (batch row, key head) and part of its keys, laid out in this order.
struct Operands {
  Panels k_t;
  Dense k;
  Panels v_t;
  static int64_t k_t_floats(const AttentionBackward& p, const KeyPart& part) {
    return floats_for(part.k.stacks * Panels(nullptr, part.longest, p.D).stack);
  }
  static int64_t k_floats(const AttentionBackward& p, const KeyPart& part) {
    return floats_for(part.k.stacks * Dense(nullptr, part.longest, p.D).stack);
  }
  static int64_t floats(const AttentionBackward& p, const KeyPart& part) {
    return k_t_floats(p, part) + k_floats(p, part) +
           floats_for(part.v.stacks * Panels(nullptr, part.longest, p.V).stack);
  }
  Operands(float* base, const AttentionBackward& p, const KeyPart& part)
      : k_t(as_numbers(base), part.longest, p.D),
        k(as_numbers(base + k_t_floats(p, part)), part.longest, p.D),
        v_t(as_numbers(base + k_t_floats(p, part) + k_floats(p, part)), part.longest, p.V) {}
};

// A unit's sums: gradients of the keys and values of every part, and the gradient of a bias that is the same for all
// queries [bias stacks][heads of the group or 1][columns or 1].
struct Sums {
  const AttentionBackward& p;
  float* base;
  static bool own_bias(const AttentionBackward& p) { return p.bias_bar != nullptr && p.bias_bar_strides.row == 0; }
  static int64_t bias_floats(const AttentionBackward& p) {
    return own_bias(p) ? p.mask.stacks * (p.H / p.HK) * p.columns : 0;
  }
  static int64_t k_floats(const AttentionBackward& p, const KeyPart& part) {
    return part.k_bar.data ? part.k.stacks * KeySums(nullptr, part.longest, p.D).stack : 0;
  }
  static int64_t v_floats(const AttentionBackward& p, const KeyPart& part) {
    return part.v_bar.data ? part.v.stacks * KeySums(nullptr, part.longest, p.V).stack : 0;
  }
  // Floats of the parts before one.
  static int64_t before(const AttentionBackward& p, int part) {
    int64_t floats = 0;
    for (int i = 0; i < part; ++i) floats += k_floats(p, p.parts[i]) + v_floats(p, p.parts[i]);
    return floats;
  }
  static int64_t floats(const AttentionBackward& p) {
    return round_up(before(p, p.part_count) + bias_floats(p), 16);  // whole cache lines
  }
  KeySums k(int part) const { return {base + before(p, part), p.parts[part].longest, p.D}; }
  KeySums v(int part) const {
    return {base + before(p, part) + k_floats(p, p.parts[part]), p.parts[part].longest, p.V};
  }
  float* bias(int stack, int64_t head, int64_t column) const {
    return base + before(p, p.part_count) + (stack * (p.H / p.HK) + head) * p.columns + column;
  }
};

struct Workspace {
  float *queries, *cotangents, *factors, *dq, *scores, *taus, *slopes, *sbar, *rates, *raw, *tbar, *d0, *d1;
  int64_t ld_q, width_q, width_v, tangents;
  static int64_t operand_floats(int64_t width) { return floats_for(QueryOperand::numbers(width, true)); }
  static int64_t floats(const AttentionBackward& p) {
    const int64_t k = p.K;
    return (1 + k) * (QB * round_up(p.D, NR) + operand_floats(p.D) + operand_floats(p.V)) +
           2 * (1 + k) * floats_for(TileOperand::numbers()) + (4 + 3 * k) * QB * LD + (1 + k) * QB + 64;
  }
  Workspace(float* base, const AttentionBackward& p) {
    const int64_t k = p.K;
    ld_q = round_up(p.D, NR), width_q = p.D, width_v = p.V, tangents = k;
    auto take = [&](int64_t n) {
      float* at = base;
      base += n;
      return at;
    };
    scores = take(QB * LD);
    taus = take(QB * LD);    // with a softcap: tanh(S0 / c)
    slopes = take(QB * LD);  // and its derivative cap'
    sbar = take(QB * LD);
    rates = take(k * QB * LD);
    raw = take(k * QB * LD);  // with a softcap: S'_k before the tangent of the bias
    tbar = take(k * QB * LD);
    queries = take((1 + k) * operand_floats(width_q));
    dq = take((1 + k) * QB * ld_q);
    cotangents = take((1 + k) * operand_floats(width_v));
    d0 = take(QB);
    d1 = take(k * QB);
    factors = take(2 * (1 + k) * floats_for(TileOperand::numbers()));
  }
  QueryOperand query(int64_t t) const {
    return {as_numbers(queries + t * operand_floats(width_q)), width_q, true};
  }
  QueryOperand cotangent(int64_t t) const {
    return {as_numbers(cotangents + t * operand_floats(width_v)), width_v, true};
  }
  float* rate(int64_t t) const { return rates + t * QB * LD; }
  float* d_query(int64_t t) const { return dq + t * QB * ld_q; }
  float* t_bar(int64_t t) const { return tbar + t * QB * LD; }
  // Tiles as factors of products: P and P c_k, for the gradients of values; dS and dS'_k.
  TileOperand weight(int64_t t, int64_t mb, int64_t padded) const {
    return {t ? rate(t - 1) : scores, factor(t), mb, padded, false, true};
  }
  TileOperand bar(int64_t t, int64_t mb, int64_t padded, bool for_queries, bool for_keys) const {
    return {t ? t_bar(t - 1) : sbar, factor(1 + tangents + t), mb, padded, for_queries, for_keys};
  }

 private:
  Number* factor(int64_t i) const { return as_numbers(factors + i * floats_for(TileOperand::numbers())); }
};

template <class T>
inline float dot_row(const T* a, const T* b, int64_t width) {
  vf total{};
  int64_t d = 0;
  for (; d + W <= width; d += W) total += load(a + d) * load(b + d);
  if (d < width) total += load_part(a + d, width - d) * load_part(b + d, width - d);
  return sum(total);
}

struct Block {
  int64_t h, i0, mb;
};

// Queries (times the scale), cotangents, and D0, D1_k of a block.
template <class T>
inline void load_block(const AttentionBackward& p, const Workspace& w, const Sequence& s, const Block& at) {
  for (int t = 0; t < p.q.stacks; ++t)
    w.query(t).load(row_of<const T>(p.q, s, at.h, t, at.i0), p.q.row, at.mb, p.scale);
  for (int64_t i = 0; i < at.mb; ++i) w.d0[i] = 0.0f;
  for (int t = 0; t <= p.K; ++t) {
    w.cotangent(t).load(row_of<const T>(p.out_bar, s, at.h, t, at.i0), p.out_bar.row, at.mb, 1.0f);
    for (int64_t i = 0; i < at.mb; ++i) {
      const T* g = row_of<const T>(p.out_bar, s, at.h, t, at.i0 + i);
      w.d0[i] += dot_row(row_of<const T>(p.out, s, at.h, t, at.i0 + i), g, p.V);
      if (t) w.d1[(t - 1) * QB + i] = dot_row(row_of<const T>(p.out, s, at.h, 0, at.i0 + i), g, p.V);
    }
  }
}

// scores: S / scale -> P with dropout factors; rates: S'_k / scale -> c_k times that; tbar: A_k -> dS'_k; sbar: B -> dS.
template <bool SCORES, bool DROP>
inline void differentiate(const AttentionBackward& p, const Workspace& w, const Dropout& dropout, const float* shift,
                   const float* norm, const float* mu, const Sequence& s, const Block& at, int64_t j0, int64_t padded,
                   int64_t diagonal, float scale) {
  for (int64_t i = 0; i < at.mb; ++i) {
    float *score = w.scores + i * LD, *s_bar = w.sbar + i * LD;
    const float top = shift[at.i0 + i], share = norm[at.i0 + i], d0 = w.d0[i];
    const uint8_t* keep = DROP ? dropout.row(p, s, at.h, at.i0 + i) : nullptr;
    const int64_t tangents = SCORES ? p.K : 0, held = extent(i, diagonal, padded);
    for (int64_t j = 0; j < held; j += W) {
      const vf prob = exp_flushed(load(score + j) * scale - top) * share;
      const vf factor = DROP ? dropout.factor(keep, s.before + j0 + j) : splat(1.0f);
      const vf kept = DROP ? prob * factor : prob;
      vf bar = prob * ((DROP ? load(s_bar + j) * factor : load(s_bar + j)) - d0);
      for (int64_t t = 0; t < tangents; ++t) {
        float *rate = w.rate(t) + i * LD + j, *t_bar = w.t_bar(t) + i * LD + j;
        const vf c = load(rate) * scale - mu[t * p.mu_stack + at.i0 + i];
        const vf a = DROP ? load(t_bar) * factor : load(t_bar);
        const vf d = prob * (a - w.d1[t * QB + i]);
        bar += d * c;
        store(rate, kept * c);
        store(t_bar, d);
      }
      store(score + j, kept);
      store(s_bar + j, bar);
    }
    clear_beyond(score, held, padded);
    clear_beyond(s_bar, held, padded);
    for (int64_t t = 0; t < tangents; ++t) {
      clear_beyond(w.rate(t) + i * LD, held, padded);
      clear_beyond(w.t_bar(t) + i * LD, held, padded);
    }
  }
}

// scores: S0 / scale -> S = c tanh(S0 / c).
inline void cap_scores(float cap, float scale, const Block& at, int64_t padded, const Workspace& w) {
  const float inverse = scale / cap;
  for (int64_t i = 0; i < at.mb; ++i)
    for (int64_t j = 0; j < padded; j += W) {
      const Tanh t = tanh(load(w.scores + i * LD + j) * inverse);
      store(w.scores + i * LD + j, t.t * cap);
      store(w.taus + i * LD + j, t.t);
      store(w.slopes + i * LD + j, t.slope);
    }
}

inline int64_t bias_element(const Mask& m, const Sequence& s, int64_t stack, int64_t h, int64_t i, int64_t j) {
  return stack * m.stack + s.batch * m.batch + h * m.head + i * m.row + (s.before + j) * m.col;
}

// S'_k from S0'_k / scale: cap' and the tangent of the bias.
inline void finish_rate(const AttentionBackward& p, const Workspace& w, const Sequence& s, const Block& at, int64_t j0,
                 int64_t nb, int64_t padded, int k, float scale) {
  if (p.softcap == 0.0f && scale != 1.0f) scale_tile(scale, at.mb, padded, w.rate(k));
  for (int64_t i = 0; i < at.mb; ++i) {
    float* rate = w.rate(k) + i * LD;
    if (p.softcap > 0.0f)
      for (int64_t j = 0; j < padded; j += W) {
        const vf capped = load(rate + j) * load(w.slopes + i * LD + j) * scale;
        store(rate + j, capped);
        store(w.raw + (k * QB + i) * LD + j, capped);
      }
    if (p.mask.is_bias() && p.mask.stacks > 1)
      add_bias_row(p.mask, bias_element(p.mask, s, 1 + k, at.h, at.i0 + i, j0), rate, nb);
  }
}

// The gradient of the bias is dS (its tangents': dS'_k), summed over what was broadcast.
inline void add_bias_gradient(const AttentionBackward& p, const Workspace& w, const Sums& sums, const Sequence& s,
                       const Block& at, int64_t j0, int64_t nb) {
  const Mask& m = p.bias_bar_strides;
  const int64_t group = p.H / p.HK;
  for (int t = 0; t < p.mask.stacks; ++t)
    for (int64_t i = 0; i < at.mb; ++i) {
      const float* from = (t ? w.t_bar(t - 1) : w.sbar) + i * LD;
      float* to = Sums::own_bias(p)
                      ? sums.bias(t, at.h % group, m.col ? s.before + j0 : 0)
                      : p.bias_bar + bias_element(m, s, t, at.h, at.i0 + i, j0);
      if (m.col) {
        for (int64_t j = 0; j < nb; ++j) to[j] += from[j];  // dense, so col is 1
      } else {
        float total = 0.0f;
        for (int64_t j = 0; j < nb; ++j) total += from[j];
        *to += total;
      }
    }
}

// dS -> dS0 = cap' dS + sum_k cap'' S0'_k dS'_k and dS'_k -> cap' dS'_k, where cap'' S0'_k = -(2 tau / c) raw_k.
inline void uncap(const AttentionBackward& p, const Block& at, int64_t padded, const Workspace& w) {
  const float bend = -2.0f / p.softcap;
  const int64_t tangents = p.has_scores() ? p.K : 0;
  for (int64_t i = 0; i < at.mb; ++i)
    for (int64_t j = 0; j < padded; j += W) {
      const vf tau = load(w.taus + i * LD + j), slope = load(w.slopes + i * LD + j);
      vf bar = load(w.sbar + i * LD + j) * slope;
      for (int64_t t = 0; t < tangents; ++t) {
        float* t_bar = w.t_bar(t) + i * LD + j;
        bar += load(w.raw + (t * QB + i) * LD + j) * load(t_bar) * (bend * tau);
        store(t_bar, load(t_bar) * slope);
      }
      store(w.sbar + i * LD + j, bar);
    }
}

}  // namespace AAJR_ARCH
}  // namespace aajr
