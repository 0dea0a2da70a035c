// Rows of stacked tensors with any strides.
#pragma once

#include "../layout.h"
#include "portable.h"

namespace aajr::cuda {

constexpr int kMostAxes = kMaxDims;

// The batch axes, outermost first, as few as the strides of all tensors of a call allow; strides count elements.
struct Shape {
  int axes = 1;
  int64_t size[kMostAxes] = {1};
};

struct Strides {
  int64_t stack = 0;
  int64_t axis[kMostAxes] = {};
};

// csrc/layout.h has the innermost axis first.
inline Shape shape_of(const RowLayout& layout) {
  Shape shape;
  shape.axes = layout.outer > 0 ? layout.outer : 1;
  for (int a = 0; a < layout.outer; ++a) shape.size[a] = layout.outer_size[layout.outer - 1 - a];
  return shape;
}

inline Strides strides_of(const RowLayout& layout, const Stream& stream) {
  Strides strides;
  strides.stack = stream.stack;
  for (int a = 0; a < layout.outer; ++a) strides.axis[a] = stream.outer[layout.outer - 1 - a];
  return strides;
}

// Rows are counted in 32 bits: a division of 64 is a call, for which registers go to memory. Offsets have 64.
AAJR_DEVICE int64_t offset_of(const Shape& shape, const Strides& strides, uint32_t row) {
  int64_t offset = 0;
  for (int a = shape.axes - 1; a > 0; --a) {
    const uint32_t size = static_cast<uint32_t>(shape.size[a]);
    offset += row % size * strides.axis[a];
    row /= size;
  }
  return offset + row * strides.axis[0];
}

}  // namespace aajr::cuda
