#include "../cpu/head.h"

#include "../dispatch.h"
#include "../registry.h"

namespace aajr {
namespace {

// tensors: h, weight, bias|None, labels|None; ints: metric, ignore; floats: scale, cap (0 for none)
void read_input(const Args& a, HeadInput& p) {
  const View &h = a.tensors[0], &weight = a.tensors[1], &bias = a.tensors[2], &labels = a.tensors[3];
  for (const View* v : {&h, &weight, &bias}) check_floating(*v, "h, weight and bias");
  if (h.dim != 3 || h.size[0] < 1) fail("h must be [1 + K, tokens, size].");
  check_last_stride(h, "h");
  if (weight.dim != 2 || weight.size[0] < 1 || weight.size[0] > INT32_MAX)
    fail("weight must be [V, size] with 0 < V < 2^31.");
  check_shape(weight, "weight", {weight.size[0], h.size[2]});
  check_dtype(weight, "weight", h.dtype);
  check_last_stride(weight, "weight");
  if (bias) {
    check_shape(bias, "bias", {weight.size[0]});
    check_dtype(bias, "bias", h.dtype);
    check_contiguous(bias, "bias");
  }
  if (labels) {
    check_shape(labels, "labels", {h.size[1]});
    check_dtype(labels, "labels", DType::i64);
    check_contiguous(labels, "labels");
  }
  if (a.ints[0] < 0 || a.ints[0] > 3) fail("metric must be 0 (l2), 1 (logits), 2 (fisher) or 3 (probs).");
  p.dtype = h.dtype;
  p.stacks = h.size[0], p.tokens = h.size[1], p.size = h.size[2], p.words = weight.size[0];
  p.h = h.data, p.h_stack = h.stride[0], p.h_row = h.stride[1];
  p.weight = weight.data, p.w_row = weight.stride[0];
  p.bias = bias.data, p.labels = labels ? labels.as<int64_t>() : nullptr;
  p.metric = static_cast<Metric>(a.ints[0]), p.ignore = a.ints[1];
  p.scale = static_cast<float>(a.floats[0]), p.cap = static_cast<float>(a.floats[1]);
  p.threads = a.threads;
}

// Where the logits are kept between forward and backward of a few tokens; soft-capped logits cannot be.
void read_kept(const View& kept, HeadInput& p) {
  if (!kept) return;
  check_dtype(kept, "kept", DType::f32);
  check_contiguous(kept, "kept");
  if (p.cap > 0.0f) fail("kept logits have no cap.");
  const int64_t needed = AAJR_SELECT(head_kernels).kept_size(p);
  if (kept.numel() < needed || kept.numel() == 0)
    fail("kept must have at least " + std::to_string(needed) + " elements, got " + std::to_string(kept.numel()) + ".");
  p.kept = kept.as<float>();
}

void check_output(const View& v, const char* name, DType dtype, std::initializer_list<int64_t> shape) {
  if (!v) return;
  check_shape(v, name, shape);
  check_dtype(v, name, dtype);
  check_contiguous(v, name);
}

void head_fwd(const Args& a) {
  check_count(a, 7, 2, 2);
  HeadForward p{};
  read_input(a, p);
  const View &stats = a.tensors[4], &nll = a.tensors[5];
  if (!stats) fail("stats is missing.");
  check_output(stats, "stats", DType::f32, {2 + 4 * (p.stacks - 1), p.tokens});
  check_output(nll, "nll", DType::f32, {p.tokens});
  if (static_cast<bool>(nll) != static_cast<bool>(a.tensors[3])) fail("nll and labels come together.");
  read_kept(a.tensors[6], p);
  p.stats = stats.as<float>(), p.nll = nll ? nll.as<float>() : nullptr;
  AAJR_SELECT(head_kernels).forward(p);
}

void head_bwd(const Args& a) {
  check_count(a, 11, 3, 2);
  HeadBackward p{};
  read_input(a, p);
  const View &stats = a.tensors[4], &q_bar = a.tensors[5], &nll_bar = a.tensors[6];
  const View &h_bar = a.tensors[7], &w_bar = a.tensors[8], &b_bar = a.tensors[9];
  if (!stats) fail("stats is missing.");
  check_output(stats, "stats", DType::f32, {2 + 4 * (p.stacks - 1), p.tokens});
  check_output(q_bar, "q_bar", DType::f32, {p.stacks - 1, p.tokens});
  check_output(nll_bar, "nll_bar", DType::f32, {p.tokens});
  check_output(h_bar, "h_bar", p.dtype, {p.stacks, p.tokens, p.size});
  check_output(w_bar, "w_bar", p.dtype, {p.words, p.size});
  check_output(b_bar, "b_bar", DType::f32, {p.words});
  read_kept(a.tensors[10], p);
  p.more = a.ints[2] != 0;
  if (p.more && p.dtype != DType::f32) fail("sums of several calls must be float32.");
  p.stats = stats.as<float>();
  p.q_bar = q_bar ? q_bar.as<float>() : nullptr, p.nll_bar = nll_bar ? nll_bar.as<float>() : nullptr;
  p.h_bar = h_bar.data, p.w_bar = w_bar.data, p.b_bar = b_bar.as<float>();
  AAJR_SELECT(head_kernels).backward(p);
}

const Register register_fwd("head_fwd",
                            "tensors: h, weight, bias|None, labels|None, stats, nll|None, kept|None; "
                            "ints: metric, ignore; floats: scale, cap (0 for none)",
                            head_fwd);
const Register register_bwd("head_bwd",
                            "tensors: h, weight, bias|None, labels|None, stats, q_bar|None, nll_bar|None, h_bar|None, "
                            "w_bar|None, b_bar|None, kept|None; ints: metric, ignore, more; "
                            "floats: scale, cap (0 for none)",
                            head_bwd);

}  // namespace
}  // namespace aajr
