// How stacked tensors of one shape are walked together: rows, and outer axes that count them.
#pragma once

#include "view.h"

namespace aajr {

// The axes behind the stack axis: rows of `size` elements, dense in every tensor, and the outer axes, innermost first.
struct RowLayout {
  int64_t size;
  int outer;
  int64_t outer_size[kMaxDims];

  int64_t rows() const {
    int64_t n = 1;
    for (int i = 0; i < outer; ++i)
      if (outer_size[i] == 0) return 0;
    for (int i = 0; i < outer; ++i)  // rows without elements may be more than can be counted
      if (__builtin_mul_overflow(n, outer_size[i], &n)) return INT64_MAX;
    return n;
  }
};

// One stacked tensor in that layout; strides in elements. `data` is null where there is none.
struct Stream {
  char* data = nullptr;
  int64_t stack = 0;
  int64_t outer[kMaxDims] = {};

  // Offset of a row, counted in the order of a dense tensor.
  int64_t offset(const RowLayout& layout, int64_t row) const {
    int64_t sum = 0;
    for (int axis = 0; axis < layout.outer; ++axis) {
      sum += (axis + 1 < layout.outer ? row % layout.outer_size[axis] : row) * outer[axis];
      row /= layout.outer_size[axis];
    }
    return sum;
  }
};

struct NamedStream {
  const View* view;
  const char* name;
  int64_t stacks;  // expected size of the leading axis
  Stream* stream;
};

// Checks that all tensors (None is left out, but for the first) have the dtype and trailing shape of the first, fills
// their streams and returns the layout they share. Axes that follow each other in the memory of every tensor become
// one. `last_axis`: a row is the last axis, which must be dense; otherwise rows are as long as the strides allow.
RowLayout shared_layout(std::initializer_list<NamedStream> tensors, bool last_axis);

}  // namespace aajr
