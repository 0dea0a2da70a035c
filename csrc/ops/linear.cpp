#include "../cpu/linear.h"

#include "../dispatch.h"
#include "../registry.h"

namespace aajr {
namespace {

void linear_bias(const Args& a) {
  check_count(a, 3, 0, 0);
  const View &product = a.tensors[0], &y = a.tensors[1], &bias = a.tensors[2];
  check_floating(y, "y");
  if (!y || y.dim < 1) fail("y must be [1 + K, *batch, out].");
  bool same = product.present && product.dim == y.dim;
  for (int i = 0; same && i < y.dim; ++i) same = product.size[i] == y.size[i];
  if (!same) fail("product must have the shape of y.");
  if (product.dtype != DType::f32) check_dtype(product, "product", y.dtype);
  if (product.data == y.data) check_dtype(product, "product", y.dtype);
  check_contiguous(product, "product");
  check_contiguous(y, "y");
  LinearBias p{};
  p.product_dtype = product.dtype, p.dtype = y.dtype;
  p.size = y.size[y.dim - 1];
  if (y.numel() == 0) return;
  p.rows = y.numel() / p.size;
  if (bias) {
    check_shape(bias, "bias", {p.size});
    check_dtype(bias, "bias", y.dtype);
    check_contiguous(bias, "bias");
    p.biased = p.rows / (y.dim > 1 ? y.size[0] : 1);
  }
  p.product = product.data, p.y = y.data, p.bias = bias.data;
  p.threads = threads_for(a.threads, y.numel());
  AAJR_SELECT(linear_kernels).bias(p);
}

void column_sum(const Args& a) {
  check_count(a, 2, 0, 0);
  const View &x = a.tensors[0], &sum = a.tensors[1];
  check_floating(x, "x");
  if (!x || x.dim < 2) fail("x must be [1 + K, *batch, size].");
  check_last_stride(x, "x");
  ColumnSum p{};
  p.dtype = x.dtype, p.size = x.size[x.dim - 1];
  check_shape(sum, "sum", {p.size});
  check_dtype(sum, "sum", x.dtype);
  check_contiguous(sum, "sum");
  p.rows = x.size[0] > 0 ? rows_of(x, 1, x.dim - 1) : 0;
  p.x = x.data, p.x_rows = axes_of(x, 1, x.dim - 1);
  p.sum = sum.data;
  p.threads = threads_for(a.threads, x.numel());
  if (p.size > 0) AAJR_SELECT(linear_kernels).column_sum(p);
}

const Register register_bias("linear_bias", "tensors: product (may be y), y, bias|None", linear_bias);
const Register register_sum("column_sum", "tensors: x, sum (of the rows of x[0])", column_sum);

}  // namespace
}  // namespace aajr
