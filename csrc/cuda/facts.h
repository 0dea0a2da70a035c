// Facts of a build of the CUDA module.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace aajr::cuda {

bool on_host();
// such as "80", "120-virtual", in the words of CMAKE_CUDA_ARCHITECTURES
std::vector<std::string> architectures();
std::string toolkit();
// on the host: in which order the threads of a block run between barriers
void run_backwards(bool backwards);
// elements of the tiles that a row of a sensitivity is cut into, at most
constexpr int64_t kTile = 8192;

}  // namespace aajr::cuda
