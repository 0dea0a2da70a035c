// The CUDA that the kernels use: the toolkit's own under nvcc, or the shim in host/, which runs the same templates on a
// CPU, one fiber for every thread of a block, for tests under sanitizers.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// a kernel in blocks of at most so many threads, which bounds the registers of each
#define AAJR_GLOBAL(threads) __global__ __launch_bounds__(threads, 1)
#define AAJR_DEVICE __device__ __forceinline__
#define AAJR_ANYWHERE __host__ __device__ __forceinline__
#define AAJR_SHARED __shared__
// memory of a block whose size the launch gives
#define AAJR_DYNAMIC(type, name)                        \
  extern __shared__ __align__(16) unsigned char raw_[]; \
  type* const name = reinterpret_cast<type*>(raw_)
#else
#include "host/shim.h"
#define AAJR_GLOBAL(threads)
#define AAJR_DEVICE inline
#define AAJR_ANYWHERE inline
// one block runs at a time, so memory that is shared within it may be static
#define AAJR_SHARED static
#define AAJR_DYNAMIC(type, name) type* const name = static_cast<type*>(::aajr::cuda::host::dynamic)
#endif

#include <cstdint>
