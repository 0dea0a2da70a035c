// As much of CUDA as the kernels use, on a CPU: every thread of a block is a fiber, and a fiber that comes to a barrier
// waits for the others. Blocks run one after another. A barrier that some threads never reach is an error here, where a
// device would hang or go on with wrong numbers. Between barriers a warp runs as far ahead of the others as it
// can, the first one or, if asked, the last one: where a barrier is missing, the two give different numbers.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace aajr::cuda::host {

struct Thread {
  dim3 thread, block, threads, blocks;
};
extern Thread current;
extern void* dynamic;  // memory that a launch asked for

extern bool backwards;

void sync_block();
// Lanes of a warp exchange their numbers: what the lane `lane ^ mask` brought.
float exchange(float value, int mask);
// Runs a kernel: `body` once for every thread of every block.
void run(dim3 blocks, int threads, size_t dynamic_bytes, const std::function<void()>& body);

}  // namespace aajr::cuda::host

#define threadIdx (::aajr::cuda::host::current.thread)
#define blockIdx (::aajr::cuda::host::current.block)
#define blockDim (::aajr::cuda::host::current.threads)
#define gridDim (::aajr::cuda::host::current.blocks)

inline void __syncthreads() { ::aajr::cuda::host::sync_block(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) { return ::aajr::cuda::host::exchange(value, mask); }
inline int __shfl_xor_sync(unsigned, int value, int mask) {
  float carried;  // its bits
  std::memcpy(&carried, &value, 4);
  carried = ::aajr::cuda::host::exchange(carried, mask);
  std::memcpy(&value, &carried, 4);
  return value;
}
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }

// bfloat16 and float16 as bits
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // NaN stays NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline float __half2float(__half x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
}

inline __half __float2half_rn(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  __half out;
  std::memcpy(&out.bits, &half, 2);
  return out;
}
