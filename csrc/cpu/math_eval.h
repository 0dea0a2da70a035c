// Elementary functions over arrays: the interface between csrc/ops/math.cpp and the functions of every capability.
#pragma once

#include <cstdint>

#include "capabilities.h"

namespace aajr {

enum class MathFunction : int {
  exp, log, sigmoid, sigmoid_complement, tanh, tanh_slope, normal_cdf, normal_density, exp_flushed, count
};

struct MathKernels {
  void (*eval)(MathFunction, const float* x, float* y, int64_t n);
};

AAJR_DECLARE_KERNELS(MathKernels, math_kernels)

}  // namespace aajr
