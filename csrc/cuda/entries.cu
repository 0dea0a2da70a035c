// The entry points of aajr_kernels._cuda: checks, then a launch on the stream that was given. Tensors and numbers are
// those of the CPU module's entry points (csrc/ops), followed by the ordinal of the device and the handle of the stream.
#include "launches.h"

#include <tuple>

#include "../registry.h"

namespace aajr::cuda {
namespace {

// With more tangents a block's dynamic share of memory would have to be requested.
constexpr int64_t kMostTangents = 2048;

struct Where {
  int device;
  LaunchStream stream;
};

Where where(const Args& a) {
  const size_t n = a.ints.size();
  const int64_t device = a.ints[n - 2];
  if (device < 0 || device > INT32_MAX) fail("the device must be an ordinal, got " + std::to_string(device) + ".");
  return {static_cast<int>(device), reinterpret_cast<LaunchStream>(static_cast<uintptr_t>(a.ints[n - 1]))};
}

void check_tangents(int64_t stacks) {
  if (stacks < 1) fail("x must hold a primal.");
  if (stacks - 1 > kMostTangents)
    fail("the CUDA kernels take at most " + std::to_string(kMostTangents) + " tangents, got " +
         std::to_string(stacks - 1) + ".");
}

// A grid has as many blocks, and kernels count rows in 32 bits.
void check_rows(int64_t rows, int64_t tiles = 1) {
  if (rows > INT32_MAX / tiles)
    fail("the CUDA kernels take at most " + std::to_string(INT32_MAX / tiles) + " rows of this length, got " +
         std::to_string(rows) + ": split the batch.");
}

bool whole(int64_t elements, int64_t item) { return elements * item % kPackBytes == 0; }
bool whole(const void* address) { return reinterpret_cast<uintptr_t>(address) % kPackBytes == 0; }

// Whether sixteen bytes can be read at once at every pack of every row.
bool aligned_rows(const RowLayout& layout, int64_t item, std::initializer_list<const Stream*> tensors,
                  std::initializer_list<const void*> dense) {
  bool all = whole(layout.size, item);
  for (const Stream* t : tensors) {
    if (t->data == nullptr) continue;
    all = all && whole(t->data) && whole(t->stack, item);
    for (int a = 0; a < layout.outer; ++a) all = all && whole(t->outer[a], item);
  }
  for (const void* address : dense) all = all && whole(address);
  return all;
}

void check_output(const View& v, const char* name, std::initializer_list<int64_t> shape) {
  check_shape(v, name, shape);
  check_dtype(v, name, DType::f32);
  check_contiguous(v, name);
}

Parameter parameter(const View& v, const char* name, int64_t size) {
  if (!v) return {};
  check_floating(v, name);
  check_shape(v, name, {size});
  check_contiguous(v, name);
  return {v.data, v.dtype};
}

void norm_fwd(const Args& a) {
  check_count(a, 7, 3, 2);
  const View &x = a.tensors[0], &y = a.tensors[1], &stats = a.tensors[2], &weight = a.tensors[3], &bias = a.tensors[4],
             &residual = a.tensors[5], &summed = a.tensors[6];
  const bool centred = a.ints[0] != 0;
  if (!x || x.dim < 2) fail("x must be [1 + K, *batch, size].");
  const int64_t stacks = residual && residual.size[0] > x.size[0] ? residual.size[0] : x.size[0];
  check_tangents(stacks);
  if (residual && residual.size[0] != stacks && residual.size[0] != 1) fail("residual must have the stacks of x, or one.");
  if (residual && x.size[0] != stacks && x.size[0] != 1) fail("x must have the stacks of residual, or one.");
  Stream x_rows, residual_rows, y_rows, sum_rows;
  const RowLayout layout = shared_layout({{&x, "x", x.size[0], &x_rows},
                                          {&residual, "residual", residual ? residual.size[0] : 0, &residual_rows},
                                          {&y, "y", stacks, &y_rows},
                                          {&summed, "summed", stacks, &sum_rows}},
                                         true);
  if (!y || static_cast<bool>(summed) != static_cast<bool>(residual)) fail("y, and with a residual summed, must be given.");
  check_contiguous(y, "y");
  check_contiguous(summed, "summed");
  const int64_t rows = layout.rows();
  check_rows(rows);
  check_output(stats, "stats", {centred ? 2 * stacks : stacks, rows});
  NormForward p{};
  p.dtype = x.dtype, p.stacks = stacks, p.rows = rows, p.size = layout.size, p.shape = shape_of(layout);
  p.x = x.data, p.x_strides = strides_of(layout, x_rows), p.x_stacks = x.size[0];
  p.residual = residual.data, p.residual_strides = strides_of(layout, residual_rows);
  p.residual_stacks = residual ? residual.size[0] : 0;
  p.summed = summed.data, p.y = y.data, p.stats = stats.as<float>();
  p.weight = parameter(weight, "weight", p.size), p.bias = parameter(bias, "bias", p.size);
  p.eps = static_cast<float>(a.floats[0]), p.offset = static_cast<float>(a.floats[1]);
  p.centred = centred;
  const Where at = where(a);
  const OnDevice here(at.device);
  if (rows == 0 || p.size == 0) return;
  norm_forward(p,
               aligned_rows(layout, item_size(x.dtype), {&x_rows, &residual_rows},
                            {y.data, summed.data, weight.data, bias.data}),
               at.stream);
}

void norm_bwd(const Args& a) {
  check_count(a, 10, 3, 1);
  const View &y_bar = a.tensors[0], &x = a.tensors[1], &weight = a.tensors[2], &stats = a.tensors[3],
             &x_bar = a.tensors[4], &w_bar = a.tensors[5], &b_bar = a.tensors[6], &sum_bar = a.tensors[7],
             &w_parts = a.tensors[8], &b_parts = a.tensors[9];
  const bool centred = a.ints[0] != 0;
  if (!x || x.dim < 2) fail("x must be [1 + K, *batch, size].");
  const int64_t stacks = x.size[0];
  check_tangents(stacks);
  Stream x_rows, y_rows, sum_rows, out_rows;
  const RowLayout layout = shared_layout({{&x, "x", stacks, &x_rows},
                                          {&y_bar, "y_bar", stacks, &y_rows},
                                          {&sum_bar, "sum_bar", stacks, &sum_rows},
                                          {&x_bar, "x_bar", stacks, &out_rows}},
                                         true);
  if (!y_bar) fail("y_bar must be given.");
  check_contiguous(x_bar, "x_bar");
  const int64_t rows = layout.rows(), size = layout.size;
  check_rows(rows);
  check_output(stats, "stats", {centred ? 2 * stacks : stacks, rows});
  NormBackward p{};
  p.dtype = x.dtype, p.stacks = stacks, p.rows = rows, p.size = size, p.shape = shape_of(layout);
  p.x = x.data, p.x_strides = strides_of(layout, x_rows);
  p.y_bar = y_bar.data, p.y_strides = strides_of(layout, y_rows);
  p.sum_bar = sum_bar.data, p.sum_strides = strides_of(layout, sum_rows);
  p.stats = stats.as<float>(), p.weight = parameter(weight, "weight", size), p.x_bar = x_bar.data;
  for (const auto& [whole_bar, parts, name] : {std::tuple{&w_bar, &w_parts, "w_parts"}, {&b_bar, &b_parts, "b_parts"}}) {
    if (!*whole_bar) continue;
    check_output(*whole_bar, name, {size});
    if (!*parts || parts->dim != 2 || parts->size[0] < 1) fail(std::string(name) + " must be [blocks, size].");
    check_output(*parts, name, {parts->size[0], size});
    if (p.parts != 0 && p.parts != parts->size[0]) fail("w_parts and b_parts must have the same number of blocks.");
    p.parts = parts->size[0];
  }
  if (p.parts > rows && rows > 0) fail("there must not be more blocks than rows: some would have no share.");
  if (w_bar) p.w_bar = w_bar.as<float>(), p.w_parts = w_parts.as<float>();
  if (b_bar) p.b_bar = b_bar.as<float>(), p.b_parts = b_parts.as<float>();
  p.offset = static_cast<float>(a.floats[0]), p.centred = centred;
  const Where at = where(a);
  const OnDevice here(at.device);
  if (rows == 0 || size == 0 || (!x_bar && !w_bar && !b_bar)) return;
  norm_backward(p, aligned_rows(layout, item_size(x.dtype), {&x_rows, &y_rows, &sum_rows}, {x_bar.data, weight.data}),
                at.stream);
}

// Without `backward` the tensors are y, q, parts; with it y, q_bar, parts|None, moments|None, y_bar.
Sensitivity sensitivity(const Args& a, bool backward, bool& packed) {
  check_count(a, backward ? 5 : 3, 3, 0);
  const View &y = a.tensors[0], &q = a.tensors[1], &parts = a.tensors[2], none;
  const View &moments = backward ? a.tensors[3] : none, &out = backward ? a.tensors[4] : none;
  if (!y || y.dim < 2) fail("y must be [1 + K, ..., size].");
  check_tangents(y.size[0]);
  if (a.ints[0] < 0 || a.ints[0] >= static_cast<int64_t>(Metric::count)) fail("metric must be the code of a metric.");
  Stream y_rows, out_rows;
  const RowLayout layout = shared_layout({{&y, "y", y.size[0], &y_rows}, {&out, "y_bar", y.size[0], &out_rows}}, true);
  if (backward && !out) fail("y_bar must not be None.");
  check_contiguous(out, "y_bar");
  Sensitivity p{};
  p.metric = static_cast<Metric>(a.ints[0]);
  const bool softmax = p.metric != Metric::squares;
  if (softmax && layout.size == 0) fail("y must have a last axis with elements.");
  p.dtype = y.dtype, p.stacks = y.size[0], p.rows = layout.rows(), p.size = layout.size, p.shape = shape_of(layout);
  p.tiles = tiles_of(p.size);
  check_rows(p.rows, p.tiles.count);
  p.y = y.data, p.y_strides = strides_of(layout, y_rows), p.y_bar = out.data;
  const int64_t tangents = p.stacks - 1;
  check_output(q, backward ? "q_bar" : "q", {tangents, p.rows});
  if (backward) p.q_bar = q.as<float>();
  else p.q = q.as<float>();
  if (!backward || softmax) {
    if (!parts) fail("parts must not be None.");
    check_output(parts, "parts", {p.tiles.count, tile_fields(p.metric, tangents), p.rows});
    p.parts = parts.as<float>();
  }
  if (backward && softmax) {
    if (!moments) fail("moments must not be None.");
    check_output(moments, "moments", {kMomentsRow + kMomentsTangent * tangents, p.rows});
    p.moments = moments.as<float>();
  }
  packed = aligned_rows(layout, item_size(y.dtype), {&y_rows}, {out.data});
  return p;
}

void sensitivity_fwd(const Args& a) {
  bool packed;
  const Sensitivity p = sensitivity(a, false, packed);
  const Where at = where(a);
  const OnDevice here(at.device);
  if (p.rows > 0 && p.stacks > 1) sensitivity_forward(p, packed, at.stream);
}

void sensitivity_bwd(const Args& a) {
  bool packed;
  const Sensitivity p = sensitivity(a, true, packed);
  const Where at = where(a);
  const OnDevice here(at.device);
  if (p.rows > 0 && p.size > 0) sensitivity_backward(p, packed, at.stream);
}

const Register registered[] = {
    {"norm_fwd",
     "tensors: x, y, stats, weight|None, bias|None, residual|None, summed|None; ints: centred, device, stream; floats: "
     "eps, offset",
     norm_fwd},
    {"norm_bwd",
     "tensors: y_bar, x, weight|None, stats, x_bar|None, w_bar|None, b_bar|None, sum_bar|None, w_parts|None, "
     "b_parts|None; ints: centred, device, stream; floats: offset",
     norm_bwd},
    {"sensitivity_fwd", "tensors: y, q, parts; ints: metric (0 l2 and logits, 1 fisher, 2 probs), device, stream",
     sensitivity_fwd},
    {"sensitivity_bwd", "tensors: y, q_bar, parts|None, moments|None, y_bar; ints: metric, device, stream",
     sensitivity_bwd},
};

}  // namespace
}  // namespace aajr::cuda
