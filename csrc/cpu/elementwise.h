// Shared by elementwise kernels: the loop over rows, and the group of elements that one step works on.
#pragma once

#include "activation.h"
#include "parallel.h"
#include "simd.h"

namespace aajr {
namespace AAJR_ARCH {

// The elements of one step, as vectors of float. bf16 comes in two vectors, the even and the odd elements: a shift and a
// mask separate them and put them together again, where the order of memory would cost permutations.
template <class T>
struct Group {
  static constexpr int count = 1, size = W;
  vf v[1];
};
template <>
struct Group<bf16> {
  static constexpr int count = 2, size = 2 * W;
  vf v[2];
};

template <class T>
AAJR_INLINE Group<T> operator*(Group<T> a, Group<T> b) {
  for (int i = 0; i < Group<T>::count; ++i) a.v[i] *= b.v[i];
  return a;
}
template <class T>
AAJR_INLINE Group<T> operator+(Group<T> a, Group<T> b) {
  for (int i = 0; i < Group<T>::count; ++i) a.v[i] += b.v[i];
  return a;
}

template <class T>
AAJR_INLINE Group<T> take_whole(const T* p) { return {{load(p)}}; }
AAJR_INLINE Group<bf16> take_whole(const bf16* p) {
  const vu bits = load_raw<vu>(p);
  return {{bit_cast<vf>(bits << 16), bit_cast<vf>(bits & 0xffff0000u)}};
}
template <class T>
AAJR_INLINE void give_whole(T* p, Group<T> x) { store(p, x.v[0]); }
// Round to nearest even in the upper half of the bits. Not for NaN, where the sum could overflow: those that arithmetic
// makes have their highest bit of the mantissa set, and survive being cut off.
AAJR_INLINE vu upper_half(vf x) {
  const vu bits = bit_cast<vu>(x);
  return bits + ((((bits >> 16) & 1u) + 0x7fffu) & bit_cast<vu>(x == x));
}
AAJR_INLINE void give_whole(bf16* p, Group<bf16> x) {
  const vu both = (upper_half(x.v[0]) >> 16) | (upper_half(x.v[1]) & 0xffff0000u);
  std::memcpy(p, &both, sizeof both);
}

// The first n elements of a group. The rare path is kept out of line: it is long, and used many times.
template <class T>
__attribute__((noinline)) Group<T> take_part(const T* p, int64_t n) {
  T buffer[Group<T>::size] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return take_whole(buffer);
}
template <class T>
__attribute__((noinline)) void give_part(T* p, Group<T> x, int64_t n) {
  T buffer[Group<T>::size];
  give_whole(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}
template <class T>
AAJR_INLINE Group<T> take(const T* p, int64_t n) { return n >= Group<T>::size ? take_whole(p) : take_part(p, n); }
template <class T>
AAJR_INLINE void give(T* p, Group<T> x, int64_t n) {
  if (n >= Group<T>::size)
    give_whole(p, x);
  else
    give_part(p, x, n);
}

// An activation on a group, and its derivatives up to the first or the second.
template <class T>
struct Values {
  Group<T> f, f1, f2;
};

// An activation F of activation_functions.h on several vectors. Called through a pointer, so that the loops over memory are
// compiled once per storage type and not for every activation too; several vectors hide what the call costs.
using Evaluate = void (*)(const vf* x, int count, vf* f, vf* f1, vf* f2);
template <class F, bool Second>
void evaluate_several(const vf* x, int count, vf* f, vf* f1, vf* f2) {
  for (int i = 0; i < count; ++i) {
    if (Second) F::second(x[i], f[i], f1[i], f2[i]);
    else F::first(x[i], f[i], f1[i]);
  }
}

// step(values, i) for the groups of x[0, n), the last of them partial.
template <class T, class Step>
AAJR_INLINE void for_groups(const T* x, int64_t n, Evaluate evaluate, const Step& step) {
  constexpr int several = 8, vectors = Group<T>::count, size = Group<T>::size;
  vf in[several], f[several], f1[several], f2[several];
  for (int64_t first = 0; first < n;) {
    int count = 0;
    for (int64_t i = first; count < several && i < n; i += size, count += vectors) {
      const Group<T> group = take(x + i, n - i);
      for (int j = 0; j < vectors; ++j) in[count + j] = group.v[j];
    }
    evaluate(in, count, f, f1, f2);
    for (int i = 0; i < count; i += vectors, first += size) {
      Values<T> values;
      for (int j = 0; j < vectors; ++j)
        values.f.v[j] = f[i + j], values.f1.v[j] = f1[i + j], values.f2.v[j] = f2[i + j];
      step(values, first);
    }
  }
}

// body(pointers, n) for every piece of a row, `pointers[i]` its first element in streams[i] (null where that is null).
// Pieces are whole rows or multiples of the vector length. Every thread has one contiguous share.
template <class T, int N, class Body>
inline void for_rows(const RowLayout& layout, const Stream* const (&streams)[N], int64_t stacks, int threads,
                     const Body& body) {
  constexpr int64_t piece = 2048, least = 1 << 14;  // elements; below the latter a second thread does not pay
  const int64_t per_row = (layout.size + piece - 1) / piece, units = layout.rows() * per_row;
  if (layout.rows() * layout.size * stacks < least) threads = 1;
  parallel_ranges(units, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t start = unit % per_row * piece;
      T* pointers[N];
      for (int i = 0; i < N; ++i)
        pointers[i] = streams[i]->data ? reinterpret_cast<T*>(streams[i]->data) + start +
                                             streams[i]->offset(layout, unit / per_row)
                                       : nullptr;
      const int64_t rest = layout.size - start;
      body(pointers, rest < piece ? rest : piece);
    }
  });
}

}  // namespace AAJR_ARCH
}  // namespace aajr
