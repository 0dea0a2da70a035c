// The bias of a linear layer and its gradient. The matrix products are torch's.
#include "linear.h"

#include "parallel.h"
#include "rows.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

template <class From, class To>
void bias_of(const LinearBias& p, const float* bias) {
  const From* product = reinterpret_cast<const From*>(p.product);
  To* y = reinterpret_cast<To*>(p.y);
  const int64_t n = p.size, rows = p.product == p.y ? p.biased : p.rows;
  parallel_ranges(rows, p.threads, [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; ++row) {
      const From* from = product + row * n;
      To* to = y + row * n;
      if (row < p.biased)
        walk<4>(0, n, [&](int64_t i, int, auto tag) AAJR_LAMBDA {
          write(to + i, read(from + i, tag) + read(bias + i, tag), tag);
        });
      else
        walk<4>(0, n, [&](int64_t i, int, auto tag) AAJR_LAMBDA { write(to + i, read(from + i, tag), tag); });
    }
  });
}

void bias(const LinearBias& p) {
  Scratch<float> wide(p.size);
  if (p.bias) widen_row(p.bias, p.dtype, wide.get(), p.size);
  const bool widened = p.product_dtype != p.dtype;
  if (p.dtype == DType::f32) bias_of<float, float>(p, wide.get());
  else if (p.dtype == DType::bf16) widened ? bias_of<float, bf16>(p, wide.get()) : bias_of<bf16, bf16>(p, wide.get());
  else widened ? bias_of<float, f16>(p, wide.get()) : bias_of<f16, f16>(p, wide.get());
}

template <class T>
void column_sum_of(const ColumnSum& p) {
  const int64_t n = p.size, padded = (n + 15) / 16 * 16;
  const int64_t parts = p.threads > p.rows ? (p.rows > 0 ? p.rows : 1) : p.threads;
  Scratch<float> sums(parts * 2 * padded);
  parallel_ranges(p.rows, p.threads, [&](int64_t first, int64_t last, int part) {
    float* near = sums.get() + part * 2 * padded;
    clear(near, 2 * padded);
    for (int64_t row = first; row < last; ++row) {
      const T* x = reinterpret_cast<const T*>(p.x) + offset_of(p.x_rows, row);
      walk<4>(0, n, [&](int64_t i, int, auto tag) AAJR_LAMBDA {
        write(near + i, read(near + i, tag) + read(x + i, tag), tag);
      });
      if ((row + 1 - first) % kSumRows == 0 || row + 1 == last) flush(near, near + padded, n);
    }
  });
  float* const all = sums.get() + padded;
  if (p.rows == 0) clear(all, n);
  for (int64_t part = 1; part < parts; ++part) flush(sums.get() + (part * 2 + 1) * padded, all, n);
  T* const sum = reinterpret_cast<T*>(p.sum);
  walk<1>(0, n, [&](int64_t i, int, auto tag) AAJR_LAMBDA { write(sum + i, read(all + i, tag), tag); });
}

void column_sum(const ColumnSum& p) {
  if (p.dtype == DType::f32) column_sum_of<float>(p);
  else if (p.dtype == DType::bf16) column_sum_of<bf16>(p);
  else column_sum_of<f16>(p);
}

}  // namespace

const LinearKernels& linear_kernels() {
  static const LinearKernels kernels{bias, column_sum};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
