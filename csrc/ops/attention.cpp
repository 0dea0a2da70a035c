#include "../cpu/attention.h"

#include <algorithm>

#include "../dispatch.h"
#include "../registry.h"

namespace aajr {
namespace {

Rows rows_of(const View& v, const char* name, DType dtype) {
  check_dtype(v, name, dtype);
  if (v.dim != 5) fail(std::string(name) + " must be [stacks, batch, heads, rows, features].");
  check_last_stride(v, name);
  return {v.data, v.stride[0], v.stride[1], v.stride[2], v.stride[3], static_cast<int>(v.size[0])};
}

int64_t stride_unless_one(const View& v, int axis) { return v.size[axis] == 1 ? 0 : v.stride[axis]; }

Mask mask_of(const View& v, const char* name, const AttentionProblem& p) {
  Mask m;
  if (!v) return m;
  if (v.dtype != DType::boolean) check_floating(v, name);
  if (v.dim != 5) fail(std::string(name) + " must be [stacks, B|1, H|1, N|1, M|1].");
  const int64_t full[] = {v.size[0], p.B, p.H, p.N, p.columns};
  for (int i = 1; i < 5; ++i)
    if (v.size[i] != 1 && v.size[i] != full[i]) fail(std::string(name) + " must broadcast to [stacks, B, H, N, M].");
  if (v.size[0] != 1 && (v.size[0] != 1 + p.K || v.dtype == DType::boolean))
    fail(std::string(name) + " must have 1 stack, or one for each tangent if it is a bias.");
  m.data = v.data, m.dtype = v.dtype, m.stacks = static_cast<int>(v.size[0]);
  m.stack = stride_unless_one(v, 0), m.batch = stride_unless_one(v, 1), m.head = stride_unless_one(v, 2);
  m.row = stride_unless_one(v, 3), m.col = stride_unless_one(v, 4);
  return m;
}

void check_stacks(const View& v, const char* name, int64_t k) {
  if (v.size[0] != 1 && v.size[0] != 1 + k)
    fail(std::string(name) + " must have 1 stack or one more than there are tangents.");
}

// cu_seqlens: ascending row offsets of the packed sequences, from 0 to the number of rows.
int64_t longest(const View& v, const char* name, int64_t rows) {
  check_dtype(v, name, DType::i64);
  check_contiguous(v, name);
  if (v.dim != 1 || v.size[0] < 1) fail(std::string(name) + " must be a vector with at least one offset.");
  const int64_t* at = v.as<int64_t>();
  int64_t most = 0;
  for (int64_t i = 0; i + 1 < v.size[0]; ++i) {
    if (at[i + 1] < at[i]) fail(std::string(name) + " must be ascending.");
    most = std::max(most, at[i + 1] - at[i]);
  }
  if (at[0] != 0 || at[v.size[0] - 1] != rows)
    fail(std::string(name) + " must begin with 0 and end with the number of rows, " + std::to_string(rows) + ".");
  return most;
}

// Tensors q, k, v, mask, q_start, k_start, shift, norm, mu, out; ints causal, offset, window, drops, align_right; floats
// scale, softcap, dropout. After the tensors of every call: keep where weights are dropped, then those of a context.
constexpr size_t kTensors = 10, kInts = 5, kFloats = 3;

// Where the tensors lie that not every call has; null: it has none.
struct Optional {
  const View *keep, *context;
};

// `tensors`: of every call; `of_context`: of a context.
Optional optional_of(const Args& a, size_t tensors, size_t of_context) {
  const bool drops = a.ints.size() == kInts && a.ints[3] != 0;
  const bool has_context = a.tensors.size() == tensors + drops + of_context;
  check_count(a, tensors + drops + has_context * of_context, kInts, kFloats);
  const View* const more = a.tensors.data() + tensors;
  return {drops ? more : nullptr, has_context ? more + drops : nullptr};
}

KeyPart part_of(const View& k, const View& v, const AttentionProblem& p) {
  KeyPart part{};
  part.k = rows_of(k, "k", p.dtype), part.v = rows_of(v, "v", p.dtype);
  part.rows = part.longest = k.size[3];
  return part;
}

// Two gradients of keys and values like `like`, each present or None.
void take_bars(KeyPart& part, const View* bars, const View* like, DType dtype) {
  Rows* const to[] = {&part.k_bar, &part.v_bar};
  const char* const names[] = {"k_bar", "v_bar"};
  for (int i = 0; i < 2; ++i) {
    const View &bar = bars[i], &x = like[i];
    if (!bar) continue;
    *to[i] = rows_of(bar, names[i], dtype);
    check_shape(bar, names[i], {x.size[0], x.size[1], x.size[2], x.size[3], x.size[4]});
  }
}

void fill(AttentionProblem& p, const Args& a, const Optional& optional) {
  const View &q = a.tensors[0], &k = a.tensors[1], &v = a.tensors[2], &out = a.tensors[9];
  check_floating(q, "q");
  p.dtype = q.dtype;
  p.q = rows_of(q, "q", p.dtype);
  KeyPart own = part_of(k, v, p);
  rows_of(out, "out", p.dtype);
  if (out.size[0] < 1 || out.size[0] > INT32_MAX) fail("out must have a stack, and fewer than 2^31.");
  p.K = static_cast<int>(out.size[0]) - 1;
  p.B = q.size[1], p.H = q.size[2], p.N = q.size[3], p.D = q.size[4];
  p.HK = k.size[2], p.V = v.size[4];
  check_stacks(q, "q", p.K), check_stacks(k, "k", p.K), check_stacks(v, "v", p.K);
  if (p.HK < 1 || p.H % p.HK) fail("the heads of q must be a multiple of those of k.");
  check_shape(k, "k", {k.size[0], p.B, p.HK, own.rows, p.D});
  check_shape(v, "v", {v.size[0], p.B, p.HK, own.rows, p.V});
  check_shape(out, "out", {1 + p.K, p.B, p.H, p.N, p.V});
  if (optional.context) {
    const View &context_k = optional.context[0], &context_v = optional.context[1];
    KeyPart& context = p.parts[p.part_count++] = part_of(context_k, context_v, p);
    check_shape(context_k, "context_k", {1, p.B, p.HK, context.rows, p.D});
    check_shape(context_v, "context_v", {1, p.B, p.HK, context.rows, p.V});
    own.before = context.rows;
  }
  p.columns = own.before + own.rows;
  p.parts[p.part_count++] = own;
  p.mask = mask_of(a.tensors[3], "mask", p);
  const View &shift = a.tensors[6], &norm = a.tensors[7], &mu = a.tensors[8];
  check_shape(shift, "shift", {p.B, p.H, p.N});
  check_shape(norm, "norm", {p.B, p.H, p.N});
  check_shape(mu, "mu", {p.has_scores() ? p.K : 0, p.B, p.H, p.N});
  for (const View* s : {&shift, &norm, &mu}) {
    check_dtype(*s, "the row statistics", DType::f32);
    check_contiguous(*s, "the row statistics");
  }
  p.shift = shift.as<float>(), p.norm = norm.as<float>(), p.mu = mu.as<float>();
  p.mu_stack = p.B * p.H * p.N;
  p.causal = a.ints[0] != 0, p.offset = a.ints[1], p.window = a.ints[2];
  p.align_right = a.ints[4] != 0;
  if (p.window < 0) fail("window must be positive, or 0 for none.");
  constexpr int64_t kFar = int64_t{1} << 60;  // so that sums of positions, offset and window cannot overflow
  if (p.offset < -kFar || p.offset > kFar) fail("offset must lie between -2^60 and 2^60.");
  if (p.window > kFar) p.window = kFar;
  p.scale = static_cast<float>(a.floats[0]), p.softcap = static_cast<float>(a.floats[1]);
  p.dropout = static_cast<float>(a.floats[2]);
  if (!(p.softcap >= 0.0f)) fail("softcap must be positive, or 0 for none.");
  if (!(p.dropout >= 0.0f && p.dropout <= 1.0f)) fail("dropout must be between 0 and 1.");
  p.threads = a.threads;
  p.q_start = p.k_start = nullptr;
  p.longest_q = p.N;
  const View &q_start = a.tensors[4], &k_start = a.tensors[5];
  if (!q_start && !k_start) return;
  if (!q_start || !k_start) fail("packed sequences need the offsets of queries and keys.");
  if (p.B != 1 || p.mask.data || p.part_count > 1)
    fail("packed sequences need one batch row, no mask and no context.");
  p.longest_q = longest(q_start, "q_start", p.N);
  p.columns = p.parts[0].longest = longest(k_start, "k_start", p.parts[0].rows);
  check_shape(k_start, "k_start", {q_start.size[0]});
  p.q_start = q_start.as<int64_t>(), p.k_start = k_start.as<int64_t>();
  p.B = q_start.size[0] - 1;
}

// After fill().
void take_keep(AttentionProblem& p, const Args& a, const Optional& optional) {
  if (!optional.keep) return;
  const View& keep = *optional.keep;
  check_dtype(keep, "keep", DType::boolean);
  check_shape(keep, "keep", {a.tensors[0].size[1], p.H, p.N, p.columns});
  check_contiguous(keep, "keep");
  p.keep = keep.as<uint8_t>();
}

void attention_fwd(const Args& a) {
  const Optional optional = optional_of(a, kTensors, 2);
  AttentionForward p{};
  fill(p, a, optional);
  take_keep(p, a, optional);
  p.out = rows_of(a.tensors[9], "out", p.dtype);
  AAJR_SELECT_AMX(attention_kernels).forward(p);
}

void attention_bwd(const Args& a) {
  const Optional optional = optional_of(a, kTensors + 5, 4);
  AttentionBackward p{};
  fill(p, a, optional);
  take_keep(p, a, optional);
  p.out = rows_of(a.tensors[9], "out", p.dtype);
  const View &out = a.tensors[9], &out_bar = a.tensors[10];
  p.out_bar = rows_of(out_bar, "out_bar", p.dtype);
  check_shape(out_bar, "out_bar", {out.size[0], out.size[1], out.size[2], out.size[3], out.size[4]});
  const View &q = a.tensors[0], &q_bar = a.tensors[11];
  if (q_bar) {
    p.q_bar = rows_of(q_bar, "q_bar", p.dtype);
    check_shape(q_bar, "q_bar", {q.size[0], q.size[1], q.size[2], q.size[3], q.size[4]});
  }
  take_bars(p.parts[p.part_count - 1], &a.tensors[12], &a.tensors[1], p.dtype);
  if (optional.context) take_bars(p.parts[0], optional.context + 2, optional.context, p.dtype);
  const View &bias_bar = a.tensors[14], &mask = a.tensors[3];
  if (bias_bar) {
    // not is_bias(): a mask without elements may have no memory
    if (!mask || mask.dtype == DType::boolean) fail("bias_bar needs a floating mask.");
    check_dtype(bias_bar, "bias_bar", DType::f32);
    check_contiguous(bias_bar, "bias_bar");
    check_shape(bias_bar, "bias_bar", {mask.size[0], mask.size[1], mask.size[2], mask.size[3], mask.size[4]});
    p.bias_bar = bias_bar.as<float>();
    p.bias_bar_strides = mask_of(bias_bar, "bias_bar", p);
  }
  AAJR_SELECT_AMX(attention_backward_kernels).backward(p);
}

const Register register_fwd("attention_fwd",
                            "tensors: q, k, v, mask|None, q_start|None, k_start|None, shift, norm, mu, out, keep if "
                            "drops, and of a context context_k, context_v; ints: causal, offset, window, drops, align_right; floats: scale, softcap, "
                            "dropout",
                            attention_fwd);
const Register register_bwd("attention_bwd",
                            "tensors: those of attention_fwd up to out, then out_bar, q_bar|None, k_bar|None, "
                            "v_bar|None, bias_bar|None (zeroed), keep if drops, and of a context context_k, context_v, "
                            "context_k_bar|None, context_v_bar|None; ints and floats as in attention_fwd",
                            attention_bwd);

}  // namespace
}  // namespace aajr
