#include "scratch.h"

#include <cstdlib>
#include <mutex>
#include <new>

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

size_t rounded(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

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
  void* fresh = std::aligned_alloc(4096, bytes);
  if (fresh == nullptr) throw std::bad_alloc();
  return fresh;
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
