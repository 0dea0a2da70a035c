// RMS norm and layer norm: the interface between csrc/ops/norm.cpp and the kernels of every capability.
#pragma once

#include <cstdint>

#include "../view.h"
#include "capabilities.h"

namespace aajr {

// Rows [1 + K, R, C]; strides in elements, the last axis dense. Statistics are [S, R]: r, c_k, and if centred 1 + K
// row means.
struct NormForward {
  DType dtype, weight_dtype;  // of x and y; of weight and bias
  int64_t stacks, rows, size;
  const char* x;
  int64_t x_stack, x_row;
  char* y;  // dense
  float* stats;
  const char *weight, *bias;  // may be null
  float eps, offset;
  bool centred;
  int threads;
};

struct NormBackward {
  DType dtype, weight_dtype;
  int64_t stacks, rows, size;
  const char *x, *y_bar;
  int64_t x_stack, x_row, y_stack, y_row;
  const float* stats;
  const char* weight;  // may be null
  char* x_bar;         // dense; null where not needed, as are the next two
  float *w_bar, *b_bar;
  float offset;
  bool centred;
  int threads;
};

struct NormKernels {
  void (*forward)(const NormForward&);
  void (*backward)(const NormBackward&);
};

AAJR_DECLARE_KERNELS(NormKernels, norm_kernels)

}  // namespace aajr
