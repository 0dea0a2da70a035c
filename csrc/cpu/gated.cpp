// Gated products of stacked tensors: h = f(g)u, ḣ = f'ġu + fu̇, and backwards ḡ = f'(h̄u + Σ ḣ̄u̇) + f''u Σ ḣ̄ġ, ġ̄ = ḣ̄uf',
// ū = h̄f + f' Σ ḣ̄ġ, u̇̄ = ḣ̄f. Each direction reads and writes every stream once.
#include "activation_functions.h"
#include "elementwise.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

struct ForwardStep {
  static constexpr bool second = false;
  template <class T>
  static AAJR_INLINE void run(const Gated& p, T* const* at, const Values<T>& v, int64_t i, int64_t n) {
    const int64_t k_count = p.tangents, left = n - i;
    const bool gate_moves = p.gate_moves, up_moves = p.up_moves;
    const T *g = at[0] + i, *u = at[1] + i;
    T* h = at[2] + i;
    const Group<T> up = take(u, left), f = v.f, f1 = v.f1 * up;
    give(h, f * up, left);
    for (int64_t k = 1; k <= k_count; ++k) {
      Group<T> tangent{};
      if (gate_moves) tangent = take(g + k * p.gate.stack, left) * f1;
      if (up_moves) tangent = tangent + take(u + k * p.up.stack, left) * f;
      give(h + k * p.h.stack, tangent, left);
    }
  }
};

struct BackwardStep {
  static constexpr bool second = true;
  template <class T>
  static AAJR_INLINE void run(const Gated& p, T* const* at, const Values<T>& v, int64_t i, int64_t n) {
    const int64_t k_count = p.tangents, left = n - i;
    const bool gate_moves = p.gate_moves, up_moves = p.up_moves;
    const T *g = at[0] + i, *u = at[1] + i, *h = at[2] + i;
    T *g_bar = at[3], *u_bar = at[4];
    const bool gate_wanted = g_bar, up_wanted = u_bar;
    const Group<T> f = v.f, f1 = v.f1, f2 = v.f2;
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

template <class Step, class T>
void rows(const Gated& p, Evaluate evaluate) {
  const Stream* const streams[] = {&p.gate, &p.up, &p.h, &p.gate_bar, &p.up_bar};
  for_rows<T>(p.layout, streams, 1 + p.tangents, p.threads, [&](T* const(&at)[5], int64_t n) {
    for_groups(at[0], n, evaluate, [&](const Values<T>& v, int64_t i) { Step::run(p, at, v, i, n); });
  });
}

template <class Step>
Evaluate evaluation(Activation kind) {
  switch (kind) {
    case Activation::gelu: return evaluate_several<Gelu, Step::second>;
    case Activation::gelu_tanh: return evaluate_several<GeluTanh, Step::second>;
    default: return evaluate_several<Silu, Step::second>;
  }
}

template <class Step>
void with_dtype(const Gated& p) {
  const Evaluate evaluate = evaluation<Step>(p.kind);
  switch (p.dtype) {
    case DType::f32: return rows<Step, float>(p, evaluate);
    case DType::bf16: return rows<Step, bf16>(p, evaluate);
    default: return rows<Step, f16>(p, evaluate);
  }
}

}  // namespace

const GatedKernels& gated_kernels() {
  static const GatedKernels kernels{with_dtype<ForwardStep>, with_dtype<BackwardStep>};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
