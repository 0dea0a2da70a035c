// Axes of a view that count rows: leading axes merged wherever the strides allow it.
#pragma once

#include "view.h"

namespace aajr {

// At least one axis, so that a single row and one axis of rows are the same case.
struct Axes {
  int count = 1;
  int64_t size[kMaxDims] = {1};
  int64_t stride[kMaxDims] = {};
};

// The axes [first, last) of a view.
inline Axes axes_of(const View& v, int first, int last) {
  Axes a;
  int n = 0;
  for (int i = first; i < last; ++i) {
    if (v.size[i] == 1) continue;
    if (n > 0 && a.stride[n - 1] == v.size[i] * v.stride[i]) {
      a.size[n - 1] *= v.size[i], a.stride[n - 1] = v.stride[i];
    } else {
      a.size[n] = v.size[i], a.stride[n] = v.stride[i];
      ++n;
    }
  }
  if (n > 0) a.count = n;
  return a;
}

// How many rows the axes [first, last) count.
inline int64_t rows_of(const View& v, int first, int last) {
  int64_t rows = 1;
  for (int i = first; i < last; ++i)
    if (v.size[i] == 0) return 0;
  for (int i = first; i < last; ++i)
    if (__builtin_mul_overflow(rows, v.size[i], &rows)) fail("a tensor has more rows than can be counted.");
  return rows;
}

// Threads worth starting for so many elements: one costs about as much as 32768 of them take.
inline int threads_for(int threads, int64_t elements) {
  const int64_t most = 1 + elements / 32768;
  return most < threads ? static_cast<int>(most) : threads;
}

// Offset of row number `index` in elements. Internal linkage: kernel files compile it for different processors.
static inline __attribute__((always_inline)) int64_t offset_of(const Axes& a, int64_t index) {
  int64_t offset = 0;
  for (int i = a.count - 1; i > 0; --i) {
    const int64_t above = index / a.size[i];
    offset += (index - above * a.size[i]) * a.stride[i];
    index = above;
  }
  return offset + index * a.stride[0];
}

}  // namespace aajr
