// Sums over the threads of a block, the same for all of them and in the same order at every run.
#pragma once

#include "portable.h"

namespace aajr::cuda {

constexpr int kWarp = 32, kMostWarps = 16, kMostThreads = kWarp * kMostWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

// Every thread brings N numbers and takes home their N sums. Called by all threads of a block, whose number is a
// multiple of 32 and at most 512.
template <int N>
AAJR_DEVICE void block_sum(float (&values)[N]) {
  AAJR_SHARED float parts[kMostWarps][N];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) values[n] += __shfl_xor_sync(kAllLanes, values[n], step);
  if (warps == 1) return;
  __syncthreads();  // the sums of the call before have been read
  if (lane == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) parts[warp][n] = values[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) total += parts[w][n];
    values[n] = total;
  }
}

}  // namespace aajr::cuda
