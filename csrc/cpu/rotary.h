// Rotary embedding: the interface between csrc/ops/rotary.cpp and the kernels of every capability.
#pragma once

#include <cstdint>

#include "../axes.h"
#include "capabilities.h"

namespace aajr {

// Rows of `size` features, numbered by nested axes (the last one runs fastest); strides in elements, the last axis of
// every tensor dense. The stack is one of the axes. Tables have stride 0 where they are broadcast.
struct RotaryAxes {
  int count;  // at least 1
  int64_t size[kMaxDims];
  int64_t x[kMaxDims], y[kMaxDims], cos[kMaxDims], sin[kMaxDims];
};

struct Rotary {
  DType dtype, table_dtype;
  RotaryAxes axes;
  int64_t rows, size, rotated;  // rotated: features that turn, even
  const char* x;
  char* y;
  const char *cos, *sin;
  bool interleaved, transposed;
  int threads;
};

// Gradients of the tables, float32 and dense [tables, rotated]: for every row of them the sum over `reduced`. In both
// axes x belongs to x and y to the cotangent of the result.
struct RotaryTables {
  DType dtype;
  RotaryAxes kept, reduced;
  int64_t tables, rows, rotated;  // rows: in the sum of one table row
  const char *x, *y_bar;
  float *cos_bar, *sin_bar;
  bool interleaved;
  int threads;
};

struct RotaryKernels {
  void (*rotate)(const Rotary&);
  void (*tables)(const RotaryTables&);
};

AAJR_DECLARE_KERNELS(RotaryKernels, rotary_kernels)

}  // namespace aajr
