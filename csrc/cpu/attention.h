// Attention: the interface between csrc/ops/attention.cpp and the kernels of every capability.
#pragma once

#include <cstdint>

#include "../capabilities.h"
#include "../view.h"

namespace aajr {

// [J, B, heads, rows, features] with the features dense; J is 1 (no tangents) or 1 + K. Strides in elements.
struct Rows {
  char* data = nullptr;
  int64_t stack = 0, batch = 0, head = 0, row = 0;
  int stacks = 0;
};

// [J, B, H, N, M], where a broadcast axis has stride 0. bool: true = attend; floating: added to the scores.
struct Mask {
  char* data = nullptr;
  DType dtype = DType::boolean;
  int64_t stack = 0, batch = 0, head = 0, row = 0, col = 0;
  int stacks = 0;
  bool is_bias() const { return data != nullptr && dtype != DType::boolean; }
};

// Keys and values that lie together: those of a context, which have no tangents, or those of the call.
struct KeyPart {
  Rows k, v;
  Rows k_bar, v_bar;  // of a backward; data null where not needed
  int64_t rows;       // with packed sequences all rows
  int64_t longest;    // of a sequence; `rows` otherwise
  int64_t before;     // keys of the part before it
};

struct AttentionProblem {
  DType dtype;
  int64_t B, H, HK, N, D, V;  // with packed sequences N counts all rows
  int64_t longest_q;          // of a sequence; N otherwise
  int64_t columns;            // of masks: keys of all parts, with packed sequences those of the longest
  int K;  // tangents of the output
  Rows q;
  KeyPart parts[2];  // keys count on from one to the next
  int part_count;
  Mask mask;
  float scale;
  float softcap;  // 0: none
  bool causal;
  int64_t offset;  // query i sees the keys j <= i + offset, counted from the first of the first part
  int64_t window;  // and only those j > i + offset - window; 0: all
  float dropout;
  const uint8_t* keep;  // [B, H, N, columns], dense: 0 where a weight is dropped; null without dropout
  // Packed sequences: query rows [q_start[b], q_start[b + 1]) of the only batch row attend to the key rows
  // [k_start[b], k_start[b + 1]) of the only part, and B is the number of sequences. Null: ordinary batches.
  const int64_t *q_start, *k_start;
  bool align_right;  // with packed sequences: offset = keys - queries of each sequence
  // Row statistics [B, H, N] (with packed sequences [H, N]): largest score, 1 / sum of exponentials, and for every
  // tangent mu = rowsum(P S'). A row without a key has shift +inf and norm 0.
  float *shift, *norm, *mu;
  int64_t mu_stack;
  int threads;
  bool has_scores() const {
    return q.stacks > 1 || parts[part_count - 1].k.stacks > 1 || (mask.is_bias() && mask.stacks > 1);
  }
};

struct AttentionForward : AttentionProblem {
  Rows out;
};

struct AttentionBackward : AttentionProblem {
  Rows out, out_bar;
  Rows q_bar;                // data null where not needed
  float* bias_bar;           // float32, dense in the shape of the mask before broadcasting; null where not needed
  Mask bias_bar_strides;     // its strides, 0 on broadcast axes
};

struct AttentionKernels {
  void (*forward)(const AttentionForward&);
};
struct AttentionBackwardKernels {
  void (*backward)(const AttentionBackward&);
};

AAJR_DECLARE_AMX_KERNELS(AttentionKernels, attention_kernels)
AAJR_DECLARE_AMX_KERNELS(AttentionBackwardKernels, attention_backward_kernels)

}  // namespace aajr
