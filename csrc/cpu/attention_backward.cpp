// Attention backward: gradients of q, k, v and the bias through output and tangents, one pass over the tiles.
//
// Per tile: S and S'_k again, A_k = H_k V^T and B = G V^T + sum_k H_k V'_k^T (G, H_k cotangents of O, O'_k), then
//   P = exp(S - shift) norm,  c_k = S'_k - mu_k,  dS'_k = P (A_k - D1_k),  dS = P (B - D0) + sum_k dS'_k c_k
// and the products with them. A unit of work is a share of the query blocks of one (batch row, key head): it owns
// their query gradients and has a sum of its own for the key and value gradients; the sums of a key head's units are
// added in order, so results do not depend on scheduling.
//
// attention_backward_amx.cpp compiles this file once more, for bfloat16 products.
#include "attention_cotangents.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

// Scores, their tangents and cotangents of a tile, down to dS0, dS0'_k, P and P c_k.
void differentiate_tile(const AttentionBackward& p, const KeyPart& part, const Workspace& w, const Operands& of,
                        const Sums& sums, const Sequence& s, const Block& at, int64_t j0, int64_t nb,
                        const Dropout& dropout) {
  const int64_t padded = round_up(nb, NR);
  const bool scores = p.has_scores(), need_scores = p.q_bar.data || part.k_bar.data || p.bias_bar;
  const float rest = scale_of_products(p);
  const bool early = p.softcap > 0.0f || p.mask.is_bias() || !(rest > 0.0f);  // as in the forward
  const int64_t diagonal = diagonal_of(p, s, at.i0, j0);
  const LowerResult lower(diagonal);
  Product<LowerResult> s0(lower, at.mb, padded, w.scores, LD, false);
  s0.add(of.k_t.times(w.query(0), 0, j0));
  s0.run();
  if (p.softcap > 0.0f) cap_scores(p.softcap, rest, at, padded, w);
  else if (early && rest != 1.0f) scale_tile(rest, at.mb, padded, w.scores);
  mask_scores(p, s, at.h, at.i0, at.mb, j0, nb, padded, diagonal, w.scores);
  for (int t = 0; scores && t < p.K; ++t) {
    Product<LowerResult> rate(lower, at.mb, padded, w.rate(t), LD, false);
    if (p.q.stacks > 1) rate.add(of.k_t.times(w.query(1 + t), 0, j0));
    if (part.k.stacks > 1) rate.add(of.k_t.times(w.query(0), 1 + t, j0));
    rate.run();
    finish_rate(p, w, s, at, j0, nb, padded, t, early ? rest : 1.0f);
  }
  if (need_scores) {
    Product<LowerResult> b(lower, at.mb, padded, w.sbar, LD, false);
    for (int t = 0; t < part.v.stacks; ++t) b.add(of.v_t.times(w.cotangent(t), t, j0));
    b.run();
    for (int t = 0; scores && t < p.K; ++t) {
      Product<LowerResult> a(lower, at.mb, padded, w.t_bar(t), LD, false);
      a.add(of.v_t.times(w.cotangent(1 + t), 0, j0));
      a.run();
    }
  }
  const float *shift = stat_row(p.shift, p, s, at.h), *norm = stat_row(p.norm, p, s, at.h);
  const float* mu = scores ? stat_row(p.mu, p, s, at.h) : nullptr;
  const auto pass = scores ? (p.keep ? differentiate<true, true> : differentiate<true, false>)
                           : (p.keep ? differentiate<false, true> : differentiate<false, false>);
  pass(p, w, dropout, shift, norm, mu, s, at, j0, padded, diagonal, early ? 1.0f : rest);
  if (p.bias_bar) add_bias_gradient(p, w, sums, s, at, j0, nb);
  if (p.softcap > 0.0f && need_scores) uncap(p, at, padded, w);
}

// The tile's share of the gradients of a part's values, in the unit's sums.
void multiply_weights(const AttentionBackward& p, const KeyPart& part, const Workspace& w, const KeySums& sums,
                      int64_t mb, int64_t j0, int64_t nb, int64_t diagonal) {
  const int64_t padded = round_up(nb, NR);
  const TileOperand weights = w.weight(0, mb, padded);
  const UpperLeft upper(diagonal);
  Product<UpperLeft> dv(upper, sums.target(0, j0, nb));
  dv.add(KeySums::term(weights, w.cotangent(0), mb));
  for (int t = 0; p.has_scores() && t < p.K; ++t)
    dv.add(KeySums::term(w.weight(1 + t, mb, padded), w.cotangent(1 + t), mb));
  dv.run();
  for (int t = 1; t < part.v.stacks; ++t) {
    Product<UpperLeft> tangent(upper, sums.target(t, j0, nb));
    tangent.add(KeySums::term(weights, w.cotangent(t), mb));
    tangent.run();
  }
}

// The same of queries (in w.dq) and keys. A rounded tile serves both.
void multiply_bars(const AttentionBackward& p, const KeyPart& part, const Workspace& w, const Operands& of,
                   const KeySums& sums, int64_t mb, int64_t j0, int64_t nb, int64_t diagonal) {
  const bool has_q = p.q.stacks > 1, has_k = part.k.stacks > 1;
  const bool for_queries = p.q_bar.data != nullptr, for_keys = part.k_bar.data != nullptr;
  const int64_t padded = round_up(nb, NR);
  const TileOperand bar = w.bar(0, mb, padded, for_queries, for_keys);
  const UpperLeft upper(diagonal);
  const LowerLeft lower(diagonal);
  Product<UpperLeft> dk(upper, sums.target(0, j0, nb));
  Product<LowerLeft> dq(lower, mb, w.ld_q, w.d_query(0), w.ld_q);
  if (for_keys) dk.add(KeySums::term(bar, w.query(0), mb));
  if (for_queries) dq.add(of.k.times(bar, 0, j0, nb));
  for (int t = 0; (has_q || has_k) && t < p.K; ++t) {
    const TileOperand t_bar = w.bar(1 + t, mb, padded, for_queries, for_keys);
    if (for_keys && has_q) dk.add(KeySums::term(t_bar, w.query(1 + t), mb));
    if (for_queries && has_k) dq.add(of.k.times(t_bar, 1 + t, j0, nb));
    if (for_keys && has_k) {
      Product<UpperLeft> tangent(upper, sums.target(1 + t, j0, nb));
      tangent.add(KeySums::term(t_bar, w.query(0), mb));
      tangent.run();
    }
    if (for_queries && has_q) {
      Product<LowerLeft> tangent(lower, mb, w.ld_q, w.d_query(1 + t), w.ld_q);
      tangent.add(of.k.times(t_bar, 0, j0, nb));
      tangent.run();
    }
  }
  if (for_keys) dk.run();
  if (for_queries) dq.run();
}

template <class T>
void query_block(const AttentionBackward& p, const Workspace& w, const Operands* operands, const Sums& sums, int64_t b,
                 const Sequence& queries, const Block& at, const Dropout& dropout) {
  load_block<T>(p, w, queries, at);
  for (int64_t e = 0; e < (1 + p.K) * QB * w.ld_q; ++e) w.dq[e] = 0.0f;
  for (int i = 0; i < p.part_count; ++i) {
    const KeyPart& part = p.parts[i];
    const bool need_bars = p.q_bar.data || part.k_bar.data;
    if (!need_bars && !part.v_bar.data && !p.bias_bar) continue;
    const Sequence s = sequence(p, part, b);
    const Span span = visible(p, s, at.i0, at.i0 + at.mb);
    for (int64_t j0 = span.low; j0 < span.high; j0 += KB) {
      const int64_t nb = smaller(KB, span.high - j0), diagonal = diagonal_of(p, s, at.i0, j0);
      differentiate_tile(p, part, w, operands[i], sums, s, at, j0, nb, dropout);
      if (part.v_bar.data) multiply_weights(p, part, w, sums.v(i), at.mb, j0, nb, diagonal);
      if (need_bars) multiply_bars(p, part, w, operands[i], sums.k(i), at.mb, j0, nb, diagonal);
    }
  }
  for (int t = 0; p.q_bar.data && t < p.q.stacks; ++t)
    for (int64_t i = 0; i < at.mb; ++i)
      write_row(row_of<T>(p.q_bar, queries, at.h, t, at.i0 + i), w.d_query(t) + i * w.ld_q, p.D, p.scale);
}

// Add the units' sums of the rows [first, last) in order and write them.
template <class T>
void write_sums(const Rows& to, const Sequence& s, int64_t head, const KeySums& sums, int64_t width, float factor,
                int64_t parts, int64_t part_stride, int64_t first, int64_t last, float* row) {
  for (int t = 0; t < to.stacks; ++t)
    for (int64_t j = first; j < last; ++j) {
      sums.read(t, j, parts, part_stride, row);
      write_row(at<T>(to, t, s.batch, head, s.k0 + j), row, width, factor);
    }
}

// How many shares the query blocks of a (batch row, key head) are split into.
int64_t shares(int64_t pairs, int64_t blocks, int64_t threads, bool ordered) {
  int64_t parts = ordered ? threads : 1;
  while (!ordered && pairs * parts % threads != 0 && pairs * parts < 4 * threads) ++parts;
  return larger<int64_t>(1, smaller(parts, blocks));
}

template <class T>
void backward_typed(const AttentionBackward& p) {
  const int64_t group = p.H / p.HK, blocks = (p.longest_q + QB - 1) / QB, pairs = p.B * p.HK;
  const Mask& m = p.bias_bar_strides;
  // heads or batch rows that share the rows of a bias gradient add to it one after another
  const bool ordered = p.bias_bar && m.row != 0 && ((m.batch == 0 && p.B > 1) || (m.head == 0 && p.HK > 1));
  const int64_t parts = shares(pairs, blocks, p.threads, ordered);
  const int last_part = p.part_count - 1;
  const int64_t context = last_part ? Operands::floats(p, p.parts[0]) : 0;
  const int64_t operand_floats = context + Operands::floats(p, p.parts[last_part]), sum_floats = Sums::floats(p);
  const int64_t per_pair = operand_floats + parts * sum_floats;
  const int64_t step = ordered ? 1 : pairs_at_once(pairs, parts, per_pair, p.threads);
  const int64_t work = Workspace::floats(p), chunks = key_blocks(p);
  const Scratch<float> memory(step * per_pair), scratch(work * p.threads);
  const Dropout dropout(p);
  for (int64_t e = 0; e < work * p.threads; ++e) scratch[e] = 0.0f;
  for (int64_t first = 0; first < pairs; first += step) {
    const int64_t count = smaller(step, pairs - first);
    auto operands = [&](int64_t i, int part) {
      return Operands(memory.get() + i * per_pair + (part ? context : 0), p, p.parts[part]);
    };
    auto sums = [&](int64_t i, int64_t share) {
      return Sums{p, memory.get() + i * per_pair + operand_floats + share * sum_floats};
    };
    parallel_dynamic(count * chunks, p.threads, [&](int64_t index, int) {
      const int64_t i = index / chunks, head = (first + i) % p.HK;
      const KeyBlock keys = key_block(p, index % chunks);
      const KeyPart& part = p.parts[keys.part];
      const Sequence s = sequence(p, part, (first + i) / p.HK);
      const int64_t rows = smaller(KB, s.m - keys.first);
      if (rows <= 0) return;
      const Operands of = operands(i, keys.part);
      pack<T>(part.k, s, head, keys.first, rows, of.k_t);
      pack<T>(part.k, s, head, keys.first, rows, of.k);
      pack<T>(part.v, s, head, keys.first, rows, of.v_t);
    });
    parallel_dynamic(count * parts, p.threads, [&](int64_t index, int slot) {
      const int64_t i = index / parts, part = index % parts, b = (first + i) / p.HK, hk = (first + i) % p.HK;
      const Workspace w(scratch.get() + work * slot, p);
      const TileScope tiles;
      const Sums own = sums(i, part);
      for (int64_t e = 0; e < sum_floats; ++e) own.base[e] = 0.0f;
      const Operands of[] = {operands(i, 0), operands(i, last_part)};
      const Sequence s = sequence(p, p.parts[0], b);
      for (int64_t block = 0; block * QB < s.n; ++block) {
        // to and fro, so that under causality every share gets short and long blocks
        const int64_t turn = block % (2 * parts);
        if ((turn < parts ? turn : 2 * parts - 1 - turn) != part) continue;
        for (int64_t g = 0; g < group; ++g) {
          const Block at{hk * group + g, block * QB, smaller(QB, s.n - block * QB)};
          query_block<T>(p, w, of, own, b, s, at, dropout);
        }
      }
    });
    parallel_dynamic(count * chunks, p.threads, [&](int64_t index, int slot) {
      const int64_t i = index / chunks, head = (first + i) % p.HK;
      const KeyBlock keys = key_block(p, index % chunks);
      const KeyPart& part = p.parts[keys.part];
      const Sequence s = sequence(p, part, (first + i) / p.HK);
      const int64_t last = smaller(s.m, keys.first + KB);
      const Sums own = sums(i, 0);
      const auto write = [&](const Rows& to, const KeySums& of, int64_t width, float factor) {
        float* row = scratch.get() + work * slot;
        if (to.data) write_sums<T>(to, s, head, of, width, factor, parts, sum_floats, keys.first, last, row);
      };
      write(part.k_bar, own.k(keys.part), p.D, scale_of_products(p));
      write(part.v_bar, own.v(keys.part), p.V, 1.0f);
    });
    for (int64_t unit = 0; Sums::own_bias(p) && unit < count * parts; ++unit) {
      const Sums own = sums(unit / parts, unit % parts);
      const Sequence s = sequence(p, p.parts[0], (first + unit / parts) / p.HK);
      for (int t = 0; t < p.mask.stacks; ++t)
        for (int64_t g = 0; g < group; ++g) {
          const int64_t h = (first + unit / parts) % p.HK * group + g;
          for (int64_t j = 0; j < (m.col ? p.columns : 1); ++j)
            p.bias_bar[bias_element(m, s, t, h, 0, j)] += *own.bias(t, g, j);
        }
    }
  }
}

void backward(const AttentionBackward& p) {
#if defined(AAJR_AMX_PRODUCTS)
  if (fits_tiles(p)) backward_typed<bf16>(p);
  else AAJR_WITHOUT_AMX::attention_backward_kernels().backward(p);
#else
  if (p.dtype == DType::f32) backward_typed<float>(p);
  else if (p.dtype == DType::bf16) backward_typed<bf16>(p);
  else backward_typed<f16>(p);
#endif
}

}  // namespace

const AttentionBackwardKernels& attention_backward_kernels() {
  static const AttentionBackwardKernels kernels{backward};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
