// Penalties of an output in memory: q per row and tangent, and its gradient.
#pragma once

#include "parameter.h"
#include "rows.h"

namespace aajr::cuda {

// As METRICS in aajr_kernels/ops/sensitivity/api.py; l2 and logits are one formula.
enum class Metric : int { squares, fisher, probs, count };

// A row is cut into tiles, each in the hands of a block. What a tile knows of its row, numbers apart by `rows`:
//   squares        Σ ẏ_k² for every k
//   fisher, probs  peak, Σ e^(z − peak), Σ p²; and for every k: reference, mean, square, second (see sensitivity.cuh)
struct Tiles {
  int64_t count, width;  // of a row, and elements of each
};

constexpr int kTileRow = 3, kTileTangent = 4;

AAJR_ANYWHERE int64_t tile_fields(Metric metric, int64_t tangents) {
  return metric == Metric::squares ? tangents : kTileRow + kTileTangent * tangents;
}

// Statistics of a row for the backward: the peak, 1 / Σ e^(z − peak), and for every k: reference, mean, q, κ.
constexpr int kMomentsRow = 2, kMomentsTangent = 4;

struct Sensitivity {
  Metric metric;
  DType dtype;
  int64_t stacks, rows, size;
  Tiles tiles;
  Shape shape;
  const void* y;
  Strides y_strides;
  float* parts;        // [tiles, fields, rows]; null for the backward of the squares
  float* moments;      // [2 + 4K, rows]; backward of fisher and probs
  float* q;            // [K, rows]; forward
  const float* q_bar;  // the same; backward
  void* y_bar;         // dense; backward
};

}  // namespace aajr::cuda
