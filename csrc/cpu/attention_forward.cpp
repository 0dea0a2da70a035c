// Attention forward: output, its tangents and the row statistics, tile by tile with a running softmax.
//
// Per tile of QB queries and KB keys: S = s Q K^T, S'_k = s (Q'_k K^T + Q K'_k^T), P = exp(S - m), then
// O += P V and T_k += (P S'_k) V + P V'_k, all rescaled when the running row maximum m grows. At the end
// O = O / l and O'_k = T_k / l - mu_k O with mu_k = sum(P S'_k) / l.
//
// P S'_k rounded to bfloat16 would leave nothing of that difference where mu_k is large. Products of rounded tiles take
// P (S'_k - r_k) instead, with r_k the mean mu_k of the keys so far: T_k then lacks r_k O, exactly.
//
// attention_forward_amx.cpp compiles this file once more, for bfloat16 products.
#include "attention_tiles.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

// Scratch of one thread. `k` counts tangents.
struct Workspace {
  float *queries, *factors, *scores, *slopes, *rates, *sums, *top, *total, *moment, *reference;
  int64_t ld_v, width;
  static int64_t floats(const AttentionForward& p) {
    const int64_t k = p.K, ld_v = round_up(p.V, NR);
    return (2 + k) * QB * LD + (1 + k) * QB * ld_v + (2 + 2 * k) * QB + 64 +
           (1 + k) * (floats_for(QueryOperand::numbers(p.D, false)) + floats_for(TileOperand::numbers()));
  }
  Workspace(float* base, const AttentionForward& p) {
    const int64_t k = p.K;
    ld_v = round_up(p.V, NR), width = p.D;
    auto take = [&](int64_t n) {
      float* at = base;
      base += n;
      return at;
    };
    scores = take(QB * LD);
    slopes = take(QB * LD);
    rates = take(k * QB * LD);
    sums = take((1 + k) * QB * ld_v);
    top = take(QB);
    total = take(QB);
    moment = take(k * QB);
    reference = take(k * QB);
    queries = take((1 + k) * floats_for(QueryOperand::numbers(p.D, false)));
    factors = take((1 + k) * floats_for(TileOperand::numbers()));
  }
  QueryOperand query(int64_t t) const {
    return {as_numbers(queries + t * floats_for(QueryOperand::numbers(width, false))), width, false};
  }
  // A tile as the left factor of products: 0 is P, 1 + t is P S'_t.
  TileOperand factor(int64_t t, int64_t mb, int64_t padded) const {
    return {t ? rates + (t - 1) * QB * LD : scores, as_numbers(factors + t * floats_for(TileOperand::numbers())), mb,
            padded, true, false};
  }
};

struct Block {
  int64_t h, i0, mb;
};

// scores: S0 / scale -> S, and slopes: cap'.
void cap_scores(float cap, float scale, int64_t mb, int64_t padded, float* scores, float* slopes) {
  const float inverse = scale / cap;
  for (int64_t i = 0; i < mb; ++i)
    for (int64_t j = 0; j < padded; j += W) {
      const Tanh t = tanh(load(scores + i * LD + j) * inverse);
      store(scores + i * LD + j, t.t * cap);
      store(slopes + i * LD + j, t.slope);
    }
}

// rates: S0' / scale -> S' = cap' S0' + bias'.
void finish_rates(const AttentionProblem& p, const Sequence& s, const Block& at, int64_t j0, int64_t nb, int64_t padded,
                  int k, float scale, const float* slopes, float* rates) {
  if (p.softcap > 0.0f) {
    for (int64_t i = 0; i < at.mb; ++i)
      for (int64_t j = 0; j < padded; j += W)
        store(rates + i * LD + j, load(rates + i * LD + j) * load(slopes + i * LD + j) * scale);
  } else if (scale != 1.0f) {
    scale_tile(scale, at.mb, padded, rates);
  }
  if (p.mask.is_bias() && p.mask.stacks > 1)
    for (int64_t i = 0; i < at.mb; ++i)
      add_bias_row(p.mask,
                   (1 + k) * p.mask.stack + s.batch * p.mask.batch + at.h * p.mask.head + (at.i0 + i) * p.mask.row +
                       (s.before + j0) * p.mask.col,
                   rates + i * LD, nb);
}

// The running sums of tangent t take P (S' - now) from here on.
AAJR_INLINE void move_reference(const Workspace& w, int64_t t, int64_t i, float now) {
  const float step = w.reference[t * QB + i] - now;
  const float* primal = w.sums + i * w.ld_v;
  float* row = w.sums + ((1 + t) * QB + i) * w.ld_v;
  for (int64_t d = 0; d < w.ld_v; d += W) store(row + d, load(row + d) + load(primal + d) * step);
  w.reference[t * QB + i] = now;
}

// Scale the running sums of row i.
AAJR_INLINE void rescale(const Workspace& w, int64_t stacks, int64_t i, float factor) {
  for (int64_t t = 0; t < stacks; ++t) {
    float* row = w.sums + (t * QB + i) * w.ld_v;
    for (int64_t d = 0; d < w.ld_v; d += W) store(row + d, load(row + d) * factor);
  }
}

// scores: S / scale -> P (with the dropout factors), rates: S' / scale -> P S', or P (S' - r) (likewise); the running
// statistics move on.
void soften(const AttentionForward& p, const Workspace& w, const Dropout& dropout, const Sequence& s, const Block& at,
            int64_t j0, int64_t padded, int64_t diagonal, bool has_scores, float scale) {
  const int64_t k = has_scores ? p.K : 0;
  for (int64_t i = 0; i < at.mb; ++i) {
    float* row = w.scores + i * LD;
    const int64_t held = extent(i, diagonal, padded);
    vf peak = splat(-kInf);
    for (int64_t j = 0; j < held; j += W) peak = vmax(load(row + j), peak);
    const float before = w.top[i], now = larger(before, maximum(peak) * scale);
    const float base = now == -kInf ? 0.0f : now;
    if (now > before && before != -kInf) {
      const float factor = exp(splat(before - now))[0];
      w.total[i] *= factor;
      for (int64_t t = 0; t < k; ++t) w.moment[t * QB + i] *= factor;
      rescale(w, 1 + p.K, i, factor);
    }
    w.top[i] = now;
    // the first tangent rides along with the exponentials
    float* first = k > 0 ? w.rates + i * LD : nullptr;
    vf total{}, first_moment{};
    for (int64_t j = 0; j < held; j += W) {
      const vf e = exp_flushed(load(row + j) * scale - base);
      total += e;
      store(row + j, e);
      if (first != nullptr) {
        const vf product = e * (load(first + j) * scale);
        first_moment += product;
        if constexpr (!kRounded) store(first + j, product);
      }
    }
    w.total[i] += sum(total);
    for (int64_t t = 0; t < k; ++t) {
      float* rate = w.rates + (t * QB + i) * LD;
      vf moment = first_moment;
      if (t > 0) {
        moment = vf{};
        for (int64_t j = 0; j < held; j += W) {
          const vf product = load(row + j) * (load(rate + j) * scale);
          moment += product;
          if constexpr (!kRounded) store(rate + j, product);
        }
      }
      w.moment[t * QB + i] += sum(moment);
      if constexpr (kRounded) {
        const float mean = w.total[i] == 0.0f ? 0.0f : w.moment[t * QB + i] / w.total[i];
        move_reference(w, t, i, mean);
        for (int64_t j = 0; j < held; j += W)
          store(rate + j, load(row + j) * (load(rate + j) * scale - mean));
      }
    }
    if (const uint8_t* keep = dropout.row(p, s, at.h, at.i0 + i)) {
      for (int64_t j = 0; j < held; j += W) {
        const vf factor = dropout.factor(keep, s.before + j0 + j);
        store(row + j, load(row + j) * factor);
        for (int64_t t = 0; t < k; ++t) {
          float* rate = w.rates + (t * QB + i) * LD;
          store(rate + j, load(rate + j) * factor);
        }
      }
    }
    clear_beyond(row, held, padded);
    for (int64_t t = 0; t < k; ++t) clear_beyond(w.rates + (t * QB + i) * LD, held, padded);
  }
}

template <class T>
void finish(const AttentionForward& p, const Workspace& w, const Sequence& s, const Block& at) {
  for (int64_t i = 0; i < at.mb; ++i) {
    const float total = w.total[i];
    const float norm = total == 0.0f ? 0.0f : 1.0f / total;
    const int64_t row = at.i0 + i;
    stat_row(p.norm, p, s, at.h)[row] = norm;
    stat_row(p.shift, p, s, at.h)[row] = total == 0.0f ? kInf : w.top[i];
    float* primal = w.sums + i * w.ld_v;
    for (int64_t d = 0; d < w.ld_v; d += W) store(primal + d, load(primal + d) * norm);
    write_row(row_of<T>(p.out, s, at.h, 0, row), primal, p.V, 1.0f);
    for (int64_t t = 0; t < p.K; ++t) {
      float* tangent = w.sums + ((1 + t) * QB + i) * w.ld_v;
      const float mu = p.has_scores() ? w.moment[t * QB + i] * norm : 0.0f;
      if (p.has_scores()) stat_row(p.mu + t * p.mu_stack, p, s, at.h)[row] = mu;
      const float rest = kRounded ? 0.0f : mu;  // the last reference is mu
      for (int64_t d = 0; d < w.ld_v; d += W)
        store(tangent + d, load(tangent + d) * norm - load(primal + d) * rest);
      write_row(row_of<T>(p.out, s, at.h, 1 + t, row), tangent, p.V, 1.0f);
    }
  }
}

// Packed keys and values of a part.
struct Operands {
  Panels keys;
  Dense values;
  static int64_t k_floats(const AttentionForward& p, const KeyPart& part) {
    return floats_for(part.k.stacks * Panels(nullptr, part.longest, p.D).stack);
  }
  static int64_t floats(const AttentionForward& p, const KeyPart& part) {
    return k_floats(p, part) + floats_for(part.v.stacks * Dense(nullptr, part.longest, p.V).stack);
  }
  Operands(float* base, const AttentionForward& p, const KeyPart& part)
      : keys(as_numbers(base), part.longest, p.D),
        values(as_numbers(base + k_floats(p, part)), part.longest, p.V) {}
};

// One block of queries of one head against the keys of a part that it sees.
void add_part(const AttentionForward& p, const KeyPart& part, const Workspace& w, const Sequence& s, const Block& at,
              const Panels& keys, const Dense& values, const Dropout& dropout) {
  const bool has_q = p.q.stacks > 1, has_k = part.k.stacks > 1, has_v = part.v.stacks > 1, has_scores = p.has_scores();
  const float rest = scale_of_products(p);
  // the softmax applies the scale unless something comes before it
  const bool early = p.softcap > 0.0f || p.mask.is_bias() || !(rest > 0.0f);
  const Span span = visible(p, s, at.i0, at.i0 + at.mb);
  for (int64_t j0 = span.low; j0 < span.high; j0 += KB) {
    const int64_t nb = smaller(KB, span.high - j0), padded = round_up(nb, NR);
    ProductTerm terms[2] = {keys.times(w.query(0), 0, j0)};
    const int64_t diagonal = diagonal_of(p, s, at.i0, j0);
    const LowerResult lower(diagonal);
    const LowerLeft left(diagonal);
    gemm<false>(at.mb, padded, terms, 1, w.scores, LD, lower);
    if (p.softcap > 0.0f) cap_scores(p.softcap, rest, at.mb, padded, w.scores, w.slopes);
    else if (early && rest != 1.0f) scale_tile(rest, at.mb, padded, w.scores);
    mask_scores(p, s, at.h, at.i0, at.mb, j0, nb, padded, diagonal, w.scores);
    if (has_scores)
      for (int t = 0; t < p.K; ++t) {
        int count = 0;
        if (has_q) terms[count++] = keys.times(w.query(1 + t), 0, j0);
        if (has_k) terms[count++] = keys.times(w.query(0), 1 + t, j0);
        gemm<false>(at.mb, padded, terms, count, w.rates + t * QB * LD, LD, lower);
        finish_rates(p, s, at, j0, nb, padded, t, early ? rest : 1.0f, w.slopes, w.rates + t * QB * LD);
      }
    soften(p, w, dropout, s, at, j0, padded, diagonal, has_scores, early ? 1.0f : rest);
    const TileOperand weights = w.factor(0, at.mb, padded);
    terms[0] = values.times(weights, 0, j0, nb);
    gemm<true>(at.mb, w.ld_v, terms, 1, w.sums, w.ld_v, left);
    for (int t = 0; t < p.K; ++t) {
      int count = 0;
      if (has_scores) terms[count++] = values.times(w.factor(1 + t, at.mb, padded), 0, j0, nb);
      if (has_v) terms[count++] = values.times(weights, 1 + t, j0, nb);
      if (count) gemm<true>(at.mb, w.ld_v, terms, count, w.sums + (1 + t) * QB * w.ld_v, w.ld_v, left);
    }
  }
}

// One block of queries of one head of batch row b against all keys it sees.
template <class T>
void query_block(const AttentionForward& p, const Workspace& w, int64_t b, const Sequence& queries, const Block& at,
                 const Operands* operands, const Dropout& dropout) {
  for (int t = 0; t < p.q.stacks; ++t)
    w.query(t).load(row_of<const T>(p.q, queries, at.h, t, at.i0), p.q.row, at.mb, p.scale);
  for (int64_t e = 0; e < (1 + p.K) * QB * w.ld_v; ++e) w.sums[e] = 0.0f;
  for (int64_t i = 0; i < QB; ++i) w.top[i] = -kInf, w.total[i] = 0.0f;
  for (int64_t i = 0; i < p.K * QB; ++i) w.moment[i] = 0.0f, w.reference[i] = 0.0f;
  for (int i = 0; i < p.part_count; ++i)
    add_part(p, p.parts[i], w, sequence(p, p.parts[i], b), at, operands[i].keys, operands[i].values, dropout);
  finish<T>(p, w, queries, at);
}

template <class T>
void forward_typed(const AttentionForward& p) {
  const int64_t group = p.H / p.HK, blocks = (p.longest_q + QB - 1) / QB;
  const int last = p.part_count - 1;
  const int64_t context = last ? Operands::floats(p, p.parts[0]) : 0;
  const int64_t per_pair = context + Operands::floats(p, p.parts[last]);
  const int64_t pairs = p.B * p.HK, step = pairs_at_once(pairs, group * blocks, per_pair, p.threads);
  const int64_t work = Workspace::floats(p), chunks = key_blocks(p);
  const Scratch<float> packed(step * per_pair), scratch(work * p.threads);
  const Dropout dropout(p);
  for (int64_t first = 0; first < pairs; first += step) {
    const int64_t count = smaller(step, pairs - first);
    auto operands = [&](int64_t i, int part) {
      return Operands(packed.get() + i * per_pair + (part ? context : 0), p, p.parts[part]);
    };
    parallel_dynamic(count * chunks, p.threads, [&](int64_t index, int) {
      const int64_t i = index / chunks, head = (first + i) % p.HK;
      const KeyBlock keys = key_block(p, index % chunks);
      const KeyPart& part = p.parts[keys.part];
      const Sequence s = sequence(p, part, (first + i) / p.HK);
      const int64_t rows = smaller(KB, s.m - keys.first);
      if (rows <= 0) return;
      const Operands of = operands(i, keys.part);
      pack<T>(part.k, s, head, keys.first, rows, of.keys);
      pack<T>(part.v, s, head, keys.first, rows, of.values);
    });
    // the last blocks see the most keys: they go first
    parallel_dynamic(count * group * blocks, p.threads, [&](int64_t index, int slot) {
      const int64_t block = blocks - 1 - index / (count * group), i = index % (count * group) / group;
      const int64_t b = (first + i) / p.HK, h = (first + i) % p.HK * group + index % group;
      const Sequence s = sequence(p, p.parts[0], b);
      const Block at{h, block * QB, smaller(QB, s.n - block * QB)};
      if (at.mb <= 0) return;
      const Workspace w(scratch.get() + work * slot, p);
      const TileScope tiles;
      const Operands of[] = {operands(i, 0), operands(i, last)};
      query_block<T>(p, w, b, s, at, of, dropout);
    });
  }
}

void forward(const AttentionForward& p) {
#if defined(AAJR_AMX_PRODUCTS)
  if (fits_tiles(p)) forward_typed<bf16>(p);
  else AAJR_WITHOUT_AMX::attention_kernels().forward(p);
#else
  if (p.dtype == DType::f32) forward_typed<float>(p);
  else if (p.dtype == DType::bf16) forward_typed<bf16>(p);
  else forward_typed<f16>(p);
#endif
}

}  // namespace

const AttentionKernels& attention_kernels() {
  static const AttentionKernels kernels{forward};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
