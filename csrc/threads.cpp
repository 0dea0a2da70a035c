#include "threads.h"

#include <system_error>
#include <thread>
#include <vector>

namespace aajr {

void on_threads(int threads, void (*work)(void* context, int slot), void* context) {
  std::vector<std::thread> started;
  started.reserve(threads - 1);
  try {
    for (int slot = 1; slot < threads; ++slot) started.emplace_back(work, context, slot);
  } catch (const std::system_error&) {
    // the others take its share
  }
  work(context, 0);
  for (std::thread& thread : started) thread.join();
}

}  // namespace aajr
