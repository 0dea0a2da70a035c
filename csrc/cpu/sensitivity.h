// Softmax, and sensitivities of outputs in memory: the interface between csrc/ops/sensitivity.cpp and the kernels of
// every capability.
#pragma once

#include <cstdint>

#include "../layout.h"
#include "capabilities.h"

namespace aajr {

// As METRICS in aajr_kernels/ops/sensitivity/api.py; l2 and logits are one formula.
enum class RowMetric : int { squares, fisher, probs, count };

struct Sensitivity {
  RowMetric metric;
  DType dtype;
  int64_t tangents;
  RowLayout layout;
  Stream y, y_bar;     // y_bar only in the backward
  float* q;            // [K, rows], dense; forward
  const float* q_bar;  // the same; backward
  int threads;
};

struct Softmax {
  DType dtype;
  int64_t tangents;
  RowLayout layout;
  Stream x, y, x_bar;  // y is its cotangent in the backward, x_bar only there
  int threads;
};

struct SensitivityKernels {
  void (*sensitivity_forward)(const Sensitivity&);
  void (*sensitivity_backward)(const Sensitivity&);
  void (*softmax_forward)(const Softmax&);
  void (*softmax_backward)(const Softmax&);
};

AAJR_DECLARE_KERNELS(SensitivityKernels, sensitivity_kernels)

}  // namespace aajr
