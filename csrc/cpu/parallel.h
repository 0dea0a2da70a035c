// Parallel loops and scratch memory of the kernel files. Results never depend on which thread ran what: a loop body
// writes only what belongs to its index, and sums over indices are taken afterwards in the order of the indices.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>

#include "../scratch.h"

#if defined(_OPENMP)
#include <omp.h>
#else
#include <atomic>

#include "../threads.h"
#endif

namespace aajr {
namespace AAJR_ARCH {

// body(index, slot) for every index in [0, n); indices are handed out one by one in ascending order (put the longest
// first). slot < threads tells which scratch memory is free; nothing else may depend on it.
template <class Body>
inline void parallel_dynamic(int64_t n, int threads, const Body& body) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i, 0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
#else
  struct Shared {
    const Body& body;
    const int64_t n;
    std::atomic<int64_t> next{0};
  } shared{body, n};
  on_threads(
      threads,
      [](void* context, int slot) {
        Shared& all = *static_cast<Shared*>(context);
        for (int64_t i; (i = all.next.fetch_add(1)) < all.n;) all.body(i, slot);
      },
      &shared);
#endif
}

// body(first, last, part) for `parts` contiguous shares of [0, n), parts <= threads; a share may be empty only if n is
// smaller than parts. The shares depend only on n and the thread count.
template <class Body>
inline void parallel_ranges(int64_t n, int threads, const Body& body) {
  const int64_t parts = threads > n ? (n > 0 ? n : 1) : threads;
  parallel_dynamic(parts, threads, [&](int64_t part, int) {
    body(n * part / parts, n * (part + 1) / parts, static_cast<int>(part));
  });
}

// Uninitialised memory aligned to cache lines. Allocate outside of parallel regions: exceptions must not leave one.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(static_cast<size_t>(count) * sizeof(T)), memory_(static_cast<T*>(take_scratch(bytes_))) {}
  ~Scratch() { give_scratch(memory_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return memory_; }
  T& operator[](int64_t i) const { return memory_[i]; }

 private:
  size_t bytes_;
  T* memory_;
};

}  // namespace AAJR_ARCH
}  // namespace aajr
