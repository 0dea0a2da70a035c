#include "../cpu/norm.h"

#include "../dispatch.h"
#include "../registry.h"

namespace aajr {
namespace {

void check_rows(const View& v, const char* name) {
  check_floating(v, name);
  if (v.dim != 3) fail(std::string(name) + " must be [1 + K, rows, size].");
  check_last_stride(v, name);
}

void norm_fwd(const Args& a) {
  check_count(a, 5, 1, 2);
  const View &x = a.tensors[0], &y = a.tensors[1], &stats = a.tensors[2], &weight = a.tensors[3], &bias = a.tensors[4];
  check_rows(x, "x");
  const int64_t s = x.size[0], rows = x.size[1], size = x.size[2];
  const bool centred = a.ints[0] != 0;
  check_shape(y, "y", {s, rows, size});
  check_dtype(y, "y", x.dtype);
  check_contiguous(y, "y");
  check_shape(stats, "stats", {centred ? 2 * s : s, rows});
  check_dtype(stats, "stats", DType::f32);
  check_contiguous(stats, "stats");
  for (const View* p : {&weight, &bias}) {
    if (!*p) continue;
    check_floating(*p, "weight and bias");
    check_shape(*p, "weight and bias", {size});
    check_contiguous(*p, "weight and bias");
  }
  if (weight && bias) check_dtype(bias, "bias", weight.dtype);
  NormForward p{};
  p.dtype = x.dtype;
  p.weight_dtype = weight ? weight.dtype : bias ? bias.dtype : DType::f32;
  p.stacks = s, p.rows = rows, p.size = size;
  p.x = x.data, p.x_stack = x.stride[0], p.x_row = x.stride[1];
  p.y = y.data, p.stats = stats.as<float>();
  p.weight = weight.data, p.bias = bias.data;
  p.eps = static_cast<float>(a.floats[0]), p.offset = static_cast<float>(a.floats[1]);
  p.centred = centred, p.threads = a.threads;
  if (s > 0 && rows > 0 && size > 0) AAJR_SELECT(norm_kernels).forward(p);
}

const Register register_fwd("norm_fwd",
                            "tensors: x, y, stats, weight|None, bias|None; ints: centred; floats: eps, offset", norm_fwd);

}  // namespace
}  // namespace aajr
