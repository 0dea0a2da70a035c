// RMS norm and layer norm of stacked rows: the interface between entries.cu and the kernels, as csrc/cpu/norm.h is that of
// the CPU kernels. Strides count elements; the last axis is dense. Statistics are dense [S, R]: r, c_k, and if centred the
// 1 + K row means.
#pragma once

#include "parameter.h"
#include "rows.h"

namespace aajr::cuda {

struct NormForward {
  DType dtype;  // of x, residual, summed and y
  int64_t stacks, rows, size;
  Shape shape;
  const void* x;
  Strides x_strides;
  int64_t x_stacks;      // stacks beyond are zero (never so without a residual)
  const void* residual;  // may be null; then summed is null too
  Strides residual_strides;
  int64_t residual_stacks;
  void* summed;  // x + residual, dense: what is normalised
  void* y;       // dense
  float* stats;
  Parameter weight, bias;
  float eps, offset;
  bool centred;
};

struct NormBackward {
  DType dtype;
  int64_t stacks, rows, size;
  Shape shape;
  const void *x, *y_bar, *sum_bar;  // sum_bar is added to x_bar; may be null
  Strides x_strides, y_strides, sum_strides;
  const float* stats;
  Parameter weight;
  void* x_bar;              // dense; null where not needed, as are the next four
  float *w_bar, *b_bar;     // [C]
  float *w_parts, *b_parts; // [parts, C], the shares of the blocks
  int64_t parts;
  float offset;
  bool centred;
};

}  // namespace aajr::cuda
