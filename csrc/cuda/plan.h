// How a row is spread over the threads of a block.
#pragma once

#include <type_traits>

#include "block.h"
#include "vector.h"

namespace aajr::cuda {

// Threads of a block, and packs that each of them holds; 0 where a row does not fit into registers or is not aligned.
struct Plan {
  int threads, packs;
};

// `Most`: packs of a thread that its registers have room for, in blocks of up to `Threads`.
template <class T, int Most, int Threads = kMostThreads>
Plan plan_for(int64_t size, bool aligned) {
  const int64_t packs = size > 0 ? (size + kPack<T> - 1) / kPack<T> : 1;  // a block has threads
  const auto warps = [](int64_t threads) { return static_cast<int>((threads + kWarp - 1) / kWarp * kWarp); };
  if (!aligned || packs > Most * Threads) return {packs < Threads ? warps(packs) : Threads, 0};
  // several packs each rather than more threads: fewer warps wait for one another
  return packs <= 2 * kWarp ? Plan{warps(packs), 1} : Plan{warps((packs + Most - 1) / Most), Most};
}

// Calls f with the choices that are made at compile time: packs, and whether rows are aligned.
template <int Most, class F>
void with_packs(const Plan& plan, bool aligned, F&& f) {
  if (plan.packs == 1) f(std::integral_constant<int, 1>{}, std::true_type{});
  else if (plan.packs == Most) f(std::integral_constant<int, Most>{}, std::true_type{});
  else if (aligned) f(std::integral_constant<int, 0>{}, std::true_type{});
  else f(std::integral_constant<int, 0>{}, std::false_type{});
}

}  // namespace aajr::cuda
