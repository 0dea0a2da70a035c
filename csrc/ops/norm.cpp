#include "../cpu/norm.h"

#include "../dispatch.h"
#include "../registry.h"

namespace aajr {
namespace {

// [1 + K, *batch, C], the last axis dense
void check_rows(const View& v, const char* name) {
  check_floating(v, name);
  if (v.dim < 2) fail(std::string(name) + " must be [1 + K, *batch, size].");
  check_last_stride(v, name);
}

// the shape of `like`, but `stacks` for its first axis
void check_like(const View& v, const char* name, const View& like, int64_t stacks) {
  bool same = v.present && v.dim == like.dim && v.size[0] == stacks;
  for (int i = 1; same && i < v.dim; ++i) same = v.size[i] == like.size[i];
  if (!same) fail(std::string(name) + " must have the shape of x.");
  check_dtype(v, name, like.dtype);
}

void check_parameter(const View& v, const char* name, int64_t size) {
  if (!v) return;
  check_floating(v, name);
  check_shape(v, name, {size});
  check_contiguous(v, name);
}

void check_output(const View& v, const char* name, std::initializer_list<int64_t> shape) {
  check_shape(v, name, shape);
  check_dtype(v, name, DType::f32);
  check_contiguous(v, name);
}

void norm_fwd(const Args& a) {
  check_count(a, 7, 1, 2);
  const View &x = a.tensors[0], &y = a.tensors[1], &stats = a.tensors[2], &weight = a.tensors[3], &bias = a.tensors[4],
             &residual = a.tensors[5], &summed = a.tensors[6];
  check_rows(x, "x");
  const bool centred = a.ints[0] != 0;
  int64_t s = x.size[0];
  const int64_t rows = rows_of(x, 1, x.dim - 1), size = x.size[x.dim - 1];
  if (residual) {
    check_rows(residual, "residual");
    check_like(residual, "residual", x, residual.size[0]);
    if (residual.size[0] > s) s = residual.size[0];
    check_like(summed, "summed", x, s);
    check_contiguous(summed, "summed");
  }
  check_like(y, "y", x, s);
  check_contiguous(y, "y");
  check_output(stats, "stats", {centred ? 2 * s : s, rows});
  check_parameter(weight, "weight", size);
  check_parameter(bias, "bias", size);
  NormForward p{};
  p.dtype = x.dtype;
  p.weight_dtype = weight.dtype, p.bias_dtype = bias.dtype;
  p.stacks = s, p.rows = rows, p.size = size;
  p.x = x.data, p.x_stacks = x.size[0], p.x_stack = x.stride[0], p.x_rows = axes_of(x, 1, x.dim - 1);
  if (residual) {
    p.residual = residual.data, p.residual_stacks = residual.size[0];
    p.residual_stack = residual.stride[0], p.residual_rows = axes_of(residual, 1, x.dim - 1);
    p.summed = summed.data;
  }
  p.y = y.data, p.stats = stats.as<float>();
  p.weight = weight.data, p.bias = bias.data;
  p.eps = static_cast<float>(a.floats[0]), p.offset = static_cast<float>(a.floats[1]);
  p.centred = centred, p.threads = threads_for(a.threads, y.numel());
  if (s > 0 && rows > 0 && size > 0) AAJR_SELECT(norm_kernels).forward(p);
}

void norm_bwd(const Args& a) {
  check_count(a, 8, 1, 1);
  const View &y_bar = a.tensors[0], &x = a.tensors[1], &weight = a.tensors[2], &stats = a.tensors[3],
             &x_bar = a.tensors[4], &w_bar = a.tensors[5], &b_bar = a.tensors[6], &sum_bar = a.tensors[7];
  check_rows(x, "x");
  const int64_t s = x.size[0], rows = rows_of(x, 1, x.dim - 1), size = x.size[x.dim - 1];
  const bool centred = a.ints[0] != 0;
  check_like(y_bar, "y_bar", x, s);
  check_last_stride(y_bar, "y_bar");
  if (sum_bar) check_like(sum_bar, "sum_bar", x, s), check_last_stride(sum_bar, "sum_bar");
  check_output(stats, "stats", {centred ? 2 * s : s, rows});
  check_parameter(weight, "weight", size);
  if (x_bar) check_like(x_bar, "x_bar", x, s), check_contiguous(x_bar, "x_bar");
  if (w_bar) check_output(w_bar, "w_bar", {size});
  if (b_bar) check_output(b_bar, "b_bar", {size});
  NormBackward p{};
  p.dtype = x.dtype;
  p.weight_dtype = weight.dtype;
  p.stacks = s, p.rows = rows, p.size = size;
  p.x = x.data, p.x_stack = x.stride[0], p.x_rows = axes_of(x, 1, x.dim - 1);
  p.y_bar = y_bar.data, p.y_stack = y_bar.stride[0], p.y_rows = axes_of(y_bar, 1, x.dim - 1);
  if (sum_bar) p.sum_bar = sum_bar.data, p.sum_stack = sum_bar.stride[0], p.sum_rows = axes_of(sum_bar, 1, x.dim - 1);
  p.stats = stats.as<float>();
  p.weight = weight.data;
  p.x_bar = x_bar.data, p.w_bar = w_bar.as<float>(), p.b_bar = b_bar.as<float>();
  p.offset = static_cast<float>(a.floats[0]);
  p.centred = centred, p.threads = threads_for(a.threads, x.numel());
  // also without rows: the parameter gradients are zero then, and the kernel writes them
  if (s > 0 && size > 0) AAJR_SELECT(norm_kernels).backward(p);
}

const Register register_fwd(
    "norm_fwd",
    "tensors: x, y, stats, weight|None, bias|None, residual|None, summed|None; ints: centred; floats: eps, offset",
    norm_fwd);
const Register register_bwd(
    "norm_bwd",
    "tensors: y_bar, x, weight|None, stats, x_bar|None, w_bar|None, b_bar|None, sum_bar|None; ints: centred; "
    "floats: offset",
    norm_bwd);

}  // namespace
}  // namespace aajr
