// Launches that entries.cu starts.
#pragma once

#include <type_traits>

#include "launch.h"
#include "norm.h"
#include "sensitivity.h"

namespace aajr::cuda {

// Calls f with a value of the type that a dtype stands for.
template <class F>
void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::f32) f(float{});
  else if (dtype == DType::bf16) f(bf16{});
  else f(f16{});
}

// `aligned`: every row of every tensor begins at a multiple of sixteen bytes and is a whole number of packs long.
void norm_forward(const NormForward& p, bool aligned, LaunchStream stream);
void norm_backward(const NormBackward& p, bool aligned, LaunchStream stream);
// How many tiles a row has, and their width.
Tiles tiles_of(int64_t size);
void sensitivity_forward(const Sensitivity& p, bool aligned, LaunchStream stream);
void sensitivity_backward(const Sensitivity& p, bool aligned, LaunchStream stream);

}  // namespace aajr::cuda
