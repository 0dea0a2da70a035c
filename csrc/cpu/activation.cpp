// Pointwise activations of stacked tensors: y = f(x), ẏ = f'(x)ẋ, and backwards x̄ = ȳf' + Σ ẏ̄ f''ẋ, ẋ̄ = ẏ̄f'.
#include "activation_functions.h"
#include "elementwise.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

struct ForwardStep {
  static constexpr bool second = false;
  template <class T>
  static AAJR_INLINE void run(const Pointwise& p, T* const* at, const Values<T>& v, int64_t i, int64_t n) {
    const int64_t k_count = p.tangents, left = n - i;
    const T* x = at[0] + i;
    T* y = at[1] + i;
    give(y, v.f, left);
    for (int64_t k = 1; k <= k_count; ++k) give(y + k * p.out.stack, take(x + k * p.x.stack, left) * v.f1, left);
  }
};

struct BackwardStep {
  static constexpr bool second = true;
  template <class T>
  static AAJR_INLINE void run(const Pointwise& p, T* const* at, const Values<T>& v, int64_t i, int64_t n) {
    const int64_t k_count = p.tangents, left = n - i;
    const T *x = at[0] + i, *g = at[2] + i;
    T* out = at[1] + i;
    Group<T> along{};
    for (int64_t k = 1; k <= k_count; ++k) {
      const Group<T> cotangent = take(g + k * p.y_bar.stack, left);
      along = along + cotangent * take(x + k * p.x.stack, left);
      give(out + k * p.out.stack, cotangent * v.f1, left);
    }
    give(out, take(g, left) * v.f1 + along * v.f2, left);
  }
};

template <class Step, class T>
void rows(const Pointwise& p, Evaluate evaluate) {
  const Stream* const streams[] = {&p.x, &p.out, &p.y_bar};
  for_rows<T>(p.layout, streams, 1 + p.tangents, p.threads, [&](T* const(&at)[3], int64_t n) {
    for_groups(at[0], n, evaluate, [&](const Values<T>& v, int64_t i) { Step::run(p, at, v, i, n); });
  });
}

template <class Step>
Evaluate evaluation(Activation kind) {
  switch (kind) {
    case Activation::gelu: return evaluate_several<Gelu, Step::second>;
    case Activation::gelu_tanh: return evaluate_several<GeluTanh, Step::second>;
    case Activation::silu: return evaluate_several<Silu, Step::second>;
    case Activation::quick_gelu: return evaluate_several<QuickGelu, Step::second>;
    case Activation::relu: return evaluate_several<Relu, Step::second>;
    case Activation::relu2: return evaluate_several<Relu2, Step::second>;
    case Activation::tanh: return evaluate_several<TanhActivation, Step::second>;
    default: return evaluate_several<SigmoidActivation, Step::second>;
  }
}

template <class Step>
void with_dtype(const Pointwise& p) {
  const Evaluate evaluate = evaluation<Step>(p.kind);
  switch (p.dtype) {
    case DType::f32: return rows<Step, float>(p, evaluate);
    case DType::bf16: return rows<Step, bf16>(p, evaluate);
    default: return rows<Step, f16>(p, evaluate);
  }
}

}  // namespace

const PointwiseKernels& pointwise_kernels() {
  static const PointwiseKernels kernels{with_dtype<ForwardStep>, with_dtype<BackwardStep>};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
