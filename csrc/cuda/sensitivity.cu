// Which kernels a sensitivity takes, and how they are started.
#include "sensitivity.cuh"

#include "facts.h"
#include "launches.h"
#include "plan.h"

namespace aajr::cuda {
namespace {

// A block holds a tile of the logits and of a tangent in its registers.
template <class T>
constexpr int kPacks = static_cast<int>(kTile / kMostThreads / kPack<T>);

// Calls f(plan, softmax, packs, aligned) with the choices that are made at compile time.
template <class T, class F>
void with_plan(const Sensitivity& p, bool aligned, F&& f) {
  constexpr int most = kPacks<T>;
  const Plan plan = plan_for<T, most>(p.tiles.width, aligned);
  if (p.metric != Metric::squares)
    return with_packs<most>(plan, aligned, [&](auto packs, auto whole) { f(plan, std::true_type{}, packs, whole); });
  // one pass over a row, which need not be held
  constexpr std::integral_constant<int, 0> none{};
  if (aligned) f(plan, std::false_type{}, none, std::true_type{});
  else f(plan, std::false_type{}, none, std::false_type{});
}

template <class T>
void tiles(const Sensitivity& p, bool aligned, LaunchStream stream) {
  with_plan<T>(p, aligned, [&](const Plan& plan, auto softmax, auto packs, auto whole) {
    constexpr auto kernel =
        sensitivity_tiles_kernel<decltype(softmax)::value, T, decltype(whole)::value, decltype(packs)::value>;
    launch<kMostThreads>(kernel,
           dim3(static_cast<unsigned>(p.rows * p.tiles.count)), plan.threads, 0, stream, p);
  });
  if (p.tiles.count == 1) return;
  constexpr int kThreads = 128;
  const dim3 blocks(static_cast<unsigned>((p.rows + kThreads - 1) / kThreads), static_cast<unsigned>(p.stacks - 1));
  launch<kMostThreads>(sensitivity_merge_kernel, blocks, kThreads, 0, stream, p);
}

}  // namespace

Tiles tiles_of(int64_t size) {
  const int64_t count = size > kTile ? (size + kTile - 1) / kTile : 1;
  // equal ones, that begin where sixteen bytes of any dtype do
  const int64_t width = (size + count - 1) / count;
  return {count, (width + kPack<bf16> - 1) / kPack<bf16> * kPack<bf16>};
}

void sensitivity_forward(const Sensitivity& p, bool aligned, LaunchStream stream) {
  with_dtype(p.dtype, [&](auto tag) { tiles<decltype(tag)>(p, aligned, stream); });
}

void sensitivity_backward(const Sensitivity& p, bool aligned, LaunchStream stream) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p.metric != Metric::squares && p.stacks > 1) tiles<T>(p, aligned, stream);
    with_plan<T>(p, aligned, [&](const Plan& plan, auto softmax, auto, auto whole) {
      launch<kMostThreads>(sensitivity_bwd_kernel<decltype(softmax)::value, T, decltype(whole)::value>,
             dim3(static_cast<unsigned>(p.rows * p.tiles.count)), plan.threads, 0, stream, p);
    });
  });
}

}  // namespace aajr::cuda
