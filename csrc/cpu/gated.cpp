// Gated products of stacked tensors: h = f(g)u, ḣ = f'ġu + fu̇, and backwards ḡ = f'(h̄u + Σ ḣ̄u̇) + f''u Σ ḣ̄ġ, ġ̄ = ḣ̄uf',
// ū = h̄f + f' Σ ḣ̄ġ, u̇̄ = ḣ̄f. Each direction reads and writes every stream once.
#include "activation_functions.h"
#include "elementwise.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

// `Plain`: one tangent on both sides, everything wanted, no tail; otherwise the fields of `p` decide.
template <class F, class T>
struct ForwardStep {
  template <bool Plain>
  static AAJR_INLINE void run(const Gated& p, T* const* at, int64_t i, int64_t n) {
    const int64_t k_count = Plain ? 1 : p.tangents, left = Plain ? Group<T>::size : n - i;
    const bool gate_moves = Plain || p.gate_moves, up_moves = Plain || p.up_moves;
    const T *g = at[0] + i, *u = at[1] + i;
    T* h = at[2] + i;
    Group<T> f, f1;
    first<F>(take(g, left), f, f1);
    const Group<T> up = take(u, left);
    give(h, f * up, left);
    f1 = f1 * up;
    for (int64_t k = 1; k <= k_count; ++k) {
      Group<T> tangent{};
      if (gate_moves) tangent = take(g + k * p.gate.stack, left) * f1;
      if (up_moves) tangent = tangent + take(u + k * p.up.stack, left) * f;
      give(h + k * p.h.stack, tangent, left);
    }
  }
};

template <class F, class T>
struct BackwardStep {
  template <bool Plain>
  static AAJR_INLINE void run(const Gated& p, T* const* at, int64_t i, int64_t n) {
    const int64_t k_count = Plain ? 1 : p.tangents, left = Plain ? Group<T>::size : n - i;
    const bool gate_moves = Plain || p.gate_moves, up_moves = Plain || p.up_moves;
    const T *g = at[0] + i, *u = at[1] + i, *h = at[2] + i;
    T *g_bar = at[3], *u_bar = at[4];
    const bool gate_wanted = Plain || g_bar, up_wanted = Plain || u_bar;
    Group<T> f, f1, f2;
    second<F>(take(g, left), f, f1, f2);
    const Group<T> up = take(u, left), cotangent = take(h, left), f1_up = f1 * up;
    Group<T> along_gate{}, along_up = cotangent * up;
    for (int64_t k = 1; k <= k_count; ++k) {
      const Group<T> tangent = take(h + k * p.h.stack, left);
      if (gate_moves) {
        along_gate = along_gate + tangent * take(g + k * p.gate.stack, left);
        if (gate_wanted) give(g_bar + i + k * p.gate_bar.stack, tangent * f1_up, left);
      }
      if (up_moves) {
        along_up = along_up + tangent * take(u + k * p.up.stack, left);
        if (up_wanted) give(u_bar + i + k * p.up_bar.stack, tangent * f, left);
      }
    }
    if (gate_wanted) give(g_bar + i, along_up * f1 + along_gate * (f2 * up), left);
    if (up_wanted) give(u_bar + i, cotangent * f + along_gate * f1, left);
  }
};

template <template <class, class> class Step, class F, class T>
void rows(const Gated& p) {
  const Stream* const streams[] = {&p.gate, &p.up, &p.h, &p.gate_bar, &p.up_bar};
  const bool forward = !p.gate_bar.data && !p.up_bar.data;
  const bool plain = p.tangents == 1 && p.gate_moves && p.up_moves && (forward || (p.gate_bar.data && p.up_bar.data));
  for_rows<T>(p.layout, streams, 1 + p.tangents, p.threads, [&](T* const(&at)[5], int64_t n) {
    int64_t i = 0;
    if (plain)
      for (; i + Group<T>::size <= n; i += Group<T>::size) Step<F, T>::template run<true>(p, at, i, n);
    for (; i < n; i += Group<T>::size) Step<F, T>::template run<false>(p, at, i, n);
  });
}

template <template <class, class> class Step, class F>
void with_dtype(const Gated& p) {
  switch (p.dtype) {
    case DType::f32: return rows<Step, F, float>(p);
    case DType::bf16: return rows<Step, F, bf16>(p);
    default: return rows<Step, F, f16>(p);
  }
}

template <template <class, class> class Step>
void with_kind(const Gated& p) {
  switch (p.kind) {
    case Activation::gelu: return with_dtype<Step, Gelu>(p);
    case Activation::gelu_tanh: return with_dtype<Step, GeluTanh>(p);
    default: return with_dtype<Step, Silu>(p);
  }
}

}  // namespace

const GatedKernels& gated_kernels() {
  static const GatedKernels kernels{with_kind<ForwardStep>, with_kind<BackwardStep>};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
