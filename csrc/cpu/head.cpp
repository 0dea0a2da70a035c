// The streamed head in two passes over the vocabulary: 1 + K products forward and 3 (1 + K) backward, of [tokens,
// hidden] by [hidden, vocabulary]. Threads take shares of the vocabulary. For few tokens the caller may have the
// logits kept in between, which saves the backward 1 + K of them.
#include "head.h"

#include <cmath>

#include "head_metric.h"
#include "head_tile.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

// Memory of one thread: a block of the weight, its tile of logits, and for the backward the block in panels and its
// cotangent.
struct Workspace {
  float *weight, *bias, *exponentials, *tile, *panels, *w_bar;

  static int64_t floats(const Layout& l, bool backward) {
    return kWords * (l.w_ld + 16 + W + l.ld + (backward ? 2 * l.padded : 0));
  }
  Workspace(float* memory, const Layout& l) {
    weight = memory;
    bias = weight + kWords * l.w_ld;
    exponentials = bias + kWords * 16;
    tile = exponentials + kWords * W;
    panels = tile + kWords * l.ld;
    w_bar = panels + kWords * l.padded;
  }
};

AAJR_INLINE int64_t share(const Layout& l, int64_t words, int64_t part) { return words * part / l.parts; }

// ---- Forward -------------------------------------------------------------------------------------------------------

struct ForwardChunk {
  const HeadForward& p;
  const Layout& l;
  const Cap cap;
  int64_t token, tokens;
  const float* transposed;
  float* at_label;

  void add_tile(const Workspace& w, int64_t block, int64_t word, int64_t words, const State& s) const {
    float* tile = p.kept != nullptr ? p.kept + word * l.ld : w.tile;
    logits_product(l, words, w.weight, transposed + block * l.hidden(), tile);
    const int64_t begin = block * l.block, count = min64(l.block, tokens - begin);
    const bool primal = l.active.primal;
    for (int64_t i = 0; i < count; i += W) {
      const Lanes t = lanes_of(l, tile, w.exponentials, words, i);
      const vf peak = cap.plain ? peak_of(t, primal)
                      : cap.capped ? finish_logits<true>(t, primal, w.bias, cap)
                                   : finish_logits<false>(t, primal, w.bias, cap);
      if (p.labels != nullptr)
        for (int64_t j = i; j < min64(i + W, count); ++j) {
          const int64_t label = p.labels[token + begin + j] - word;
          if (label >= 0 && label < words) at_label[begin + j] = tile[label * l.ld + j];
        }
      add_words(t, p.metric, primal, peak, s, begin + i);
    }
  }

  void stream(int64_t part, const Workspace& w, const State& s) const {
    s.clear(l.active.tangents);
    const int64_t last = share(l, p.words, part + 1), start = share(l, p.words, part);
    for (int64_t word = start; word < last; word += kWords) {
      const int64_t words = min64(kWords, last - word);
      pack_words(p, l, word, words, w.weight, nullptr, w.bias);
      for (int64_t block = 0; block < l.blocks(tokens); ++block) add_tile(w, block, word, words, s);
    }
  }

  void finish(const State& s) const {
    const int64_t k_count = p.stacks - 1;
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t t = token + i;
      const float rest = s.rest()[i], total = 1.0f + rest, peak = s.peak()[i];
      p.stats[t] = peak, p.stats[p.tokens + t] = rest;
      if (p.labels != nullptr) p.nll[t] = p.labels[t] == p.ignore ? 0.0f : std::log1p(rest) + (peak - at_label[i]);
      for (int64_t k = 0; k < k_count && p.metric != Metric::l2; ++k) {
        float q = s.of(k, 2)[i], slope = 0.0f;
        if (p.metric == Metric::fisher) q /= total;
        if (p.metric == Metric::probs) {
          const float square = total * total, rest2 = s.rest2()[i], mass = (1.0f + rest2) / square;
          const float mean = s.of(k, 1)[i], mean2 = s.of(k, 3)[i], gap = mean2 - mean;
          q = s.of(k, 4)[i] / square + mass * gap * gap;
          slope = -((rest - rest2) / square * mean + mass * mean2);
        }
        const float values[4] = {s.of(k, 0)[i], s.of(k, 1)[i], q, slope};
        for (int f = 0; f < 4; ++f) p.stats[(2 + f * k_count + k) * p.tokens + t] = values[f];
      }
    }
  }
};

// q = ‖ḣ‖² of the hidden states, which needs no vocabulary.
void squared_norms(const HeadForward& p) {
  const int64_t k_count = p.stacks - 1;
  for (int64_t i = 0; i < (2 + 4 * k_count) * p.tokens; ++i) p.stats[i] = 0.0f;
  Scratch<float> row(round_up(p.size, W));
  for (int64_t k = 0; k < k_count; ++k)
    for (int64_t t = 0; t < p.tokens; ++t) {
      widen_row(p.h, p.dtype, (1 + k) * p.h_stack + t * p.h_row, p.size, row.get());
      for (int64_t c = p.size; c < round_up(p.size, W); ++c) row[c] = 0.0f;
      vf part[2] = {};
      for (int64_t c = 0; c < p.size; c += W) part[c / W % 2] += load(row.get() + c) * load(row.get() + c);
      p.stats[(2 + 2 * k_count + k) * p.tokens + t] = sum(part[0] + part[1]);
    }
}

Active active_forward(const HeadInput& p) {
  return {p.metric == Metric::fisher || p.metric == Metric::probs || p.labels != nullptr || p.cap > 0.0f,
          p.metric == Metric::l2 ? 0 : p.stacks - 1};
}

int64_t kept_size(const HeadInput& p) {
  HeadInput kept = p;
  float mark = 0.0f;
  kept.kept = &mark;
  return p.tokens == 0 || active_forward(p).count() == 0 ? 0 : p.words * layout_of(kept, active_forward(p)).ld;
}

void forward(const HeadForward& p) {
  const Metric metric = p.metric;
  if (metric == Metric::l2) squared_norms(p);
  const Active active = active_forward(p);
  if (p.tokens == 0 || active.count() == 0 || (metric == Metric::l2 && p.labels == nullptr)) return;
  const Layout l = layout_of(p, active);
  const int64_t blocks = l.blocks(l.chunk), padded = blocks * l.block;
  const int64_t state = State::fields(active.tangents) * padded, work = Workspace::floats(l, false);
  Scratch<float> transposed(blocks * l.hidden()), rows(blocks * l.padded), states(l.parts * state),
      memory(l.parts * work), at_label(padded);
  for (int64_t token = 0; token < p.tokens; token += l.chunk) {
    const ForwardChunk chunk{p, l, cap_of(p), token, min64(l.chunk, p.tokens - token), transposed.get(),
                             at_label.get()};
    parallel_dynamic(l.blocks(chunk.tokens), p.threads, [&](int64_t b, int) {
      pack_hidden(p, l, token + b * l.block, min64(l.block, chunk.tokens - b * l.block),
                  transposed.get() + b * l.hidden(), nullptr, rows.get() + b * l.padded);
    });
    for (int64_t i = 0; i < padded; ++i) at_label[i] = 0.0f;
    parallel_dynamic(l.parts, p.threads, [&](int64_t part, int) {
      chunk.stream(part, Workspace(memory.get() + part * work, l), State{states.get() + part * state, padded});
    });
    const State total{states.get(), padded};
    for (int part = 1; part < l.parts; ++part)
      merge_states(total, State{states.get() + part * state, padded}, metric, active.primal, active.tangents);
    chunk.finish(total);
  }
}

// ---- Backward ------------------------------------------------------------------------------------------------------

struct BackwardChunk {
  const HeadBackward& p;
  const Layout& l;
  const Cap cap;
  int64_t token, tokens;
  const float *transposed, *rows;
  Known known;
  float* w_sum;  // where the cotangent of the weight is kept in float32 between chunks

  void stream(int64_t part, const Workspace& w, float* h_bar) const {
    const int64_t last = share(l, p.words, part + 1), start = share(l, p.words, part), blocks = l.blocks(tokens);
    const bool need_h = p.h_bar != nullptr, need_w = p.w_bar != nullptr, more = p.more || token > 0;
    Cap c = cap;
    if (p.kept != nullptr) c.in = 1.0f;  // the forward has finished the logits
    for (int64_t word = start; word < last; word += kWords) {
      const int64_t words = min64(kWords, last - word);
      pack_words(p, l, word, words, w.weight, need_h ? w.panels : nullptr, w.bias);
      if (p.kept != nullptr)
        for (int64_t v = 0; v < words; ++v) w.bias[v] = 0.0f;
      if (need_w && more)
        for (int64_t v = 0; v < words; ++v) copy_wide(w_sum + (word + v) * l.size, l.size, w.w_bar + v * l.padded);
      for (int64_t b = 0; b < blocks; ++b) {
        float* tile = p.kept != nullptr ? p.kept + word * l.ld : w.tile;
        if (p.kept == nullptr) logits_product(l, words, w.weight, transposed + b * l.hidden(), tile);
        to_cotangents(l, p.metric, tile, words, w.bias, c, known, b * l.block, word);
        if (p.b_bar != nullptr && l.active.primal) add_bias(tile, word, words, !more && b == 0);
        if (need_h) hidden_product(l, words, tile, w.panels, word > start, h_bar + b * l.hidden_rows());
        if (need_w) weight_product(l, words, tile, rows + b * l.hidden_rows(), more || b > 0, w.w_bar);
      }
      if (need_w) store_weight(w.w_bar, word, words);
    }
  }

  void add_bias(const float* tile, int64_t word, int64_t words, bool first) const {
    for (int64_t v = 0; v < words; ++v) {
      vf total{};
      for (int64_t i = 0; i < l.block; i += W) total += load(tile + v * l.ld + i);
      p.b_bar[word + v] = sum(total) + (first ? 0.0f : p.b_bar[word + v]);
    }
  }

  void store_weight(const float* w_bar, int64_t word, int64_t words) const {
    const bool done = token + tokens == p.tokens;
    for (int64_t v = 0; v < words; ++v) {
      const int64_t offset = (word + v) * l.size;
      if (done) narrow_row(w_bar + v * l.padded, p.dtype, offset, l.size, p.w_bar);
      else copy_narrow(w_bar + v * l.padded, l.size, w_sum + offset);
    }
  }

  void learn() const {
    const int64_t k_count = p.stacks - 1;
    for (int64_t i = 0; i < Known::fields(l.active.tangents) * known.tokens; ++i) known.memory[i] = 0.0f;
    for (int64_t i = 0; i < known.tokens; ++i) {
      known.peak()[i] = __builtin_inff();  // p = 0 in the padding
      known.label()[i] = bit_cast<float>(int32_t{-1});
    }
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t t = token + i;
      known.peak()[i] = p.stats[t];
      known.rest()[i] = p.stats[p.tokens + t];
      known.inverse()[i] = 1.0f / (1.0f + known.rest()[i]);
      if (p.nll_bar != nullptr && p.labels != nullptr && p.labels[t] != p.ignore) {
        known.nll_bar()[i] = p.nll_bar[t];
        known.label()[i] = bit_cast<float>(static_cast<int32_t>(p.labels[t]));
      }
      for (int64_t k = 0; k < l.active.tangents; ++k) {
        for (int f = 0; f < 4; ++f) known.of(k, f)[i] = p.stats[(2 + f * k_count + k) * p.tokens + t];
        known.of(k, 4)[i] = p.q_bar == nullptr ? 0.0f : p.q_bar[k * p.tokens + t];
      }
    }
  }

  // Sums the shares of all threads in their order, and what `l2` adds.
  void store_hidden(int64_t t, const float* partial, int64_t partial_size, float* row) const {
    for (int64_t s = 0; s < p.stacks; ++s) {
      const int64_t a = s - l.active.first(), offset = t / l.block * l.hidden_rows();
      for (int64_t c = 0; c < l.padded; ++c) row[c] = 0.0f;
      if (a >= 0 && a < l.active.count()) {
        const float* from = partial + offset + (a * l.block + t % l.block) * l.padded;
        for (int part = 0; part < l.parts; ++part)
          for (int64_t c = 0; c < l.padded; c += W)
            store(row + c, load(row + c) + load(from + part * partial_size + c));
      }
      narrow_row(row, p.dtype, (s * p.tokens + token + t) * p.size, p.size, p.h_bar);
    }
  }
};

// h_bar[1 + k] = 2 q_bar ḣ, added to what is there where the loss has written only the primal
void pull_norms(const HeadBackward& p) {
  Scratch<float> row(round_up(p.size, W));
  for (int64_t s = 1; s < p.stacks; ++s)
    for (int64_t t = 0; t < p.tokens; ++t) {
      widen_row(p.h, p.dtype, s * p.h_stack + t * p.h_row, p.size, row.get());
      const float g = 2.0f * p.q_bar[(s - 1) * p.tokens + t];
      for (int64_t c = 0; c < p.size; ++c) row[c] *= g;
      narrow_row(row.get(), p.dtype, (s * p.tokens + t) * p.size, p.size, p.h_bar);
    }
}

void clear(char* memory, int64_t bytes) {
  if (memory != nullptr && bytes > 0) std::memset(memory, 0, bytes);
}

void backward(const HeadBackward& p) {
  const Metric metric = p.metric;
  const bool vocabulary = p.q_bar != nullptr && metric != Metric::l2;
  const bool loss = p.nll_bar != nullptr && p.labels != nullptr;
  const Active active = p.kept != nullptr ? active_forward(p)
                                          : Active{loss || (vocabulary && (metric != Metric::logits || p.cap > 0.0f)),
                                                   vocabulary ? p.stacks - 1 : 0};
  const bool streams = p.tokens > 0 && active.count() > 0;
  if (!streams) clear(p.h_bar, p.stacks * p.tokens * p.size * item_size(p.dtype));
  if (!streams && !p.more) clear(p.w_bar, p.words * p.size * item_size(p.dtype));
  if ((!streams || !active.primal) && !p.more) clear(reinterpret_cast<char*>(p.b_bar), p.words * 4);
  if (streams) {
    const Layout l = layout_of(p, active);
    const int64_t blocks = l.blocks(l.chunk), padded = blocks * l.block, work = Workspace::floats(l, true);
    const int64_t partial = p.h_bar != nullptr ? blocks * l.hidden_rows() : 0;
    // a low dtype cannot hold the sum between chunks
    const bool own_sum = p.w_bar != nullptr && p.dtype != DType::f32 && l.chunk < p.tokens;
    Scratch<float> transposed(blocks * l.hidden()), rows(p.w_bar != nullptr ? blocks * l.hidden_rows() : 0),
        row(max64(blocks, p.threads) * l.padded), facts(Known::fields(active.tangents) * padded),
        partials(l.parts * partial), memory(l.parts * work), sums(own_sum ? p.words * p.size : 0);
    for (int64_t token = 0; token < p.tokens; token += l.chunk) {
      const BackwardChunk chunk{p, l, cap_of(p), token, min64(l.chunk, p.tokens - token), transposed.get(), rows.get(),
                                Known{facts.get(), padded},
                                own_sum ? sums.get() : reinterpret_cast<float*>(p.w_bar)};
      parallel_dynamic(l.blocks(chunk.tokens), p.threads, [&](int64_t b, int) {
        pack_hidden(p, l, token + b * l.block, min64(l.block, chunk.tokens - b * l.block),
                    transposed.get() + b * l.hidden(),
                    p.w_bar != nullptr ? rows.get() + b * l.hidden_rows() : nullptr, row.get() + b * l.padded);
      });
      chunk.learn();
      parallel_dynamic(l.parts, p.threads, [&](int64_t part, int) {
        chunk.stream(part, Workspace(memory.get() + part * work, l), partials.get() + part * partial);
      });
      if (p.h_bar == nullptr) continue;
      parallel_dynamic(chunk.tokens, p.threads, [&](int64_t t, int slot) {
        chunk.store_hidden(t, partials.get(), partial, row.get() + slot * l.padded);
      });
    }
  }
  if (metric == Metric::l2 && p.q_bar != nullptr && p.h_bar != nullptr) pull_norms(p);
}

}  // namespace

const HeadKernels& head_kernels() {
  static const HeadKernels kernels{kept_size, forward, backward};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
