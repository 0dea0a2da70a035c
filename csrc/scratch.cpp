#include "scratch.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace aajr {
namespace {

constexpr size_t kKept = size_t{48} << 20;  // bytes in the pool at most
constexpr int kBlocks = 8;

struct Pool {
  std::mutex mutex;
  void* block[kBlocks] = {};
  size_t bytes[kBlocks] = {};
  size_t total = 0;
};

Pool& pool() {
  static Pool* const it = new Pool;  // never destroyed: other threads may still run at exit
  return *it;
}

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;

size_t rounded(size_t bytes) {
  const size_t step = bytes >= kHugePage / 2 ? kHugePage : kPage;
  return (bytes + step - 1) / step * step;
}

// Large blocks ask for large pages: the kernels walk megabytes in strides, and small pages exceed what the processor
// remembers of the page table.
void* allocate(size_t bytes) {
  const bool huge = bytes % kHugePage == 0;
  void* block = std::aligned_alloc(huge ? kHugePage : kPage, bytes);
  if (huge && block != nullptr) prefer_large_pages(block, bytes);
  return block;
}

}  // namespace

void* take_scratch(size_t bytes) {
  bytes = rounded(bytes ? bytes : 1);
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    for (int i = 0; i < kBlocks; ++i)
      if (p.block[i] != nullptr && p.bytes[i] == bytes) {
        void* found = p.block[i];
        p.block[i] = nullptr;
        p.total -= bytes;
        return found;
      }
  }
  void* fresh = allocate(bytes);
  if (fresh == nullptr) throw std::bad_alloc();
  return fresh;
}

void prefer_large_pages(void* memory, size_t bytes) noexcept {
#if defined(__linux__)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

void give_scratch(void* block, size_t bytes) noexcept {
  bytes = rounded(bytes ? bytes : 1);
  Pool& p = pool();
  void* old[kBlocks];
  int count = 0;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    int place = -1;
    if (bytes <= kKept) {
      // what was kept for other sizes makes room
      for (int i = 0; i < kBlocks && p.total + bytes > kKept; ++i)
        if (p.block[i] != nullptr) {
          p.total -= p.bytes[i];
          old[count++] = p.block[i];
          p.block[i] = nullptr;
        }
      for (int i = 0; i < kBlocks && place < 0; ++i)
        if (p.block[i] == nullptr) place = i;
      if (place < 0) {
        place = 0;
        p.total -= p.bytes[0];
        old[count++] = p.block[0];
      }
      p.block[place] = block;
      p.bytes[place] = bytes;
      p.total += bytes;
    } else {
      old[count++] = block;
    }
  }
  for (int i = 0; i < count; ++i) std::free(old[i]);
}

}  // namespace aajr
