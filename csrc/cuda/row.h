// One row of a stacked tensor, in the hands of a block: a thread has every blockDim-th pack of sixteen bytes.
//
// `Packs` > 0: all packs of a thread stay in registers, and memory is read once. `Packs` = 0: the row is longer than that,
// or not aligned to sixteen bytes, and every pass reads it again, from the caches as a rule.
#pragma once

#include "vector.h"

namespace aajr::cuda {

// Where a thread's pack `j` begins.
template <class T>
AAJR_DEVICE int64_t column_of(int64_t j) {
  return (j * blockDim.x + threadIdx.x) * kPack<T>;
}

// Calls f(j, column, count) for the packs of this thread in a row of `size` elements.
template <class T, int Packs, class F>
AAJR_DEVICE void for_packs(int64_t size, F&& f) {
  if constexpr (Packs > 0) {
#pragma unroll
    for (int j = 0; j < Packs; ++j) {
      const int64_t column = column_of<T>(j);
      if (column < size) f(j, column, size - column);
    }
  } else {
    for (int64_t column = column_of<T>(0); column < size; column += static_cast<int64_t>(blockDim.x) * kPack<T>)
      f(0, column, size - column);
  }
}

// `Packs` > 0 goes with `Aligned`. What is held is held in the dtype of the row, which takes the fewest registers.
template <class T, bool Aligned, int Packs>
class Row {
  static_assert(Aligned || Packs == 0);

 public:
  AAJR_DEVICE void read(const T* from, int64_t size) {
    from_ = from;
    if constexpr (Packs > 0)
      for_packs<T, Packs>(size, [&](int j, int64_t column, int64_t) { held_[j] = load_raw(from + column); });
  }
  AAJR_DEVICE Pack<kPack<T>> get(int j, int64_t column, int64_t count) const {
    if constexpr (Packs > 0) return widen(held_[j]);
    else return load<Aligned>(from_ + column, count);
  }

 private:
  const T* from_ = nullptr;
  Raw<T> held_[Packs > 0 ? Packs : 1];
};

}  // namespace aajr::cuda
