// Starting a kernel, and the errors of the runtime as exceptions.
#pragma once

#include <stdexcept>
#include <string>

#include "portable.h"

namespace aajr::cuda {

inline void check_threads(int threads, int most) {
  if (threads > most)
    throw std::logic_error("a kernel for " + std::to_string(most) + " threads was started with " + std::to_string(threads) + ".");
}

#ifdef __CUDACC__
using LaunchStream = cudaStream_t;

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + ".");
}

// Makes a device current for a block of code.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    int count = 0;
    check(cudaGetDeviceCount(&count), "counting the CUDA devices");
    if (device < 0 || device >= count)
      throw std::invalid_argument("there is no CUDA device " + std::to_string(device) + ", only " +
                                  std::to_string(count) + ".");
    check(cudaGetDevice(&before_), "asking for the current device");
    if (before_ != device) check(cudaSetDevice(device), "choosing the device");
    device_ = device;
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0, device_ = 0;
};

// `Threads`: the bound that the kernel was compiled with, AAJR_GLOBAL's.
template <int Threads, class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, int threads, size_t shared, LaunchStream stream, const A&... arguments) {
  check_threads(threads, Threads);
  kernel<<<blocks, threads, shared, stream>>>(arguments...);
  check(cudaGetLastError(), "starting a kernel");
}
#else
using LaunchStream = void*;

class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (device != 0) throw std::invalid_argument("there is no device " + std::to_string(device) + " on the host, only 0.");
  }
};

template <int Threads, class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, int threads, size_t shared, LaunchStream, const A&... arguments) {
  check_threads(threads, Threads);
  host::run(blocks, threads, shared, [&] { kernel(arguments...); });
}
#endif

}  // namespace aajr::cuda
