// Pointwise activations of stacked tensors: y = f(x), ẏ = f'(x)ẋ, and backwards x̄ = ȳf' + Σ ẏ̄ f''ẋ, ẋ̄ = ẏ̄f'.
#include "activation_functions.h"
#include "elementwise.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

// K is the number of tangents where it is known, else 0; `Whole` excludes the tail.
template <class F, class T>
struct ForwardStep {
  template <int K, bool Whole>
  static AAJR_INLINE void run(const Pointwise& p, T* const* at, int64_t i, int64_t n) {
    const int64_t k_count = K ? K : p.tangents, left = Whole ? Group<T>::size : n - i;
    const T* x = at[0] + i;
    T* y = at[1] + i;
    Group<T> f, f1;
    first<F>(take(x, left), f, f1);
    give(y, f, left);
    for (int64_t k = 1; k <= k_count; ++k) give(y + k * p.out.stack, take(x + k * p.x.stack, left) * f1, left);
  }
};

template <class F, class T>
struct BackwardStep {
  template <int K, bool Whole>
  static AAJR_INLINE void run(const Pointwise& p, T* const* at, int64_t i, int64_t n) {
    const int64_t k_count = K ? K : p.tangents, left = Whole ? Group<T>::size : n - i;
    const T *x = at[0] + i, *g = at[2] + i;
    T* out = at[1] + i;
    Group<T> f, f1, f2, along{};
    second<F>(take(x, left), f, f1, f2);
    for (int64_t k = 1; k <= k_count; ++k) {
      const Group<T> cotangent = take(g + k * p.y_bar.stack, left);
      along = along + cotangent * take(x + k * p.x.stack, left);
      give(out + k * p.out.stack, cotangent * f1, left);
    }
    give(out, take(g, left) * f1 + along * f2, left);
  }
};

template <template <class, class> class Step, class F, class T>
void rows(const Pointwise& p) {
  const Stream* const streams[] = {&p.x, &p.out, &p.y_bar};
  for_rows<T>(p.layout, streams, 1 + p.tangents, p.threads, [&](T* const(&at)[3], int64_t n) {
    int64_t i = 0;
    if (p.tangents == 1)
      for (; i + Group<T>::size <= n; i += Group<T>::size) Step<F, T>::template run<1, true>(p, at, i, n);
    for (; i < n; i += Group<T>::size) Step<F, T>::template run<0, false>(p, at, i, n);
  });
}

template <template <class, class> class Step, class F>
void with_dtype(const Pointwise& p) {
  switch (p.dtype) {
    case DType::f32: return rows<Step, F, float>(p);
    case DType::bf16: return rows<Step, F, bf16>(p);
    default: return rows<Step, F, f16>(p);
  }
}

template <template <class, class> class Step>
void with_kind(const Pointwise& p) {
  switch (p.kind) {
    case Activation::gelu: return with_dtype<Step, Gelu>(p);
    case Activation::gelu_tanh: return with_dtype<Step, GeluTanh>(p);
    case Activation::silu: return with_dtype<Step, Silu>(p);
    case Activation::quick_gelu: return with_dtype<Step, QuickGelu>(p);
    case Activation::relu: return with_dtype<Step, Relu>(p);
    case Activation::relu2: return with_dtype<Step, Relu2>(p);
    case Activation::tanh: return with_dtype<Step, TanhActivation>(p);
    default: return with_dtype<Step, SigmoidActivation>(p);
  }
}

}  // namespace

const PointwiseKernels& pointwise_kernels() {
  static const PointwiseKernels kernels{with_kind<ForwardStep>, with_kind<BackwardStep>};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
