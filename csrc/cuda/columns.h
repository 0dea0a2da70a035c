// The second stage of a gradient of a parameter: the shares of the blocks, added in a fixed order.
#pragma once

#include "launch.h"

namespace aajr::cuda {

// parts [count, size], out [size]; a thread for a column, eight rows of shares on their way at a time
constexpr int kColumnThreads = 128;

static AAJR_GLOBAL(kColumnThreads) void column_sum_kernel(const float* parts, int64_t count, int64_t size, float* out) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= size) return;
  float total = 0.0f;
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) total += parts[i * size + column];
  out[column] = total;
}

inline void sum_columns(const float* parts, int64_t count, int64_t size, float* out, LaunchStream stream) {
  const dim3 blocks(static_cast<unsigned>((size + kColumnThreads - 1) / kColumnThreads));
  launch<kColumnThreads>(column_sum_kernel, blocks, kColumnThreads, 0, stream, parts, count, size, out);
}

}  // namespace aajr::cuda
