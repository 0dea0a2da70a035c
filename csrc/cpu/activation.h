// Pointwise activations and gated products of stacked tensors: the interface between csrc/ops/activation.cpp and the
// kernels of every capability.
#pragma once

#include <cstdint>

#include "../layout.h"
#include "capabilities.h"

namespace aajr {

// In the order of POINTWISE in aajr_kernels/ops/activation/reference.py.
enum class Activation : int { gelu, gelu_tanh, silu, quick_gelu, relu, relu2, tanh, sigmoid, count };

struct Pointwise {
  Activation kind;
  DType dtype;
  int64_t tangents;
  RowLayout layout;
  Stream x, y_bar;  // y_bar only in the backward
  Stream out;       // y, or x_bar
  int threads;
};

struct Gated {
  Activation kind;  // gelu, gelu_tanh or silu
  DType dtype;
  int64_t tangents;
  bool gate_moves, up_moves;  // which of the two carries tangents
  RowLayout layout;
  Stream gate, up, h;        // h is the output of the forward and its cotangent in the backward
  Stream gate_bar, up_bar;   // either may be null
  int threads;
};

struct PointwiseKernels {
  void (*forward)(const Pointwise&);
  void (*backward)(const Pointwise&);
};
struct GatedKernels {
  void (*forward)(const Gated&);
  void (*backward)(const Gated&);
};

AAJR_DECLARE_KERNELS(PointwiseKernels, pointwise_kernels)
AAJR_DECLARE_KERNELS(GatedKernels, gated_kernels)

}  // namespace aajr
