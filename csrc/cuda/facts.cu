#include "facts.h"

#include <sstream>

#include "portable.h"

#ifndef AAJR_CUDA_ARCHITECTURES
#define AAJR_CUDA_ARCHITECTURES ""
#endif

namespace aajr::cuda {

std::vector<std::string> architectures() {
  std::vector<std::string> found;
  std::istringstream list(AAJR_CUDA_ARCHITECTURES);
  for (std::string one; std::getline(list, one, ',');) found.push_back(one);
  return found;
}

#ifdef __CUDACC__
bool on_host() { return false; }
std::string toolkit() {
  return "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}
void run_backwards(bool) {}
#else
bool on_host() { return true; }
std::string toolkit() { return "none"; }
void run_backwards(bool backwards) { host::backwards = backwards; }
#endif

}  // namespace aajr::cuda
