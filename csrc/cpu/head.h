// The streamed LM head: the interface between csrc/ops/head.cpp and the kernels of every capability.
#pragma once

#include <cstdint>

#include "../view.h"
#include "capabilities.h"

namespace aajr {

enum class Metric : int { l2 = 0, logits = 1, fisher = 2, probs = 3 };

// Hidden states [1 + K, T, C] and weight [V, C]; strides in elements, the last axes dense.
struct HeadInput {
  DType dtype;  // of h, weight and bias
  int64_t stacks, tokens, size, words;
  const char* h;
  int64_t h_stack, h_row;
  const char* weight;
  int64_t w_row;
  const char* bias;       // [V], may be null
  const int64_t* labels;  // [T], may be null
  int64_t ignore;
  Metric metric;
  float scale, cap;  // cap 0 for none
  float* kept;       // null, or where the forward keeps its logits for the backward
  int threads;
};

struct HeadForward : HeadInput {
  // [2 + 4K, T]: peak and Σ e^(z - peak) over all words but the likeliest; of every tangent its reference (ż of that
  // word), the mean of ż - reference, q, and for probs p e - Σ p² e at that word
  float* stats;
  float* nll;    // [T]; null without labels
};

struct HeadBackward : HeadInput {
  const float *stats, *q_bar, *nll_bar;  // the cotangents [K, T] and [T] may be null
  char *h_bar, *w_bar;                   // [1 + K, T, C] and [V, C], dense, of the dtype; null where not needed
  float* b_bar;                          // [V]
  bool more;  // w_bar (float32) and b_bar hold the sums over other tokens, to be added to
};

struct HeadKernels {
  int64_t (*kept_size)(const HeadInput&);  // floats
  void (*forward)(const HeadForward&);
  void (*backward)(const HeadBackward&);
};

AAJR_DECLARE_KERNELS(HeadKernels, head_kernels)

}  // namespace aajr
