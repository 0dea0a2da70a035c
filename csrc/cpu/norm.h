// RMS norm and layer norm: the interface between csrc/ops/norm.cpp and the kernels of every capability.
#pragma once

#include <cstdint>

#include "../axes.h"
#include "capabilities.h"

namespace aajr {

// Rows [1 + K, *batch, C]: a stride for the stack, axes for the batch, the last axis dense; strides in elements.
// Statistics are dense [S, R]: r, c_k, and if centred the 1 + K row means.
struct NormForward {
  DType dtype, weight_dtype, bias_dtype;  // dtype: of x, residual, summed and y
  int64_t stacks, rows, size;
  const char* x;
  Axes x_rows;
  int64_t x_stacks, x_stack;  // stacks beyond x_stacks are zero (never so without a residual)
  const char* residual;       // may be null; then summed is null too
  Axes residual_rows;
  int64_t residual_stacks, residual_stack;
  char* summed;  // x + residual, dense: what is normalised
  char* y;       // dense
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
  Axes x_rows, y_rows, sum_rows;
  int64_t x_stack, y_stack, sum_stack;
  const char* sum_bar;  // added to x_bar; may be null
  const float* stats;
  const char* weight;    // may be null
  char* x_bar;           // dense; null where not needed, as are the next two
  float *w_bar, *b_bar;  // [C]
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
