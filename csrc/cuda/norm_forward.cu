// Which kernel a norm takes forward, and how it is started.
#include "norm.cuh"

#include "launches.h"
#include "plan.h"

namespace aajr::cuda {
namespace {

// Packs of a thread: rows of 16,384 (float32: 8,192) elements are held in registers.
constexpr int kPacks = 4;

template <class T>
void forward(const NormForward& p, bool aligned, LaunchStream stream) {
  const Plan plan = plan_for<T, kPacks>(p.size, aligned);
  with_packs<kPacks>(plan, aligned, [&](auto packs, auto whole) {
    const dim3 blocks(static_cast<unsigned>(p.rows));
    launch<kMostThreads>(norm_fwd_kernel<T, decltype(whole)::value, decltype(packs)::value>, blocks, plan.threads, 0,
                         stream, p);
  });
}

}  // namespace

void norm_forward(const NormForward& p, bool aligned, LaunchStream stream) {
  with_dtype(p.dtype, [&](auto tag) { forward<decltype(tag)>(p, aligned, stream); });
}

}  // namespace aajr::cuda
