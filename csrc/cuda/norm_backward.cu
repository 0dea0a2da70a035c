// Which kernel a norm takes backward, and how it is started.
#include "norm.cuh"

#include "columns.h"
#include "launches.h"
#include "plan.h"

namespace aajr::cuda {
namespace {

// Packs of a thread: rows of 4,096 elements are held in registers, four streams of them.
template <class T>
constexpr int kPacks = sizeof(T) == 4 ? 4 : 2;

template <class T>
void backward(const NormBackward& p, bool aligned, LaunchStream stream) {
  const Plan plan = plan_for<T, kPacks<T>, kNormBackwardThreads>(p.size, aligned);
  const bool shared = p.w_parts != nullptr || p.b_parts != nullptr;
  with_packs<kPacks<T>>(plan, aligned, [&](auto packs, auto whole) {
    const dim3 blocks(static_cast<unsigned>(shared ? p.parts : p.rows));
    launch<kNormBackwardThreads>(norm_bwd_kernel<T, decltype(whole)::value, decltype(packs)::value>, blocks,
                                 plan.threads, sizeof(Tangent) * (p.stacks - 1), stream, p);
  });
  if (p.w_bar != nullptr) sum_columns(p.w_parts, p.parts, p.size, p.w_bar, stream);
  if (p.b_bar != nullptr) sum_columns(p.b_parts, p.parts, p.size, p.b_bar, stream);
}

}  // namespace

void norm_backward(const NormBackward& p, bool aligned, LaunchStream stream) {
  with_dtype(p.dtype, [&](auto tag) { backward<decltype(tag)>(p, aligned, stream); });
}

}  // namespace aajr::cuda
