// Fibers for the threads of a block (see shim.h).
#include "shim.h"

#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define AAJR_FIBER_SWITCH(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define AAJR_FIBER_ARRIVED(save, bottom, size) __sanitizer_finish_switch_fiber(save, bottom, size)
#else
#define AAJR_FIBER_SWITCH(save, bottom, size) (void)0
#define AAJR_FIBER_ARRIVED(save, bottom, size) (void)0
#endif

namespace aajr::cuda::host {

Thread current;
void* dynamic = nullptr;
bool backwards = false;

namespace {

constexpr size_t kStack = 64 << 10;
// Limits of a launch on a device: a grid's axes, and shared memory beside that which kernels declare themselves.
constexpr unsigned kMostBlocks = 0x7fffffffu, kMostOthers = 65535;
constexpr size_t kSharedBytes = 48 << 10, kStaticBytes = 2 << 10;
constexpr int kLanes = 32;

enum class Waits { nothing, block, warp, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Waits waits = Waits::nothing;
  float given = 0.0f;
  const void* place = nullptr;  // of the barrier or exchange in the program
  void* fake = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  int running = 0;
  const std::function<void()>* body = nullptr;
  const void* bottom = nullptr;  // of the scheduler's own stack
  size_t size = 0;
  void* fake = nullptr;
};

Block* block = nullptr;

void leave(Waits waits, const void* place = nullptr) {
  Fiber& fiber = block->fibers[block->running];
  fiber.waits = waits;
  fiber.place = place;
  AAJR_FIBER_SWITCH(waits == Waits::done ? nullptr : &fiber.fake, block->bottom, block->size);
  swapcontext(&fiber.context, &block->scheduler);
  AAJR_FIBER_ARRIVED(fiber.fake, &block->bottom, &block->size);
}

void start() {
  AAJR_FIBER_ARRIVED(nullptr, &block->bottom, &block->size);
  (*block->body)();
  leave(Waits::done);
}

void enter(int number) {
  Fiber& fiber = block->fibers[number];
  block->running = number;
  fiber.waits = Waits::nothing;
  current.thread = dim3(static_cast<unsigned>(number));
  AAJR_FIBER_SWITCH(&block->fake, fiber.stack.get(), kStack);
  swapcontext(&block->scheduler, &fiber.context);
  AAJR_FIBER_ARRIVED(block->fake, nullptr, nullptr);
}

bool all(int first, int last, Waits waits) {
  for (int i = first; i < last; ++i)
    if (block->fibers[i].waits != waits) return false;
  return true;
}

void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start, 0);
}

// Has a warp run to the next barrier of its block, or to its end: as far ahead of the others as it can get.
void run_warp(int first) {
  const int last = first + kLanes;
  do {
    for (int i = 0; i < kLanes; ++i) enter(backwards ? last - 1 - i : first + i);
    for (int i = first; i < last; ++i)
      if (block->fibers[i].place != block->fibers[first].place)
        throw std::logic_error("lanes of a warp wait at different places of the program.");
  } while (all(first, last, Waits::warp));
}

void run_block(int threads) {
  do {
    for (int first = 0; first < threads; first += kLanes) run_warp(backwards ? threads - kLanes - first : first);
  } while (all(0, threads, Waits::block));
  if (!all(0, threads, Waits::done))
    throw std::logic_error("some threads of a block wait at a barrier that others do not reach.");
}

}  // namespace

void sync_block() { leave(Waits::block, __builtin_return_address(0)); }

float exchange(float value, int mask) {
  const int me = block->running;
  block->fibers[me].given = value;
  leave(Waits::warp, __builtin_return_address(0));
  const float taken = block->fibers[me ^ mask].given;
  leave(Waits::warp);  // no thread brings the next number before all have taken this one
  return taken;
}

void run(dim3 blocks, int threads, size_t dynamic_bytes, const std::function<void()>& body) {
  if (threads < 1 || threads % kLanes) throw std::logic_error("a block must have whole warps.");
  if (blocks.x < 1 || blocks.y < 1 || blocks.z < 1) throw std::logic_error("a grid must have blocks.");
  if (blocks.x > kMostBlocks || blocks.y > kMostOthers || blocks.z > kMostOthers)
    throw std::logic_error("a grid has more blocks than a device takes.");
  if (dynamic_bytes + kStaticBytes > kSharedBytes) throw std::logic_error("a block asks for more memory than there is.");
  const std::unique_ptr<char[]> memory(new char[dynamic_bytes]);
  dynamic = memory.get();
  Block here;
  here.fibers.resize(threads);
  here.body = &body;
  block = &here;
  current.threads = dim3(threads);
  current.blocks = blocks;
  const uint64_t all = static_cast<uint64_t>(blocks.x) * blocks.y * blocks.z;
  for (uint64_t i = 0; i < all; ++i) {
    current.block = dim3(static_cast<unsigned>(i % blocks.x), static_cast<unsigned>(i / blocks.x % blocks.y),
                         static_cast<unsigned>(i / blocks.x / blocks.y));
    for (Fiber& fiber : here.fibers) prepare(fiber);
    run_block(threads);
  }
  block = nullptr;
  dynamic = nullptr;
}

}  // namespace aajr::cuda::host
