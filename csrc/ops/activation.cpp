#include "../cpu/activation.h"

#include "../dispatch.h"
#include "../registry.h"

namespace aajr {
namespace {

bool nothing_to_do(const RowLayout& layout) { return layout.rows() == 0 || layout.size == 0; }

Activation kind_of(int64_t code, bool gate) {
  const auto kind = static_cast<Activation>(code);
  const bool known = gate ? kind == Activation::gelu || kind == Activation::gelu_tanh || kind == Activation::silu
                          : code >= 0 && code < static_cast<int64_t>(Activation::count);
  if (!known) fail("kind must be the code of an activation" + std::string(gate ? " that gates." : "."));
  return kind;
}

int64_t stacks_of(const View& v, const char* name) {
  if (v.dim < 1 || v.size[0] < 1) fail(std::string(name) + " must be stacked: [1 + K, ...].");
  return v.size[0];
}

Pointwise pointwise(const Args& a, bool backward) {
  check_count(a, backward ? 3 : 2, 1, 0);
  const View &x = a.tensors[0], &out = a.tensors[backward ? 2 : 1];
  Pointwise p{};
  p.kind = kind_of(a.ints[0], false);
  const int64_t stacks = stacks_of(x, "x");
  p.layout = shared_layout({{&x, "x", stacks, &p.x},
                            {&out, backward ? "x_bar" : "y", stacks, &p.out},
                            {backward ? &a.tensors[1] : &x, "y_bar", stacks, &p.y_bar}},
                           false);
  if (!out || !a.tensors[1]) fail("outputs and cotangents must not be None.");
  p.dtype = x.dtype, p.tangents = stacks - 1, p.threads = a.threads;
  return p;
}

void pointwise_fwd(const Args& a) {
  const Pointwise p = pointwise(a, false);
  if (!nothing_to_do(p.layout)) AAJR_SELECT(pointwise_kernels).forward(p);
}

void pointwise_bwd(const Args& a) {
  const Pointwise p = pointwise(a, true);
  if (!nothing_to_do(p.layout)) AAJR_SELECT(pointwise_kernels).backward(p);
}

Gated gated(const Args& a, bool backward) {
  check_count(a, backward ? 5 : 3, 1, 0);
  const View &gate = a.tensors[0], &up = a.tensors[1], &h = a.tensors[2];
  Gated p{};
  p.kind = kind_of(a.ints[0], true);
  const int64_t gates = stacks_of(gate, "gate"), ups = stacks_of(up, "up"), stacks = gates > ups ? gates : ups;
  if (gates != ups && gates != 1 && ups != 1)
    fail("gate and up must have the same number of tangents, or one of them none.");
  const char* h_name = backward ? "h_bar" : "h";
  const View none;
  p.layout = shared_layout({{&h, h_name, stacks, &p.h},
                            {&gate, "gate", gates, &p.gate},
                            {&up, "up", ups, &p.up},
                            {backward ? &a.tensors[3] : &none, "gate_bar", gates, &p.gate_bar},
                            {backward ? &a.tensors[4] : &none, "up_bar", ups, &p.up_bar}},
                           false);
  p.dtype = h.dtype, p.tangents = stacks - 1, p.threads = a.threads;
  p.gate_moves = gates > 1, p.up_moves = ups > 1;
  return p;
}

void gated_fwd(const Args& a) {
  const Gated p = gated(a, false);
  if (!nothing_to_do(p.layout)) AAJR_SELECT(gated_kernels).forward(p);
}

void gated_bwd(const Args& a) {
  const Gated p = gated(a, true);
  const bool wanted = p.gate_bar.data || p.up_bar.data;
  if (wanted && !nothing_to_do(p.layout)) AAJR_SELECT(gated_kernels).backward(p);
}

const Register registered[] = {
    {"pointwise_fwd", "tensors: x, y; ints: kind", pointwise_fwd},
    {"pointwise_bwd", "tensors: x, y_bar, x_bar; ints: kind", pointwise_bwd},
    {"gated_fwd", "tensors: gate, up, h; ints: kind", gated_fwd},
    {"gated_bwd", "tensors: gate, up, h_bar, gate_bar|None, up_bar|None; ints: kind", gated_bwd},
};

}  // namespace
}  // namespace aajr
