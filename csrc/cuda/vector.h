// Sixteen bytes of a row at a time, as float32.
#pragma once

#include "portable.h"

namespace aajr::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

AAJR_DEVICE float widen(float x) { return x; }
AAJR_DEVICE float widen(bf16 x) { return __bfloat162float(x); }
AAJR_DEVICE float widen(f16 x) { return __half2float(x); }
AAJR_DEVICE void narrow(float x, float* out) { *out = x; }
AAJR_DEVICE void narrow(float x, bf16* out) { *out = __float2bfloat16_rn(x); }
AAJR_DEVICE void narrow(float x, f16* out) { *out = __float2half_rn(x); }

constexpr int kPackBytes = 16;

template <class T>
constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));

// As many consecutive elements of a row as sixteen bytes of T hold.
template <int N>
struct Pack {
  float at[N];
};

// The same as it lies in memory.
template <class T>
struct alignas(kPackBytes) Raw {
  T at[kPack<T>];
};

template <class T>
AAJR_DEVICE Raw<T> load_raw(const T* from) {
  return *reinterpret_cast<const Raw<T>*>(from);
}

template <class T>
AAJR_DEVICE Pack<kPack<T>> widen(const Raw<T>& raw) {
  Pack<kPack<T>> pack;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) pack.at[i] = widen(raw.at[i]);
  return pack;
}

// `count` elements from `from` on; what lies past them is zero. `Aligned`: the sixteen bytes are, and all are there.
template <bool Aligned, class T>
AAJR_DEVICE Pack<kPack<T>> load(const T* from, int64_t count) {
  if constexpr (Aligned) {
    return widen(load_raw(from));
  } else {
    Pack<kPack<T>> pack;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.at[i] = i < count ? widen(from[i]) : 0.0f;
    return pack;
  }
}

template <bool Aligned, class T>
AAJR_DEVICE void store(T* to, const Pack<kPack<T>>& pack, int64_t count) {
  if constexpr (Aligned) {
    Raw<T> raw;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) narrow(pack.at[i], &raw.at[i]);
    *reinterpret_cast<Raw<T>*>(to) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i)
      if (i < count) narrow(pack.at[i], to + i);
  }
}

}  // namespace aajr::cuda
