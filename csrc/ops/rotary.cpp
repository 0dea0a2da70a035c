#include "../cpu/rotary.h"

#include "../dispatch.h"
#include "../registry.h"

namespace aajr {
namespace {

// Stride of a table along axis `axis` of x; 0 where it is broadcast. Tables are aligned with the last axes of x.
int64_t table_stride(const View& table, const View& x, int axis) {
  const int i = axis - (x.dim - table.dim);
  return i < 0 || table.size[i] == 1 ? 0 : table.stride[i];
}

void check_table(const View& v, const char* name, const View& x) {
  check_floating(v, name);
  bool fits = v.present && v.dim >= 1 && v.dim < x.dim && v.size[v.dim - 1] % 2 == 0 &&
              v.size[v.dim - 1] <= x.size[x.dim - 1];
  for (int i = 0; fits && i + 1 < v.dim; ++i) fits = v.size[i] == 1 || v.size[i] == x.size[i + x.dim - v.dim];
  if (!fits) fail(std::string(name) + " must broadcast to the rows of x and turn an even number of its features.");
  check_last_stride(v, name);
}

void check_stacked(const View& v, const char* name, const View& like) {
  check_floating(v, name);
  bool same = v.present && v.dim == like.dim && v.dim >= 2;
  for (int i = 0; same && i < v.dim; ++i) same = v.size[i] == like.size[i];
  if (!same) fail(std::string(name) + " must have the shape of x, [1 + K, *batch, features].");
  check_dtype(v, name, like.dtype);
  check_last_stride(v, name);
}

// Adds an axis, or makes the last one longer where that is the same walk through memory.
void append(RotaryAxes& a, int64_t size, int64_t x, int64_t y, int64_t cos, int64_t sin) {
  if (a.count > 0) {
    const int i = a.count - 1;
    if (a.x[i] == size * x && a.y[i] == size * y && a.cos[i] == size * cos && a.sin[i] == size * sin) {
      a.size[i] *= size, a.x[i] = x, a.y[i] = y, a.cos[i] = cos, a.sin[i] = sin;
      return;
    }
  }
  const int i = a.count++;
  a.size[i] = size, a.x[i] = x, a.y[i] = y, a.cos[i] = cos, a.sin[i] = sin;
}

void rotary(const Args& a) {
  check_count(a, 4, 2, 0);
  const View &x = a.tensors[0], &y = a.tensors[1], &cos = a.tensors[2], &sin = a.tensors[3];
  check_stacked(x, "x", x);
  check_stacked(y, "y", x);
  check_table(cos, "cos", x);
  check_table(sin, "sin", x);
  check_dtype(sin, "sin", cos.dtype);
  Rotary p{};
  p.dtype = x.dtype, p.table_dtype = cos.dtype;
  p.size = x.size[x.dim - 1], p.rotated = cos.size[cos.dim - 1];
  if (sin.size[sin.dim - 1] != p.rotated) fail("sin must turn as many features as cos.");
  // the order in which x lies in memory; rows of one position that differ by the head share a table row then
  int order[kMaxDims], axes = 0;
  p.rows = rows_of(x, 0, x.dim - 1);
  for (int i = 0; i + 1 < x.dim; ++i) {
    if (x.size[i] == 1) continue;
    int at = axes++;
    for (; at > 0 && x.stride[order[at - 1]] < x.stride[i]; --at) order[at] = order[at - 1];
    order[at] = i;
  }
  for (int i = 0; i < axes; ++i) {
    const int axis = order[i];
    append(p.axes, x.size[axis], x.stride[axis], y.stride[axis], table_stride(cos, x, axis),
           table_stride(sin, x, axis));
  }
  if (axes == 0) append(p.axes, 1, 0, 0, 0, 0);
  p.x = x.data, p.y = y.data, p.cos = cos.data, p.sin = sin.data;
  p.interleaved = a.ints[0] != 0, p.transposed = a.ints[1] != 0;
  p.threads = threads_for(a.threads, x.numel());
  if (x.numel() > 0) AAJR_SELECT(rotary_kernels).rotate(p);
}

void rotary_tables(const Args& a) {
  check_count(a, 4, 1, 0);
  const View &y_bar = a.tensors[0], &x = a.tensors[1], &cos_bar = a.tensors[2], &sin_bar = a.tensors[3];
  check_stacked(x, "x", x);
  check_stacked(y_bar, "y_bar", x);
  for (const View* v : {&cos_bar, &sin_bar}) {
    const char* name = v == &cos_bar ? "cos_bar" : "sin_bar";
    check_table(*v, name, x);
    check_dtype(*v, name, DType::f32);
    check_contiguous(*v, name);
  }
  RotaryTables p{};
  p.dtype = x.dtype;
  p.rotated = cos_bar.size[cos_bar.dim - 1];
  rows_of(x, 0, x.dim - 1);  // can be counted
  p.tables = p.rows = 1;
  for (int i = 0; i + 1 < x.dim; ++i) {
    const int j = i - (x.dim - cos_bar.dim);
    const bool kept = j >= 0 && cos_bar.size[j] != 1;
    if (j >= 0 && sin_bar.dim == cos_bar.dim && sin_bar.size[j] != cos_bar.size[j])
      fail("sin_bar must have the shape of cos_bar.");
    (kept ? p.tables : p.rows) *= x.size[i];
    if (x.size[i] != 1) append(kept ? p.kept : p.reduced, x.size[i], x.stride[i], y_bar.stride[i], 0, 0);
  }
  if (sin_bar.numel() != cos_bar.numel() || sin_bar.size[sin_bar.dim - 1] != p.rotated)
    fail("sin_bar must have the shape of cos_bar.");
  for (RotaryAxes* axes : {&p.kept, &p.reduced})
    if (axes->count == 0) append(*axes, 1, 0, 0, 0, 0);
  p.x = x.data, p.y_bar = y_bar.data;
  p.cos_bar = cos_bar.as<float>(), p.sin_bar = sin_bar.as<float>();
  p.interleaved = a.ints[0] != 0;
  p.threads = threads_for(a.threads, x.numel());
  if (cos_bar.numel() > 0) AAJR_SELECT(rotary_kernels).tables(p);
}

const Register register_rotary("rotary", "tensors: x, y, cos, sin; ints: interleaved, transposed", rotary);
const Register register_tables("rotary_tables", "tensors: y_bar, x, cos_bar, sin_bar; ints: interleaved",
                               rotary_tables);

}  // namespace
}  // namespace aajr
