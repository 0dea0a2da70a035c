// The bias of a linear layer: the interface between csrc/ops/linear.cpp and the kernels of every capability.
#pragma once

#include <cstdint>

#include "../axes.h"
#include "capabilities.h"

namespace aajr {

// y = product, plus the bias in the first `biased` rows. In place where both are the same memory: the other rows are
// not visited then.
struct LinearBias {
  DType product_dtype, dtype;  // of y; the product has the same or float32
  int64_t rows, biased, size;
  const char* product;  // dense, as is y
  char* y;
  const char* bias;  // dtype of y; may be null where biased is 0
  int threads;
};

// The sum of all rows, in float32 until it is written.
struct ColumnSum {
  DType dtype;  // of x and the sum
  int64_t rows, size;
  const char* x;
  Axes x_rows;
  char* sum;
  int threads;
};

struct LinearKernels {
  void (*bias)(const LinearBias&);
  void (*column_sum)(const ColumnSum&);
};

AAJR_DECLARE_KERNELS(LinearKernels, linear_kernels)

}  // namespace aajr
