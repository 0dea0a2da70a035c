// Kernels of the penalties of an output in memory: blocks take tiles of rows, and a second stage puts a row together, in
// a fixed order.
//
// With p = softmax(z), μ = Σ p ż and e = ż − μ:
//   squares  q = Σ ẏ²        ẏ̄ = 2 q̄ ẏ
//   fisher   q = Σ p e²      z̄ = Σ_k q̄ p (e² − q),                ż̄ = 2 q̄ p e
//   probs    q = Σ p² e²     z̄ = Σ_k q̄ (2p²e² − 2pq − 2κpe),      ż̄ = q̄ (2p²e − 2κp), κ = Σ p² e
// A tile takes ż relative to its value at the tile's largest logit: a common offset drops out and cancels no digits. With
// p_t the softmax within a tile, it knows its mean Σ p_t (ż − reference) and, about that mean, the square Σ p_t e_t²
// (fisher), or with mass = Σ p_t²: second = Σ p_t² e_t / mass and square = Σ p_t² (e_t − second)² (probs). A tile of
// weight w in its row, whose mean lies Δ away, brings w (square + Δ²), or w² (square + mass (second + Δ)²).
#pragma once

#include <cmath>

#include "block.h"
#include "row.h"
#include "sensitivity.h"

namespace aajr::cuda {

// The largest logit of a tile and the first place where it stands, the same for every thread.
struct Peak {
  float value;
  int place;
};

AAJR_DEVICE Peak higher(const Peak& a, const Peak& b) {
  return b.value > a.value || (b.value == a.value && b.place < a.place) ? b : a;
}

AAJR_DEVICE Peak block_peak(Peak mine) {
  AAJR_SHARED float values[kMostWarps];
  AAJR_SHARED int places[kMostWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float value = __shfl_xor_sync(kAllLanes, mine.value, step);
    mine = higher(mine, Peak{value, __shfl_xor_sync(kAllLanes, mine.place, step)});
  }
  if (warps == 1) return mine;
  __syncthreads();  // those of the tile before have been read (sums between tiles wait as well)
  if (lane == 0) values[warp] = mine.value, places[warp] = mine.place;
  __syncthreads();
  for (int w = 0; w < warps; ++w) mine = higher(mine, Peak{values[w], places[w]});
  return mine;
}

// A tile without a finite logit has the weight zero; a row of such tiles is NaN, as in torch.
AAJR_DEVICE float finite(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// The softmax within a tile, in registers where `Packs` > 0, and otherwise computed from the logits whenever it is asked for.
template <class T, bool Aligned, int Packs>
class Weights {
 public:
  AAJR_DEVICE void read(const T* from, int size, float* peak, float* total, int* place) {
    constexpr int N = kPack<T>;
    Row<T, Aligned, Packs> logits;
    logits.read(from, size);
    from_ = from;
    Peak mine{-INFINITY, size - 1};
    for_packs<T, Packs>(size, [&](int j, int64_t column, int64_t count) {
      const Pack<N> pack = logits.get(j, column, count);
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i < count) mine = higher(mine, Peak{pack.at[i], static_cast<int>(column) + i});
    });
    mine = block_peak(mine);
    top_ = finite(mine.value);
    float sum[1] = {};
    for_packs<T, Packs>(size, [&](int j, int64_t column, int64_t count) {
      const Pack<N> powers = powers_of(logits.get(j, column, count), count);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[0] += powers.at[i];
      if constexpr (Packs > 0) held_[j] = powers;
    });
    block_sum(sum);
    scale_ = sum[0] > 0.0f ? 1.0f / sum[0] : sum[0];  // NaN stays NaN
    *peak = mine.value, *total = sum[0], *place = mine.place;
  }
  AAJR_DEVICE Pack<kPack<T>> get(int j, int64_t column, int64_t count) const {
    Pack<kPack<T>> pack;
    if constexpr (Packs > 0) pack = held_[j];
    else pack = powers_of(load<Aligned>(from_ + column, count), count);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.at[i] *= scale_;
    return pack;
  }

 private:
  AAJR_DEVICE Pack<kPack<T>> powers_of(Pack<kPack<T>> pack, int64_t count) const {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.at[i] = i < count ? expf(pack.at[i] - top_) : 0.0f;
    return pack;
  }

  const T* from_ = nullptr;
  Pack<kPack<T>> held_[Packs > 0 ? Packs : 1];
  float top_ = 0.0f, scale_ = 0.0f;
};

// Σ f(p, ż − reference) over a tile, for N sums at once.
template <int N, class T, bool Aligned, int Packs, class F>
AAJR_DEVICE void weighted_sums(const Weights<T, Aligned, Packs>& p, const Row<T, Aligned, Packs>& tangent,
                               float reference, int size, float (&sums)[N], F&& f) {
  for_packs<T, Packs>(size, [&](int j, int64_t column, int64_t count) {
    const Pack<kPack<T>> weights = p.get(j, column, count), along = tangent.get(j, column, count);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i)
      if (i < count) f(sums, weights.at[i], along.at[i] - reference);
  });
  block_sum(sums);
}

// Puts a row together from its tiles, for tangent k.
AAJR_DEVICE void merge_tiles(const Sensitivity& p, int64_t row, int64_t k) {
  const int64_t tangents = p.stacks - 1, fields = tile_fields(p.metric, tangents);
  const auto at = [&](int64_t tile, int64_t field) { return p.parts[(tile * fields + field) * p.rows + row]; };
  if (p.metric == Metric::squares) {
    float total = 0.0f;
    for (int64_t t = 0; t < p.tiles.count; ++t) total += at(t, k);
    p.q[k * p.rows + row] = total;
    return;
  }
  int64_t best = 0;
  for (int64_t t = 1; t < p.tiles.count; ++t)
    if (at(t, 0) > at(best, 0)) best = t;
  const float peak = at(best, 0);
  const int64_t mine = kTileRow + kTileTangent * k;
  const float reference = at(best, mine);
  float total = 0.0f, mean = 0.0f;
  for (int64_t t = 0; t < p.tiles.count; ++t) {
    const float weight = at(t, 1) * expf(at(t, 0) - peak);
    total += weight;
    mean += weight * ((at(t, mine) - reference) + at(t, mine + 1));
  }
  const float scale = 1.0f / total;
  mean *= scale;
  float q = 0.0f, kappa = 0.0f;
  for (int64_t t = 0; t < p.tiles.count; ++t) {
    const float weight = at(t, 1) * expf(at(t, 0) - peak) * scale;
    const float away = (at(t, mine) - reference) + at(t, mine + 1) - mean;
    if (p.metric == Metric::fisher) {
      q += weight * at(t, mine + 2) + (weight * away) * away;  // no weight times an overflow
    } else {
      const float second = at(t, mine + 3) + away, mass = weight * weight * at(t, 2);
      q += weight * weight * at(t, mine + 2) + mass * second * second;
      kappa += mass * second;
    }
  }
  if (p.q != nullptr) p.q[k * p.rows + row] = q;
  if (p.moments == nullptr) return;
  float* moments = p.moments + row;
  if (k == 0) moments[0] = peak, moments[p.rows] = scale;
  const float found[kMomentsTangent] = {reference, mean, q, kappa};
  for (int i = 0; i < kMomentsTangent; ++i) moments[(kMomentsRow + kMomentsTangent * k + i) * p.rows] = found[i];
}

AAJR_DEVICE int tile_size(const Sensitivity& p, int64_t tile) {
  const int64_t rest = p.size - tile * p.tiles.width;
  return static_cast<int>(rest < p.tiles.width ? rest : p.tiles.width);
}

// First stage. `Softmax`: fisher and probs, which differ in a weight; otherwise the squares. A row of one tile is put
// together at once.
template <bool Softmax, class T, bool Aligned, int Packs>
AAJR_GLOBAL(kMostThreads) void sensitivity_tiles_kernel(const Sensitivity p) {
  constexpr int N = kPack<T>;
  const int64_t tangents = p.stacks - 1, fields = tile_fields(p.metric, tangents);
  const uint32_t tiles = static_cast<uint32_t>(p.tiles.count), items = static_cast<uint32_t>(p.rows) * tiles;
  for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
    const uint32_t row = item / tiles, tile = item % tiles;
    const int size = tile_size(p, tile);
    const T* y = static_cast<const T*>(p.y) + offset_of(p.shape, p.y_strides, row) + tile * p.tiles.width;
    float* parts = p.parts + tile * fields * p.rows + row;
    const auto write = [&](int64_t field, float value) {
      if (threadIdx.x == 0) parts[field * p.rows] = value;
    };
    if constexpr (!Softmax) {
      for (int64_t k = 0; k < tangents; ++k) {
        float sum[1] = {};
        const T* along = y + (1 + k) * p.y_strides.stack;
        for_packs<T, 0>(size, [&](int, int64_t column, int64_t count) {
          const Pack<N> pack = load<Aligned>(along + column, count);
#pragma unroll
          for (int i = 0; i < N; ++i)
            if (i < count) sum[0] += pack.at[i] * pack.at[i];
        });
        block_sum(sum);
        write(k, sum[0]);
      }
    } else {
      Weights<T, Aligned, Packs> weights;
      Row<T, Aligned, Packs> tangent;
      float peak, total;
      int place;
      weights.read(y, size, &peak, &total, &place);
      write(0, peak);
      write(1, total);
      for (int64_t k = 0; k < tangents; ++k) {
        const T* along = y + (1 + k) * p.y_strides.stack;
        const float reference = widen(along[place]);
        tangent.read(along, size);
        float mean[1] = {};
        weighted_sums(weights, tangent, reference, size, mean,
                      [](float (&sums)[1], float w, float e) { sums[0] += w * e; });
        const float centre = reference + mean[0];
        // the digits of the mean that the sum with the reference lost
        const float rest = mean[0] - (centre - reference);
        float second = 0.0f, square[1] = {};
        if (p.metric == Metric::fisher) {
          weighted_sums(weights, tangent, centre, size, square,
                        [rest](float (&sums)[1], float w, float e) { sums[0] += w * (e - rest) * (e - rest); });
        } else {
          float sums[2] = {};
          weighted_sums(weights, tangent, centre, size, sums, [rest](float (&s)[2], float w, float e) {
            s[0] += w * w;
            s[1] += w * w * (e - rest);
          });
          second = sums[0] > 0.0f ? sums[1] / sums[0] : sums[0];
          if (k == 0) write(2, sums[0]);
          weighted_sums(weights, tangent, centre, size, square, [rest, second](float (&s)[1], float w, float e) {
            s[0] += w * w * (e - rest - second) * (e - rest - second);
          });
        }
        const int64_t mine = kTileRow + kTileTangent * k;
        write(mine, reference);
        write(mine + 1, mean[0]);
        write(mine + 2, square[0]);
        write(mine + 3, second);
      }
    }
    if (p.tiles.count == 1 && threadIdx.x == 0)
      for (int64_t k = 0; k < tangents; ++k) merge_tiles(p, row, k);
  }
}

// Second stage, a thread for a row and a tangent: blocks (rows, tangents).
static AAJR_GLOBAL(kMostThreads) void sensitivity_merge_kernel(const Sensitivity p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < p.rows) merge_tiles(p, row, blockIdx.y);
}

template <bool Softmax, class T, bool Aligned>
AAJR_GLOBAL(kMostThreads) void sensitivity_bwd_kernel(const Sensitivity p) {
  constexpr int N = kPack<T>;
  const int64_t tangents = p.stacks - 1;
  const uint32_t tiles = static_cast<uint32_t>(p.tiles.count), items = static_cast<uint32_t>(p.rows) * tiles;
  for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
    const uint32_t row = item / tiles, tile = item % tiles;
    const int64_t first = tile * p.tiles.width;
    const T* y = static_cast<const T*>(p.y) + offset_of(p.shape, p.y_strides, row) + first;
    T* y_bar = static_cast<T*>(p.y_bar) + row * p.size + first;
    const float* moments = Softmax ? p.moments + row : nullptr;
    for_packs<T, 0>(tile_size(p, tile), [&](int, int64_t column, int64_t count) {
      Pack<N> weights{}, primal_bar{}, out;
      if (Softmax && tangents > 0) {
        weights = load<Aligned>(y + column, count);
        const float peak = moments[0], scale = moments[p.rows];
#pragma unroll
        for (int i = 0; i < N; ++i) weights.at[i] = i < count ? expf(weights.at[i] - peak) * scale : 0.0f;
      }
      for (int64_t k = 0; k < tangents; ++k) {
        const float q_bar = p.q_bar[k * p.rows + row];
        const Pack<N> along = load<Aligned>(y + (1 + k) * p.y_strides.stack + column, count);
        if constexpr (Softmax) {
          const float* mine = moments + (kMomentsRow + kMomentsTangent * k) * p.rows;
          const float reference = mine[0], mean = mine[p.rows], q = mine[2 * p.rows], kappa = mine[3 * p.rows];
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const float w = weights.at[i], e = along.at[i] - reference - mean;
            if (p.metric == Metric::fisher) {
              out.at[i] = 2.0f * q_bar * w * e;
              primal_bar.at[i] += q_bar * (w * e * e - w * q);  // no weight times an overflow
            } else {
              out.at[i] = 2.0f * q_bar * w * (w * e - kappa);
              primal_bar.at[i] += 2.0f * q_bar * w * (w * e * e - q - kappa * e);
            }
          }
        } else {
#pragma unroll
          for (int i = 0; i < N; ++i) out.at[i] = 2.0f * q_bar * along.at[i];
        }
        store<Aligned>(y_bar + (1 + k) * p.rows * p.size + column, out, count);
      }
      store<Aligned>(y_bar + column, primal_bar, count);
    });
  }
}

}  // namespace aajr::cuda
