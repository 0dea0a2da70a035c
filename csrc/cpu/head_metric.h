// Elementwise arithmetic of the streamed head: logits to statistics, logits to cotangents. One lane is one token.
//
// Every tile yields, under weights w = e^(z - peak), its mean of ż - r and its sum of squares about that mean, which
// merge by the parallel variance rule, whose terms are all positive. r is ż of the likeliest word so far: a common
// offset of ż costs no digits, and neither does a word that has nearly all of the probability, since it adds zero to
// the mean. For the same reason the total is kept without that word's own weight, which is 1.
#pragma once

#include "head_tile.h"
#include "math.h"

namespace aajr {
namespace AAJR_ARCH {

struct Cap {
  float scale, in;  // s of the logits, and what is left to multiply the tile with
  float cap, inverse;
  bool capped, plain;  // plain: z = W h as it is
};

inline Cap cap_of(const HeadInput& p) {
  const bool capped = p.cap > 0.0f;
  return {p.scale, p.scale, p.cap, capped ? 1.0f / p.cap : 0.0f, capped,
          !capped && p.scale == 1.0f && p.bias == nullptr};
}

// The columns of W tokens in a tile: z at z[v * ld], tangent k at z[v * ld + first + k * step]; room for e^(z - peak).
struct Lanes {
  float *z, *w;
  int64_t ld, words, first, step, tangents;
};

AAJR_INLINE Lanes lanes_of(const Layout& l, float* tile, float* w, int64_t words, int64_t lane) {
  return {tile + lane, w, l.ld, words, l.active.primal ? l.block : 0, l.block, l.active.tangents};
}

// ---- Statistics ----------------------------------------------------------------------------------------------------

// Running results of one share of the vocabulary: arrays over the padded tokens of a chunk. The sums of w and of w²
// lack the 1 of the likeliest word, so that they are -1 while there is none. Per tangent: reference, then mean and sum
// of squares under w, then under w².
struct State {
  float* memory;
  int64_t tokens;

  static int64_t fields(int64_t tangents) { return 3 + 5 * tangents; }
  float* peak() const { return memory; }
  float* rest() const { return memory + tokens; }
  float* rest2() const { return memory + 2 * tokens; }
  float* of(int64_t k, int field) const { return memory + (3 + 5 * k + field) * tokens; }
  void clear(int64_t tangents) const {
    for (int64_t i = 0; i < fields(tangents) * tokens; ++i) memory[i] = 0.0f;
    for (int64_t i = 0; i < tokens; ++i) peak()[i] = -__builtin_inff(), rest()[i] = rest2()[i] = -1.0f;
  }
};

constexpr float kTiny = 0x1p-126f;

// Shared between the tangents of a merge: the weights before it, decayed, and the shares of both sides in the sum.
struct Mix { vf decay, before, kept, share; };

AAJR_INLINE Mix mix(vf decay, vf before, vf total) {
  const vf inverse = 1.0f / vmax(before + total, splat(kTiny));
  return {decay, before, before * inverse, total * inverse};
}

// Takes in a newcomer with the given mean and sum of squares; `shift` takes the mean before to the same reference.
AAJR_INLINE void merge(float* mean, float* square, const Mix& m, vf shift, vf new_mean, vf new_square) {
  const vf old_mean = load(mean) + shift, step = new_mean - old_mean;
  store(square, load(square) * m.decay + new_square + step * step * (m.share * m.before));
  store(mean, old_mean * m.kept + new_mean * m.share);
}

AAJR_INLINE vf finite_peak(vf peak) { return select(peak == -__builtin_inff(), vf{}, peak); }  // no word so far

// Logits and tangents from products, in place; returns the largest logit.
template <bool CAPPED>
inline vf finish_logits(const Lanes& t, bool primal, const float* bias, const Cap& c) {
  vf peak = splat(-__builtin_inff());
  for (int64_t v = 0; v < t.words; ++v) {
    float* row = t.z + v * t.ld;
    vf slope = splat(c.scale);
    if (primal) {
      vf z = (load(row) + bias[v]) * c.scale;
      if constexpr (CAPPED) {
        const Tanh h = tanh(z * c.inverse);
        z = h.t * c.cap;
        slope *= h.slope;
      }
      store(row, z);
      peak = vmax(z, peak);
    }
    for (int64_t k = 0; k < t.tangents; ++k) {
      float* tangent = row + t.first + k * t.step;
      store(tangent, load(tangent) * slope);
    }
  }
  return peak;
}

AAJR_INLINE vf peak_of(const Lanes& t, bool primal) {
  vf peak = splat(-__builtin_inff());
  for (int64_t v = 0; v < t.words * primal; ++v) peak = vmax(load(t.z + v * t.ld), peak);
  return peak;
}

// sum over words of f(v), in four partial sums
template <class F>
AAJR_INLINE vf word_sum(int64_t words, const F& f) {
  vf part[4] = {};
  int64_t v = 0;
  for (; v + 4 <= words; v += 4)
    for (int i = 0; i < 4; ++i) part[i] += f(v + i);
  for (; v < words; ++v) part[0] += f(v);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// One tangent of a tile under the weights w or w².
template <bool SQUARED>
inline void add_moments(const Lanes& t, int64_t k, vf reference, vf shift, const Mix& m, vf total, float* mean,
                        float* square) {
  const float* tangents = t.z + t.first + k * t.step;
  const auto weight = [&](int64_t v) {
    const vf w = load(t.w + v * W);
    return SQUARED ? w * w : w;
  };
  const vf new_mean = word_sum(t.words, [&](int64_t v) {
    return weight(v) * (load(tangents + v * t.ld) - reference);
  }) / vmax(total, splat(kTiny));
  const vf new_square = word_sum(t.words, [&](int64_t v) {
    const vf d = (load(tangents + v * t.ld) - reference) - new_mean;
    return weight(v) * (d * d);
  });
  merge(mean, square, m, shift, new_mean, new_square);
}

// Takes the sum of a tile's weights, of `ties` words as likely as the likeliest and of the others, into `rest`.
AAJR_INLINE Mix add_weights(float* rest, vf decay, vi moved, vf others, vf ties) {
  const vf old = load(rest), before = (old + 1.0f) * decay;
  store(rest, others + select(moved, before + (ties - 1.0f), old + ties));
  return mix(decay, before, others + ties);
}

// Takes a tile of finished logits into the state at the given lane.
inline void add_words(const Lanes& t, Metric metric, bool primal, vf tile_peak, const State& s, int64_t lane) {
  if (metric == Metric::logits)
    for (int64_t k = 0; k < t.tangents; ++k) {
      const float* tangents = t.z + t.first + k * t.step;
      float* norm = s.of(k, 2) + lane;
      store(norm, load(norm) + word_sum(t.words, [&](int64_t v) {
        const vf x = load(tangents + v * t.ld);
        return x * x;
      }));
    }
  if (!primal) return;
  const vf before = load(s.peak() + lane), peak = vmax(before, tile_peak), base = finite_peak(peak);
  const vf decay = exp(before - base);
  const vi moved = peak > before, known = before > -__builtin_inff();
  store(s.peak() + lane, peak);
  vi hits{};  // words as likely as the likeliest, whose w is 1 to the last digit
  const vf rest = word_sum(t.words, [&](int64_t v) {
    const vf z = load(t.z + v * t.ld), w = exp(z - base);
    const vi hit = z == base;
    store(t.w + v * W, w);
    hits -= hit;
    return select(hit, w - 1.0f, w);
  });
  const vf ties = __builtin_convertvector(hits, vf);
  const Mix m = add_weights(s.rest() + lane, decay, moved, rest, ties);
  if (metric == Metric::l2 || metric == Metric::logits) return;
  vf total2{};
  Mix m2{};
  if (metric == Metric::probs) {
    const vf rest2 = word_sum(t.words, [&](int64_t v) {
      const vf w = load(t.w + v * W);
      return w * w - select(load(t.z + v * t.ld) == base, splat(1.0f), vf{});
    });
    total2 = rest2 + ties;
    m2 = add_weights(s.rest2() + lane, decay * decay, moved, rest2, ties);
  }
  const bool any_moved = sum(select(moved, splat(1.0f), vf{})) > 0.0f;
  for (int64_t k = 0; k < t.tangents; ++k) {
    float* reference = s.of(k, 0) + lane;
    vf r = load(reference), shift{};
    if (any_moved) {
      const float* tangents = t.z + t.first + k * t.step;
      const vf at_peak = word_sum(t.words, [&](int64_t v) {
        return select(load(t.z + v * t.ld) == base, load(tangents + v * t.ld), vf{});
      }) / ties;
      shift = select(moved & known, r - at_peak, vf{});
      r = select(moved, at_peak, r);
      store(reference, r);
    }
    add_moments<false>(t, k, r, shift, m, rest + ties, s.of(k, 1) + lane, s.of(k, 2) + lane);
    if (metric == Metric::probs) add_moments<true>(t, k, r, shift, m2, total2, s.of(k, 3) + lane, s.of(k, 4) + lane);
  }
}

// Takes the results of a further share of the vocabulary into `s`.
inline void merge_states(const State& s, const State& other, Metric metric, bool primal, int64_t tangents) {
  for (int64_t lane = 0; lane < s.tokens; lane += W) {
    if (metric == Metric::logits)
      for (int64_t k = 0; k < tangents; ++k)
        store(s.of(k, 2) + lane, load(s.of(k, 2) + lane) + load(other.of(k, 2) + lane));
    if (!primal) continue;
    const vf ours = load(s.peak() + lane), theirs = load(other.peak() + lane), peak = vmax(ours, theirs);
    const vf decay = exp(ours - finite_peak(peak)), gain = exp(theirs - finite_peak(peak));
    const vi moved = theirs > ours, both = (ours > -__builtin_inff()) & (theirs > -__builtin_inff());
    store(s.peak() + lane, peak);
    const auto join = [&](float* rest, float* more, vf decay, vf gain) {
      const vf before = (load(rest) + 1.0f) * decay, total = (load(more) + 1.0f) * gain;
      store(rest, select(moved, load(more) + before, load(rest) + total));
      return mix(decay, before, total);
    };
    const Mix m = join(s.rest() + lane, other.rest() + lane, decay, gain);
    if (metric == Metric::l2 || metric == Metric::logits) continue;
    const Mix m2 = join(s.rest2() + lane, other.rest2() + lane, decay * decay, gain * gain);
    for (int64_t k = 0; k < tangents; ++k) {
      float* reference = s.of(k, 0) + lane;
      const vf r = load(reference), r_theirs = load(other.of(k, 0) + lane), apart = select(both, r - r_theirs, vf{});
      const vf shift = select(moved, apart, vf{}), shift_theirs = select(moved, vf{}, apart);
      store(reference, select(moved, r_theirs, r));
      merge(s.of(k, 1) + lane, s.of(k, 2) + lane, m, shift, load(other.of(k, 1) + lane) - shift_theirs,
            load(other.of(k, 2) + lane) * gain);
      merge(s.of(k, 3) + lane, s.of(k, 4) + lane, m2, shift, load(other.of(k, 3) + lane) - shift_theirs,
            load(other.of(k, 4) + lane) * (gain * gain));
    }
  }
}

// ---- Cotangents ----------------------------------------------------------------------------------------------------

// Tokens of a chunk, for the backward: arrays over padded tokens.
struct Known {
  float* memory;
  int64_t tokens;

  static int64_t fields(int64_t tangents) { return 5 + 5 * tangents; }
  float* peak() const { return memory; }
  float* inverse() const { return memory + tokens; }  // 1 / (1 + rest)
  float* nll_bar() const { return memory + 2 * tokens; }
  float* label() const { return memory + 3 * tokens; }  // int32 bits
  float* rest() const { return memory + 4 * tokens; }
  float* of(int64_t k, int field) const { return memory + (5 + 5 * k + field) * tokens; }  // r, mean, q, slope, q_bar
};

// Products to the cotangents of W h + b, in place:
//   fisher  z̄ = Σ_k g p(e² - q),           ż̄ = 2g p e
//   probs   z̄ = Σ_k 2g p(e b - q),         ż̄ = 2g p b,  b = pe - κ = (w e + mean) / Σ w + b of the likeliest word
//   logits  ż̄ = 2g ż
// plus n (p - onehot) in z̄, where p - 1 of a label is (w - 1 - rest) / Σ w; then x̄ = s (cap' z̄ + Σ_k cap'' ẋ ż̄), ẋ̄ = s cap' ż̄ with cap'' ẋ = -2zż/c².
template <Metric METRIC, bool PRIMAL, bool CAPPED, int TANGENTS>
inline void cotangents(const Lanes& t, const float* bias, const Cap& c, const Known& known, int64_t lane,
                       int64_t word) {
  const int64_t tangents = TANGENTS ? TANGENTS : t.tangents;
  const bool scaled = CAPPED || c.in != 1.0f;
  const vf peak = load(known.peak() + lane), inverse = load(known.inverse() + lane), n = load(known.nll_bar() + lane);
  const vi label = bit_cast<vi>(load(known.label() + lane)) - static_cast<int32_t>(word);
  const vf rest = load(known.rest() + lane), loss = n * inverse;
  const float bend = -2.0f * c.inverse * c.inverse;
  for (int64_t v = 0; v < t.words; ++v) {
    float* row = t.z + v * t.ld;
    vf z{}, w{}, p{}, z_bar{}, through{}, slope = splat(1.0f);
    if constexpr (PRIMAL) {
      z = load(row) + bias[v];
      if (scaled) z *= c.in;
      if constexpr (CAPPED) {
        const Tanh h = tanh(z * c.inverse);
        z = h.t * c.cap;
        slope = h.slope;
      }
      w = exp((scaled ? rounded(z) : z) - peak);
      p = w * inverse;
      z_bar = loss * select(label == static_cast<int32_t>(v), (w - 1.0f) - rest, w);
    }
    for (int64_t k = 0; k < tangents; ++k) {
      float* tangent = row + t.first + k * t.step;
      const vf g = load(known.of(k, 4) + lane), z_tan = scaled ? rounded(load(tangent) * (c.in * slope)) : load(tangent);
      vf z_tan_bar;
      if constexpr (METRIC == Metric::logits) {
        z_tan_bar = 2.0f * g * z_tan;
      } else {
        const vf mean = load(known.of(k, 1) + lane), e = (z_tan - load(known.of(k, 0) + lane)) - mean;
        const vf q = load(known.of(k, 2) + lane);
        if constexpr (METRIC == Metric::fisher) {
          const vf pe = p * e;
          z_bar += g * (e * pe - p * q);
          z_tan_bar = 2.0f * g * pe;
        } else {
          const vf b = (w * e + mean) * inverse + load(known.of(k, 3) + lane), twice = 2.0f * g * p;
          z_bar += twice * (e * b - q);
          z_tan_bar = twice * b;
        }
      }
      if constexpr (CAPPED) through += bend * z * z_tan * z_tan_bar;
      store(tangent, z_tan_bar * (c.scale * slope));
    }
    if constexpr (PRIMAL) store(row, (z_bar * slope + through) * c.scale);
  }
}

template <Metric METRIC, bool PRIMAL, bool CAPPED>
inline void cotangents_of_tile(const Layout& l, float* tile, int64_t words, const float* bias, const Cap& c,
                               const Known& known, int64_t lane, int64_t word) {
  for (int64_t i = 0; i < l.block; i += W) {
    const Lanes t = lanes_of(l, tile, nullptr, words, i);
    if (t.tangents == 1) cotangents<METRIC, PRIMAL, CAPPED, 1>(t, bias, c, known, lane + i, word);
    else cotangents<METRIC, PRIMAL, CAPPED, 0>(t, bias, c, known, lane + i, word);
  }
}

// A tile of products to cotangents; `lane` is that of its first token in `known`.
inline void to_cotangents(const Layout& l, Metric metric, float* tile, int64_t words, const float* bias, const Cap& c,
                          const Known& known, int64_t lane, int64_t word) {
  const auto run = [&](auto kernel, auto capped) {
    (c.capped ? capped : kernel)(l, tile, words, bias, c, known, lane, word);
  };
  if (!l.active.primal)
    cotangents_of_tile<Metric::logits, false, false>(l, tile, words, bias, c, known, lane, word);
  else if (metric == Metric::logits)
    run(cotangents_of_tile<Metric::logits, true, false>, cotangents_of_tile<Metric::logits, true, true>);
  else if (metric == Metric::probs)
    run(cotangents_of_tile<Metric::probs, true, false>, cotangents_of_tile<Metric::probs, true, true>);
  else  // without tangents, as for l2, only the loss
    run(cotangents_of_tile<Metric::fisher, true, false>, cotangents_of_tile<Metric::fisher, true, true>);
  // what is left of the columns pads them to whole panels; their products are zero, or NaN where a weight is not finite
  for (int64_t j = l.active.count() * l.block; j < l.columns; j += W)
    for (int64_t v = 0; v < words; ++v) store(tile + v * l.ld + j, vf{});
}

}  // namespace AAJR_ARCH
}  // namespace aajr
