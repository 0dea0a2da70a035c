// Kernels of RMS norm and layer norm, a block for a row.
//
// With x and ẋ_k centred by layer norm, r = (m(x∘x) + ε)^(-1/2), c_k = r m(x∘ẋ_k), m the mean of a row:
//   y = w r x (+ bias),  ẏ_k = w r (ẋ_k − r c_k x)
// and backwards, with a = w ȳ, b_k = w ẏ̄_k,
//   β_k = r m(b_k x), s = r m(a x) + r Σ_k (m(b_k ẋ_k) − 3 c_k β_k)
//   ẋ̄_k = r b_k − r² β_k x,  x̄ = r a − r² (Σ_k (c_k b_k + β_k ẋ_k) + s x)
//   w̄ += r x ȳ + Σ_k (r ẋ_k − r² c_k x) ẏ̄_k
// Centring the results means centring a and b_k, whose sums come with the others, for the means of x and ẋ_k are zero. As
// the saved ones are rounded, the rest of each is summed first, and taken off too.
#pragma once

#include "block.h"
#include "norm.h"
#include "row.h"

namespace aajr::cuda {

// x + residual of one stream of a row, rounded as it is stored.
template <class T, bool Aligned, int Packs>
AAJR_DEVICE void add_row(const T* x, const T* residual, T* summed, int64_t size) {
  for_packs<T, Packs>(size, [&](int, int64_t column, int64_t count) {
    Pack<kPack<T>> total{};
    if (x != nullptr) total = load<Aligned>(x + column, count);
    if (residual != nullptr) {
      const Pack<kPack<T>> other = load<Aligned>(residual + column, count);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) total.at[i] += other.at[i];
    }
    store<Aligned>(summed + column, total, count);
  });
}

// The stream of a row that is normalised: of x, or of the sum, which this thread has just written.
template <class T, bool Aligned, int Packs>
AAJR_DEVICE const T* stream_of(const NormForward& p, uint32_t row, int64_t stream) {
  const T* x = static_cast<const T*>(p.x) + offset_of(p.shape, p.x_strides, row) + stream * p.x_strides.stack;
  if (p.summed == nullptr) return x;
  const T* residual = static_cast<const T*>(p.residual) + offset_of(p.shape, p.residual_strides, row) +
                      stream * p.residual_strides.stack;
  T* summed = static_cast<T*>(p.summed) + (stream * p.rows + row) * p.size;
  add_row<T, Aligned, Packs>(stream < p.x_stacks ? x : nullptr, stream < p.residual_stacks ? residual : nullptr, summed,
                             p.size);
  return summed;
}

template <class T, bool Aligned, int Packs>
AAJR_GLOBAL(kMostThreads) void norm_fwd_kernel(const NormForward p) {
  constexpr int N = kPack<T>;
  const float inverse = 1.0f / static_cast<float>(p.size);
  for (uint32_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    Row<T, Aligned, Packs> x, tangent;
    x.read(stream_of<T, Aligned, Packs>(p, row, 0), p.size);
    float mean = 0.0f, rest = 0.0f, r = 0.0f;  // rest: the mean that x has without its own, which is rounded
    float* stats = p.stats + row;
    // the primal's sums come with those of the first tangent
    for (int64_t k = 0; k == 0 || k < p.stacks - 1; ++k) {
      const bool exists = k < p.stacks - 1;
      if (exists) tangent.read(stream_of<T, Aligned, Packs>(p, row, 1 + k), p.size);
      float tangent_mean = 0.0f;
      if (p.centred) {
        float sums[2] = {};
        for_packs<T, Packs>(p.size, [&](int j, int64_t column, int64_t count) {
          const Pack<N> a = x.get(j, column, count);
          const Pack<N> b = exists ? tangent.get(j, column, count) : Pack<N>{};
#pragma unroll
          for (int i = 0; i < N; ++i) sums[0] += a.at[i], sums[1] += b.at[i];
        });
        block_sum(sums);
        if (k == 0) mean = sums[0] * inverse;
        tangent_mean = sums[1] * inverse;
      }
      float dots[4] = {};
      for_packs<T, Packs>(p.size, [&](int j, int64_t column, int64_t count) {
        const Pack<N> a = x.get(j, column, count);
        const Pack<N> b = exists ? tangent.get(j, column, count) : Pack<N>{};
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i >= count) continue;
          const float centred = a.at[i] - mean, tangent_centred = b.at[i] - tangent_mean;
          dots[0] += centred * centred;
          dots[1] += centred * tangent_centred;
          dots[2] += centred;
          dots[3] += tangent_centred;
        }
      });
      block_sum(dots);
      if (k == 0) {
        rest = p.centred ? dots[2] * inverse : 0.0f;
        const float square = dots[0] * inverse - rest * rest;
        r = rsqrtf((square < 0.0f ? 0.0f : square) + p.eps);  // NaN stays
      }
      const float tangent_rest = p.centred ? dots[3] * inverse : 0.0f;
      const float c = (dots[1] * inverse - rest * tangent_rest) * r, rc = r * c;
      T* y = static_cast<T*>(p.y) + row * p.size;
      T* y_tangent = y + (1 + k) * p.rows * p.size;
      for_packs<T, Packs>(p.size, [&](int j, int64_t column, int64_t count) {
        const Pack<N> w = p.weight.load<N, Aligned>(column, count, 1.0f, p.offset);
        Pack<N> a = x.get(j, column, count);
        Pack<N> b = exists ? tangent.get(j, column, count) : Pack<N>{};
#pragma unroll
        for (int i = 0; i < N; ++i) {
          a.at[i] = (a.at[i] - mean - rest) * r;
          b.at[i] = ((b.at[i] - tangent_mean - tangent_rest) * r - a.at[i] * rc) * w.at[i];
        }
        if (exists) store<Aligned>(y_tangent + column, b, count);
        if (k > 0) return;
        const Pack<N> shift = p.bias.load<N, Aligned>(column, count, 0.0f);
#pragma unroll
        for (int i = 0; i < N; ++i) a.at[i] = a.at[i] * w.at[i] + shift.at[i];
        store<Aligned>(y + column, a, count);
      });
      if (threadIdx.x == 0) {
        if (k == 0) stats[0] = r;
        if (exists) stats[(1 + k) * p.rows] = c;
        if (p.centred) {
          float* means = stats + p.stacks * p.rows;
          if (k == 0) means[0] = mean + rest;
          if (exists) means[(1 + k) * p.rows] = tangent_mean + tangent_rest;
        }
      }
    }
  }
}

// The share of a block in the gradient of a parameter: in registers, or, where rows are read in passes, in its own memory.
template <int N, int Packs>
class Share {
 public:
  // parts: [blocks, size], or null where the gradient is not needed
  AAJR_DEVICE Share(float* parts, int64_t size) : memory_(parts == nullptr ? nullptr : parts + blockIdx.x * size) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) held_[j] = Pack<N>{};
  }
  // `first`: nothing has been added yet, and memory holds anything
  AAJR_DEVICE void add(int j, int64_t column, int64_t count, const Pack<N>& more, bool first) {
    if (memory_ == nullptr) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (Packs > 0) held_[j].at[i] += more.at[i];
      else if (i < count) memory_[column + i] = (first ? 0.0f : memory_[column + i]) + more.at[i];
    }
  }
  AAJR_DEVICE void write(int j, int64_t column, int64_t count) const {
    if constexpr (Packs > 0) {
      if (memory_ == nullptr) return;
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i < count) memory_[column + i] = held_[j].at[i];
    }
  }

 private:
  static constexpr int kHeld = Packs > 0 ? Packs : 1;
  float* memory_;
  Pack<N> held_[kHeld];
};

// Four streams and two shares of packs in the hands of a thread: fewer threads, with more registers each. Their loads in
// flight cover the latency of memory as those of more threads would.
constexpr int kNormBackwardThreads = kMostThreads / 2;

// Statistics of a tangent in a row.
struct Tangent {
  float beta, c, mean_x, rest_x, mean_b;
};

template <class T, bool Aligned, int Packs>
AAJR_GLOBAL(kNormBackwardThreads) void norm_bwd_kernel(const NormBackward p) {
  constexpr int N = kPack<T>;
  AAJR_DYNAMIC(Tangent, each);  // [K]
  const float inverse = 1.0f / static_cast<float>(p.size);
  const int64_t tangents = p.stacks - 1;
  Share<N, Packs> w_share(p.w_parts, p.size), b_share(p.b_parts, p.size);
  for (uint32_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x_row = static_cast<const T*>(p.x) + offset_of(p.shape, p.x_strides, row);
    const T* g_row = static_cast<const T*>(p.y_bar) + offset_of(p.shape, p.y_strides, row);
    const float* stats = p.stats + row;
    const float r = stats[0], mean = p.centred ? stats[p.stacks * p.rows] : 0.0f;
    Row<T, Aligned, Packs> x, g, x_tangent, g_tangent;
    x.read(x_row, p.size);
    g.read(g_row, p.size);
    float s = 0.0f, mean_a = 0.0f, rest = 0.0f;
    __syncthreads();  // the tangents of the row before have been read (sums of several warps wait as well)
    for (int64_t k = 0; k == 0 || k < tangents; ++k) {
      const bool exists = k < tangents;
      Tangent one{};
      if (exists) {
        x_tangent.read(x_row + (1 + k) * p.x_strides.stack, p.size);
        g_tangent.read(g_row + (1 + k) * p.y_strides.stack, p.size);
        one.c = stats[(1 + k) * p.rows];
        if (p.centred) one.mean_x = stats[(p.stacks + 1 + k) * p.rows];
      }
      if (p.centred) {
        float rests[2] = {};
        for_packs<T, Packs>(p.size, [&](int j, int64_t column, int64_t count) {
          const Pack<N> primal = x.get(j, column, count);
          const Pack<N> b = exists ? x_tangent.get(j, column, count) : Pack<N>{};
#pragma unroll
          for (int i = 0; i < N; ++i) {
            if (i >= count) continue;
            rests[0] += primal.at[i] - mean;
            rests[1] += b.at[i] - one.mean_x;
          }
        });
        block_sum(rests);
        rest = rests[0] * inverse, one.rest_x = rests[1] * inverse;
      }
      float sums[5] = {};  // a x, a, b x, b ẋ, b
      for_packs<T, Packs>(p.size, [&](int j, int64_t column, int64_t count) {
        const Pack<N> w = p.weight.load<N, Aligned>(column, count, 1.0f, p.offset);
        const Pack<N> primal = x.get(j, column, count), primal_bar = g.get(j, column, count);
        const Pack<N> b = exists ? x_tangent.get(j, column, count) : Pack<N>{};
        const Pack<N> b_bar = exists ? g_tangent.get(j, column, count) : Pack<N>{};
        Pack<N> w_bar{}, shift_bar{};
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i >= count) continue;
          const float centred = primal.at[i] - mean - rest, tangent = b.at[i] - one.mean_x - one.rest_x;
          const float first = k == 0 ? primal_bar.at[i] : 0.0f;  // the primal counts once
          const float a = first * w.at[i], other = b_bar.at[i] * w.at[i];
          sums[0] += a * centred;
          sums[1] += a;
          sums[2] += other * centred;
          sums[3] += other * tangent;
          sums[4] += other;
          w_bar.at[i] = r * (first * centred + b_bar.at[i] * (tangent - r * one.c * centred));
          shift_bar.at[i] = first;
        }
        w_share.add(j, column, count, w_bar, row == blockIdx.x && k == 0);
        b_share.add(j, column, count, shift_bar, row == blockIdx.x && k == 0);
      });
      if (p.x_bar == nullptr) continue;
      block_sum(sums);
      if (k == 0) s = r * sums[0] * inverse, mean_a = sums[1] * inverse;
      one.beta = r * sums[2] * inverse;
      one.mean_b = sums[4] * inverse;
      s += r * (sums[3] * inverse - 3.0f * one.c * one.beta);
      if (exists && threadIdx.x == 0) each[k] = one;
    }
    if (p.x_bar == nullptr) continue;
    __syncthreads();
    const T* sum_row = p.sum_bar == nullptr
                           ? nullptr
                           : static_cast<const T*>(p.sum_bar) + offset_of(p.shape, p.sum_strides, row);
    T* x_bar = static_cast<T*>(p.x_bar) + row * p.size;
    for_packs<T, Packs>(p.size, [&](int j, int64_t column, int64_t count) {
      const Pack<N> w = p.weight.load<N, Aligned>(column, count, 1.0f, p.offset);
      const Pack<N> primal = x.get(j, column, count), primal_bar = g.get(j, column, count);
      Pack<N> along, out;
#pragma unroll
      for (int i = 0; i < N; ++i) along.at[i] = s * (primal.at[i] - mean - rest);
      for (int64_t k = 0; k < tangents; ++k) {
        const Tangent one = each[k];
        const bool here = tangents == 1;  // the only one is still at hand
        const Pack<N> b = here ? x_tangent.get(j, column, count)
                               : load<Aligned>(x_row + (1 + k) * p.x_strides.stack + column, count);
        const Pack<N> b_bar = here ? g_tangent.get(j, column, count)
                                   : load<Aligned>(g_row + (1 + k) * p.y_strides.stack + column, count);
        if (sum_row != nullptr) out = load<Aligned>(sum_row + (1 + k) * p.sum_strides.stack + column, count);
        else out = Pack<N>{};
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float other = b_bar.at[i] * w.at[i] - (p.centred ? one.mean_b : 0.0f);
          out.at[i] += r * other - r * r * one.beta * (primal.at[i] - mean - rest);
          along.at[i] += one.c * other + one.beta * (b.at[i] - one.mean_x - one.rest_x);
        }
        store<Aligned>(x_bar + (1 + k) * p.rows * p.size + column, out, count);
      }
      if (sum_row != nullptr) out = load<Aligned>(sum_row + column, count);
      else out = Pack<N>{};
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float a = primal_bar.at[i] * w.at[i] - (p.centred ? mean_a : 0.0f);
        out.at[i] += r * a - r * r * along.at[i];
      }
      store<Aligned>(x_bar + column, out, count);
    });
  }
  for_packs<T, Packs>(p.size, [&](int j, int64_t column, int64_t count) {
    w_share.write(j, column, count);
    b_share.write(j, column, count);
  });
}

}  // namespace aajr::cuda
