// Attention backward: gradients of q, k, v and the bias through output and tangents, one pass over the tiles.
//
// Per tile: S and S'_k again, A_k = H_k V^T and B = G V^T + sum_k H_k V'_k^T (G, H_k cotangents of O, O'_k), then
//   P = exp(S - shift) norm,  c_k = S'_k - mu_k,  dS'_k = P (A_k - D1_k),  dS = P (B - D0) + sum_k dS'_k c_k
// and the products with them. A unit of work is a share of the query blocks of one (batch row, key head): it owns
// their query gradients and has a sum of its own for the key and value gradients; the sums of a key head's units are
// added in order, so results do not depend on scheduling.
#include "attention_cotangents.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

// C += (or =) a sum of products of any number of terms.
class Product {
 public:
  Product(int64_t m, int64_t n, float* c, int64_t ldc, bool accumulate = true)
      : m_(m), n_(n), c_(c), ldc_(ldc), accumulate_(accumulate) {}
  void add(const Term& term) {
    if (count_ == kMost) run();
    terms_[count_++] = term;
  }
  void run() {
    if (accumulate_) gemm<true>(m_, n_, terms_, count_, c_, ldc_);
    else gemm<false>(m_, n_, terms_, count_, c_, ldc_);
    accumulate_ = true;
    count_ = 0;
  }

 private:
  static constexpr int kMost = 8;
  int64_t m_, n_;
  float* c_;
  int64_t ldc_;
  bool accumulate_;
  int count_ = 0;
  Term terms_[kMost];
};

// Scores, their tangents and cotangents of a tile, down to dS0, dS0'_k, P and P c_k.
void differentiate_tile(const AttentionBackward& p, const Workspace& w, const Operands& of, const Sums& sums,
                        const Sequence& s, const Block& at, int64_t head, int64_t j0, int64_t nb,
                        const Dropout& dropout) {
  const int64_t padded = round_up(nb, NR);
  const bool scores = p.has_scores(), need_scores = p.q_bar.data || p.k_bar.data || p.bias_bar;
  Product s0(at.mb, padded, w.scores, LD, false);
  s0.add(of.k_t.times(w.query(0), w.ld_q, 0, j0));
  s0.run();
  if (p.softcap > 0.0f) cap_scores(p.softcap, at, padded, w);
  mask_scores(p, s, at.h, at.i0, at.mb, j0, nb, padded, w.scores);
  for (int t = 0; scores && t < p.K; ++t) {
    Product rate(at.mb, padded, w.rate(t), LD, false);
    if (p.q.stacks > 1) rate.add(of.k_t.times(w.query(1 + t), w.ld_q, 0, j0));
    if (p.k.stacks > 1) rate.add(of.k_t.times(w.query(0), w.ld_q, 1 + t, j0));
    rate.run();
    finish_rate(p, w, s, at, j0, nb, padded, t);
  }
  if (need_scores) {
    Product b(at.mb, padded, w.sbar, LD, false);
    for (int t = 0; t < p.v.stacks; ++t) b.add(of.v_t.times(w.cotangent(t), w.ld_v, t, j0));
    b.run();
    for (int t = 0; scores && t < p.K; ++t) {
      Product a(at.mb, padded, w.t_bar(t), LD, false);
      a.add(of.v_t.times(w.cotangent(1 + t), w.ld_v, 0, j0));
      a.run();
    }
  }
  const float *shift = stat_row(p.shift, p, s, at.h), *norm = stat_row(p.norm, p, s, at.h);
  const float* mu = scores ? stat_row(p.mu, p, s, at.h) : nullptr;
  const auto pass = scores ? (dropout.on ? differentiate<true, true> : differentiate<true, false>)
                           : (dropout.on ? differentiate<false, true> : differentiate<false, false>);
  pass(p, w, dropout, shift, norm, mu, head, at, j0, padded);
  if (p.bias_bar) add_bias_gradient(p, w, sums, s, at, j0, nb);
  if (p.softcap > 0.0f && need_scores) uncap(p, at, padded, w);
}

// The tile's share of the gradients of q (in w.dq), k and v (in the unit's sums).
void multiply_tile(const AttentionBackward& p, const Workspace& w, const Operands& of, const Sums& sums,
                   const Block& at, int64_t j0, int64_t nb) {
  const bool scores = p.has_scores(), has_q = p.q.stacks > 1, has_k = p.k.stacks > 1;
  const int64_t mb = at.mb;
  if (p.v_bar.data) {
    Product dv(nb, sums.ld_v, sums.v + j0 * sums.ld_v, sums.ld_v);
    dv.add(transposed(w.scores, LD, w.cotangent(0), w.ld_v, mb));
    for (int t = 0; scores && t < p.K; ++t) dv.add(transposed(w.rate(t), LD, w.cotangent(1 + t), w.ld_v, mb));
    dv.run();
    for (int t = 1; t < p.v.stacks; ++t) {
      Product tangent(nb, sums.ld_v, sums.v + t * sums.v_stack + j0 * sums.ld_v, sums.ld_v);
      tangent.add(transposed(w.scores, LD, w.cotangent(t), w.ld_v, mb));
      tangent.run();
    }
  }
  if (p.k_bar.data) {
    Product dk(nb, sums.ld_k, sums.k + j0 * sums.ld_k, sums.ld_k);
    dk.add(transposed(w.sbar, LD, w.query(0), w.ld_q, mb));
    for (int t = 0; scores && has_q && t < p.K; ++t) dk.add(transposed(w.t_bar(t), LD, w.query(1 + t), w.ld_q, mb));
    dk.run();
    for (int t = 0; has_k && t < p.K; ++t) {
      Product tangent(nb, sums.ld_k, sums.k + (1 + t) * sums.k_stack + j0 * sums.ld_k, sums.ld_k);
      tangent.add(transposed(w.t_bar(t), LD, w.query(0), w.ld_q, mb));
      tangent.run();
    }
  }
  if (p.q_bar.data) {
    Product dq(mb, w.ld_q, w.d_query(0), w.ld_q);
    dq.add(of.k.times(w.sbar, LD, 0, j0, nb));
    for (int t = 0; has_k && t < p.K; ++t) dq.add(of.k.times(w.t_bar(t), LD, 1 + t, j0, nb));
    dq.run();
    for (int t = 0; has_q && t < p.K; ++t) {
      Product tangent(mb, w.ld_q, w.d_query(1 + t), w.ld_q);
      tangent.add(of.k.times(w.t_bar(t), LD, 0, j0, nb));
      tangent.run();
    }
  }
}

template <class T>
void query_block(const AttentionBackward& p, const Workspace& w, const Operands& of, const Sums& sums,
                 const Sequence& s, const Block& at, int64_t head, const Dropout& dropout) {
  load_block<T>(p, w, s, at);
  for (int64_t e = 0; e < (1 + p.K) * QB * w.ld_q; ++e) w.dq[e] = 0.0f;
  const Span span = visible(p, s, at.i0, at.i0 + at.mb);
  for (int64_t j0 = span.low; j0 < span.high; j0 += KB) {
    const int64_t nb = smaller(KB, span.high - j0);
    differentiate_tile(p, w, of, sums, s, at, head, j0, nb, dropout);
    multiply_tile(p, w, of, sums, at, j0, nb);
  }
  for (int t = 0; p.q_bar.data && t < p.q.stacks; ++t)
    for (int64_t i = 0; i < at.mb; ++i)
      write_row(row_of<T>(p.q_bar, s, at.h, t, at.i0 + i), w.d_query(t) + i * w.ld_q, p.D, p.scale);
}

// Add the units' sums of the rows [first, last) in order and write them.
template <class T>
void write_sums(const Rows& to, const Sequence& s, int64_t head, const float* sums, int64_t stack, int64_t ld,
                int64_t width, int64_t parts, int64_t part_stride, int64_t first, int64_t last, float* row) {
  for (int t = 0; t < to.stacks; ++t)
    for (int64_t j = first; j < last; ++j) {
      const float* from = sums + t * stack + j * ld;
      for (int64_t d = 0; d < ld; d += W) {
        vf total = load(from + d);
        for (int64_t part = 1; part < parts; ++part) total += load(from + part * part_stride + d);
        store(row + d, total);
      }
      write_row(at<T>(to, t, s.batch, head, s.k0 + j), row, width, 1.0f);
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
  const int64_t operand_floats = Operands::floats(p), sum_floats = Sums::floats(p);
  const int64_t per_pair = operand_floats + parts * sum_floats;
  const int64_t step = ordered ? 1 : pairs_at_once(pairs, parts, per_pair, p.threads);
  const int64_t work = Workspace::floats(p), key_blocks = (p.longest_k + KB - 1) / KB;
  const Scratch<float> memory(step * per_pair), scratch(work * p.threads);
  const Dropout dropout(p);
  for (int64_t e = 0; e < work * p.threads; ++e) scratch[e] = 0.0f;
  for (int64_t first = 0; first < pairs; first += step) {
    const int64_t count = smaller(step, pairs - first);
    auto operands = [&](int64_t i) { return Operands(memory.get() + i * per_pair, p); };
    auto sums = [&](int64_t i, int64_t part) {
      return Sums(memory.get() + i * per_pair + operand_floats + part * sum_floats, p);
    };
    parallel_dynamic(count * key_blocks, p.threads, [&](int64_t index, int) {
      const int64_t i = index / key_blocks, j0 = index % key_blocks * KB, head = (first + i) % p.HK;
      const Sequence s = sequence(p, (first + i) / p.HK);
      const int64_t rows = smaller(KB, s.m - j0);
      if (rows <= 0) return;
      const Operands of = operands(i);
      pack<T>(p.k, s, head, j0, rows, of.k_t);
      pack<T>(p.k, s, head, j0, rows, p.D, of.k);
      pack<T>(p.v, s, head, j0, rows, of.v_t);
    });
    parallel_dynamic(count * parts, p.threads, [&](int64_t index, int slot) {
      const int64_t i = index / parts, part = index % parts, b = (first + i) / p.HK, hk = (first + i) % p.HK;
      const Workspace w(scratch.get() + work * slot, p);
      const Sums own = sums(i, part);
      for (int64_t e = 0; e < sum_floats; ++e) own.k[e] = 0.0f;
      const Sequence s = sequence(p, b);
      for (int64_t block = 0; block * QB < s.n; ++block) {
        // to and fro, so that under causality every share gets short and long blocks
        const int64_t turn = block % (2 * parts);
        if ((turn < parts ? turn : 2 * parts - 1 - turn) != part) continue;
        for (int64_t g = 0; g < group; ++g) {
          const Block at{hk * group + g, block * QB, smaller(QB, s.n - block * QB)};
          query_block<T>(p, w, operands(i), own, s, at, b * p.H + at.h, dropout);
        }
      }
    });
    const int64_t part_stride = sum_floats;
    parallel_dynamic(count * key_blocks, p.threads, [&](int64_t index, int slot) {
      const int64_t i = index / key_blocks, j0 = index % key_blocks * KB, head = (first + i) % p.HK;
      const Sequence s = sequence(p, (first + i) / p.HK);
      const int64_t last = smaller(s.m, j0 + KB);
      const Sums own = sums(i, 0);
      float* row = scratch.get() + work * slot;
      if (p.k_bar.data)
        write_sums<T>(p.k_bar, s, head, own.k, own.k_stack, own.ld_k, p.D, parts, part_stride, j0, last, row);
      if (p.v_bar.data)
        write_sums<T>(p.v_bar, s, head, own.v, own.v_stack, own.ld_v, p.V, parts, part_stride, j0, last, row);
    });
    for (int64_t unit = 0; Sums::own_bias(p) && unit < count * parts; ++unit) {
      const Sums own = sums(unit / parts, unit % parts);
      const Sequence s = sequence(p, (first + unit / parts) / p.HK);
      for (int t = 0; t < p.mask.stacks; ++t)
        for (int64_t g = 0; g < group; ++g) {
          const int64_t h = (first + unit / parts) % p.HK * group + g;
          for (int64_t j = 0; j < (m.col ? s.m : 1); ++j)
            p.bias_bar[bias_element(m, s, t, h, 0, j)] += own.bias[t * own.bias_stack + g * own.bias_head + j];
        }
    }
  }
}

void backward(const AttentionBackward& p) {
  if (p.dtype == DType::f32) backward_typed<float>(p);
  else if (p.dtype == DType::bf16) backward_typed<bf16>(p);
  else backward_typed<f16>(p);
}

}  // namespace

const AttentionBackwardKernels& attention_backward_kernels() {
  static const AttentionBackwardKernels kernels{backward};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
