#include "../cpu/sensitivity.h"

#include "../dispatch.h"
#include "../registry.h"

namespace aajr {
namespace {

int64_t stacks_of(const View& v, const char* name) {
  if (v.dim < 2 || v.size[0] < 1) fail(std::string(name) + " must be stacked: [1 + K, ..., size].");
  return v.size[0];
}

Sensitivity sensitivity(const Args& a, bool backward) {
  check_count(a, backward ? 3 : 2, 1, 0);
  const View &y = a.tensors[0], &q = a.tensors[1];
  const char* q_name = backward ? "q_bar" : "q";
  Sensitivity p{};
  const int64_t stacks = stacks_of(y, "y");
  if (a.ints[0] < 0 || a.ints[0] >= static_cast<int64_t>(RowMetric::count)) fail("metric must be the code of a metric.");
  p.metric = static_cast<RowMetric>(a.ints[0]);
  p.layout = shared_layout({{&y, "y", stacks, &p.y}, {backward ? &a.tensors[2] : &y, "y_bar", stacks, &p.y_bar}}, true);
  if (backward && !a.tensors[2]) fail("y_bar must not be None.");
  if (p.metric != RowMetric::squares && p.layout.size == 0) fail("y must have a last axis with elements.");
  p.dtype = y.dtype, p.tangents = stacks - 1, p.threads = a.threads;
  check_shape(q, q_name, {p.tangents, p.layout.rows()});
  check_dtype(q, q_name, DType::f32);
  check_contiguous(q, q_name);
  if (backward)
    p.q_bar = q.as<float>();
  else
    p.q = q.as<float>();
  return p;
}

void sensitivity_fwd(const Args& a) {
  const Sensitivity p = sensitivity(a, false);
  if (p.layout.rows() > 0) AAJR_SELECT(sensitivity_kernels).sensitivity_forward(p);
}

void sensitivity_bwd(const Args& a) {
  const Sensitivity p = sensitivity(a, true);
  if (p.layout.rows() > 0) AAJR_SELECT(sensitivity_kernels).sensitivity_backward(p);
}

Softmax softmax(const Args& a, bool backward) {
  check_count(a, backward ? 3 : 2, 0, 0);
  const View &x = a.tensors[0], &y = a.tensors[1];
  Softmax p{};
  const int64_t stacks = stacks_of(x, "x");
  p.layout = shared_layout({{&x, "x", stacks, &p.x},
                            {&y, backward ? "y_bar" : "y", stacks, &p.y},
                            {backward ? &a.tensors[2] : &x, "x_bar", stacks, &p.x_bar}},
                           true);
  if (!y || (backward && !a.tensors[2])) fail("outputs and cotangents must not be None.");
  p.dtype = x.dtype, p.tangents = stacks - 1, p.threads = a.threads;
  return p;
}

void softmax_fwd(const Args& a) {
  const Softmax p = softmax(a, false);
  if (p.layout.rows() > 0 && p.layout.size > 0) AAJR_SELECT(sensitivity_kernels).softmax_forward(p);
}

void softmax_bwd(const Args& a) {
  const Softmax p = softmax(a, true);
  if (p.layout.rows() > 0 && p.layout.size > 0) AAJR_SELECT(sensitivity_kernels).softmax_backward(p);
}

const Register registered[] = {
    {"sensitivity_fwd", "tensors: y, q; ints: metric (0 l2 and logits, 1 fisher, 2 probs)", sensitivity_fwd},
    {"sensitivity_bwd", "tensors: y, q_bar, y_bar; ints: metric", sensitivity_bwd},
    {"softmax_fwd", "tensors: x, y", softmax_fwd},
    {"softmax_bwd", "tensors: x, y_bar, x_bar", softmax_bwd},
};

}  // namespace
}  // namespace aajr
