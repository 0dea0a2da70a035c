// Elementwise arithmetic of the streamed head: logits to statistics, logits to cotangents. One lane is one token.
//
// Every tile yields, under weights w = e^(z - peak), its mean of ż - r and its sum of squares about that mean, which
// merge by the parallel variance rule, whose terms are all positive. r is a reference per token: tangents with a
// common offset of many deviations would lose all digits otherwise.
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

// Running results of one share of the vocabulary: arrays over the padded tokens of a chunk. Per tangent: reference,
// then mean and sum of squares under w, then under w².
struct State {
  float* memory;
  int64_t tokens;

  static int64_t fields(int64_t tangents) { return 3 + 5 * tangents; }
  float* peak() const { return memory; }
  float* weight() const { return memory + tokens; }
  float* weight2() const { return memory + 2 * tokens; }
  float* of(int64_t k, int field) const { return memory + (3 + 5 * k + field) * tokens; }
  void clear(int64_t tangents) const {
    for (int64_t i = 0; i < fields(tangents) * tokens; ++i) memory[i] = 0.0f;
    for (int64_t i = 0; i < tokens; ++i) peak()[i] = -__builtin_inff();
  }
};

constexpr float kTiny = 0x1p-126f;

// Shared between the tangents of a merge: the weights before it, decayed, and the shares of both sides in the sum.
struct Mix { vf decay, before, rest, share; };

AAJR_INLINE Mix mix(float* weight, vf decay, vf total) {
  const vf before = load(weight) * decay, merged = before + total, safe = vmax(merged, splat(kTiny));
  store(weight, merged);
  return {decay, before, before / safe, total / safe};
}

// Newcomer with the given mean (relative to the same reference) and sum of squares. The mean moves away from the
// heavier side, so that a side that has all the weight keeps its mean exactly: p = 1 at a word makes ż - μ zero there.
AAJR_INLINE void merge(float* mean, float* square, const Mix& m, vf new_mean, vf new_square) {
  const vf old_mean = load(mean), step = new_mean - old_mean;
  store(square, load(square) * m.decay + new_square + step * step * (m.share * m.before));
  store(mean, select(m.share < 0.5f, old_mean + step * m.share, new_mean - step * m.rest));
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
inline void add_moments(const Lanes& t, int64_t k, vf reference, const Mix& m, vf total, float* mean, float* square) {
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
  merge(mean, square, m, new_mean, new_square);
}

// Takes a tile of finished logits into the state at the given lane.
inline void add_words(const Lanes& t, Metric metric, bool primal, bool first, vf tile_peak, const State& s,
                      int64_t lane) {
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
  store(s.peak() + lane, peak);
  const vf total = word_sum(t.words, [&](int64_t v) {
    const vf w = exp(load(t.z + v * t.ld) - base);
    store(t.w + v * W, w);
    return w;
  });
  const Mix m = mix(s.weight() + lane, decay, total);
  if (metric == Metric::l2 || metric == Metric::logits) return;
  vf total2{};
  Mix m2{};
  if (metric == Metric::probs) {
    total2 = word_sum(t.words, [&](int64_t v) {
      const vf w = load(t.w + v * W);
      return w * w;
    });
    m2 = mix(s.weight2() + lane, decay * decay, total2);
  }
  for (int64_t k = 0; k < t.tangents; ++k) {
    float* reference = s.of(k, 0) + lane;
    if (first) {
      const float* tangents = t.z + t.first + k * t.step;
      const vf sum = word_sum(t.words, [&](int64_t v) { return load(tangents + v * t.ld); });
      store(reference, sum * (1.0f / static_cast<float>(t.words)));
    }
    const vf r = load(reference);
    add_moments<false>(t, k, r, m, total, s.of(k, 1) + lane, s.of(k, 2) + lane);
    if (metric == Metric::probs) add_moments<true>(t, k, r, m2, total2, s.of(k, 3) + lane, s.of(k, 4) + lane);
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
    store(s.peak() + lane, peak);
    const Mix m = mix(s.weight() + lane, decay, load(other.weight() + lane) * gain);
    if (metric == Metric::l2 || metric == Metric::logits) continue;
    const Mix m2 = mix(s.weight2() + lane, decay * decay, load(other.weight2() + lane) * (gain * gain));
    for (int64_t k = 0; k < tangents; ++k) {
      const vf shift = load(other.of(k, 0) + lane) - load(s.of(k, 0) + lane);
      merge(s.of(k, 1) + lane, s.of(k, 2) + lane, m, load(other.of(k, 1) + lane) + shift,
            load(other.of(k, 2) + lane) * gain);
      merge(s.of(k, 3) + lane, s.of(k, 4) + lane, m2, load(other.of(k, 3) + lane) + shift,
            load(other.of(k, 4) + lane) * (gain * gain));
    }
  }
}

// ---- Cotangents ----------------------------------------------------------------------------------------------------

// Tokens of a chunk, for the backward: arrays over padded tokens.
struct Known {
  float* memory;
  int64_t tokens;

  static int64_t fields(int64_t tangents) { return 4 + 5 * tangents; }
  float* peak() const { return memory; }
  float* inverse() const { return memory + tokens; }  // 1 / Σ e^(z - peak)
  float* nll_bar() const { return memory + 2 * tokens; }
  float* label() const { return memory + 3 * tokens; }  // int32 bits
  float* of(int64_t k, int field) const { return memory + (4 + 5 * k + field) * tokens; }  // r, mean, q, kappa, q_bar
};

// Products to the cotangents of W h + b, in place:
//   fisher  z̄ = Σ_k g p(e² - q),           ż̄ = 2g p e
//   probs   z̄ = Σ_k 2g(p²e² - pq - κpe),   ż̄ = 2g(p²e - κp)
//   logits  ż̄ = 2g ż
// plus n (p - onehot) in z̄; then x̄ = s (cap' z̄ + Σ_k cap'' ẋ ż̄), ẋ̄ = s cap' ż̄ with cap'' ẋ = -2zż/c².
template <Metric METRIC, bool PRIMAL, bool CAPPED, int TANGENTS>
inline void cotangents(const Lanes& t, const float* bias, const Cap& c, const Known& known, int64_t lane,
                       int64_t word) {
  const int64_t tangents = TANGENTS ? TANGENTS : t.tangents;
  const vf peak = load(known.peak() + lane), inverse = load(known.inverse() + lane), n = load(known.nll_bar() + lane);
  const vi label = bit_cast<vi>(load(known.label() + lane)) - static_cast<int32_t>(word);
  const float bend = -2.0f * c.inverse * c.inverse;
  for (int64_t v = 0; v < t.words; ++v) {
    float* row = t.z + v * t.ld;
    vf z{}, p{}, z_bar{}, through{}, slope = splat(1.0f);
    if constexpr (PRIMAL) {
      z = (load(row) + bias[v]) * c.in;
      if constexpr (CAPPED) {
        const Tanh h = tanh(z * c.inverse);
        z = h.t * c.cap;
        slope = h.slope;
      }
      p = exp(z - peak) * inverse;
      z_bar = p * n - select(label == static_cast<int32_t>(v), n, vf{});
    }
    for (int64_t k = 0; k < tangents; ++k) {
      float* tangent = row + t.first + k * t.step;
      const vf z_tan = load(tangent) * (c.in * slope), g = load(known.of(k, 4) + lane);
      vf z_tan_bar;
      if constexpr (METRIC == Metric::logits) {
        z_tan_bar = 2.0f * g * z_tan;
      } else {
        const vf e = (z_tan - load(known.of(k, 0) + lane)) - load(known.of(k, 1) + lane);
        const vf q = load(known.of(k, 2) + lane), pe = p * e;
        if constexpr (METRIC == Metric::fisher) {
          z_bar += g * (e * pe - p * q);
          z_tan_bar = 2.0f * g * pe;
        } else {
          const vf kappa = load(known.of(k, 3) + lane), ppe = p * pe;
          z_bar += 2.0f * g * ((e * ppe - p * q) - pe * kappa);
          z_tan_bar = 2.0f * g * (ppe - p * kappa);
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
