// Weights and biases: vectors of any of the three dtypes beside rows of another.
#pragma once

#include "../view.h"
#include "vector.h"

namespace aajr::cuda {

struct Parameter {
  const void* data = nullptr;
  DType dtype = DType::f32;

  // N elements from `column` on, of which `count` exist; `missing` where there is no vector. `Aligned`: as load's.
  // The branches are the same for all threads, and the vector stays in the caches.
  template <int N, bool Aligned>
  AAJR_DEVICE Pack<N> load(int64_t column, int64_t count, float missing, float offset = 0.0f) const {
    Pack<N> pack;
    if (data == nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.at[i] = missing;
      return pack;
    }
    if (dtype == DType::f32) pack = take<N, Aligned, float>(column, count);
    else if (dtype == DType::bf16) pack = take<N, Aligned, bf16>(column, count);
    else pack = take<N, Aligned, f16>(column, count);
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] += offset;
    return pack;
  }

 private:
  template <int N, bool Aligned, class P>
  AAJR_DEVICE Pack<N> take(int64_t column, int64_t count) const {
    constexpr int kOnce = N < kPack<P> ? N : kPack<P>;
    struct alignas(kOnce * sizeof(P)) Some {
      P at[kOnce];
    };
    const P* from = static_cast<const P*>(data) + column;
    Pack<N> pack;
    if constexpr (Aligned) {
#pragma unroll
      for (int j = 0; j < N / kOnce; ++j) {
        const Some some = reinterpret_cast<const Some*>(from)[j];
#pragma unroll
        for (int i = 0; i < kOnce; ++i) pack.at[j * kOnce + i] = widen(some.at[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.at[i] = i < count ? widen(from[i]) : 0.0f;
    }
    return pack;
  }
};

}  // namespace aajr::cuda
