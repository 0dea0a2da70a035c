// RMS norm and layer norm of stacked rows. All 1 + K streams of a row are taken together while they are in the first
// level cache, so memory is read and written once per direction.
//
// With x and ẋ_k centred by layer norm, and r, c_k as in aajr_kernels/ops/norm:
//   y = w r x (+ bias),  ẏ_k = w r (ẋ_k − r c_k x)
// and backwards, with a = w ȳ, b_k = w ẏ̄_k and m the mean of a row,
//   β_k = r m(b_k x), s = r m(a x) + r Σ_k (m(b_k ẋ_k) − 3 c_k β_k)
//   ẋ̄_k = r b_k − r² β_k x,  x̄ = r a − r² (Σ_k (c_k b_k + β_k ẋ_k) + s x)
//   w̄ += r x ȳ + Σ_k (r ẋ_k − r² c_k x) ẏ̄_k
// Centring the results means centring a and b_k, whose sums come with the others, for the means of x and ẋ_k are zero. As
// the saved ones are rounded, the rest of each is summed first, and taken off too.
#include "norm.h"

#include <cmath>

#include "parallel.h"
#include "rows.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

template <bool Centred, class T, class Tag>
AAJR_INLINE vf centred(const T* x, float mean, Tag tag) {
  // elements past the end are zero after the subtraction too
  return Centred ? read(x, tag, mean) - mean : read(x, tag);
}

// Beside a factor that is zero past the end.
template <bool Centred, class T, class Tag>
AAJR_INLINE vf centred(const T* x, float mean, Tag tag, float rest) {
  return Centred ? centred<Centred>(x, mean, tag) - rest : read(x, tag);
}

// The mean of x − mean.
template <bool Centred, class T>
AAJR_INLINE float mean_of(const T* x, int64_t n, float mean = 0.0f) {
  if (!Centred) return 0.0f;
  double total[1] = {};
  reduce<1, 4>(n, total, [&](int64_t i, auto tag, auto add) AAJR_LAMBDA { add(0, centred<Centred>(x + i, mean, tag)); });
  return static_cast<float>(total[0] / n);
}

// A rounded mean, and the one that remains without it, as the nearest to their sum and what remains then.
AAJR_INLINE void settle(float& mean, float& rest) {
  const float nearest = mean + rest;
  rest += mean - nearest, mean = nearest;
}

// summed = x + residual for one stream of a row; null pointers are zeros.
template <class T>
AAJR_INLINE void add_rows(const T* x, const T* residual, T* summed, int64_t n) {
  walk<2>(0, n, [&](int64_t i, int, auto tag) AAJR_LAMBDA {
    const vf a = x ? read(x + i, tag) : vf{}, b = residual ? read(residual + i, tag) : vf{};
    write(summed + i, a + b, tag);
  });
}

// The primal (if Primal) and `Others` tangents from number k on: statistics and results. Two tangents at a time keep
// everything in registers and read the primal half as often. Means are rounded: `rest` is the one that the primal has
// without its own.
template <class T, bool Centred, bool Primal, int Others>
AAJR_INLINE void forward_group(const NormForward& p, const T* x, int64_t x_stack, T* y, float* stats,
                               const float* scale, const float* shift, int64_t k, float& rest) {
  const int64_t n = p.size, y_stack = p.rows * n;
  float* means = stats + p.stacks * p.rows;
  const T* other[2] = {x + (1 + k) * x_stack, x + (2 + k) * x_stack};
  float mean = 0.0f, r, mean_of_other[2] = {}, rest_of_other[2] = {}, rc[2] = {};
  if (Centred) {
    mean = Primal ? mean_of<Centred>(x, n) : means[0];
    for (int j = 0; j < Others; ++j) mean_of_other[j] = mean_of<Centred>(other[j], n);
  }
  // of each tangent m(x ẋ) and, centred, m(ẋ); then of the primal m(x x), m(x)
  constexpr int each = Centred ? 2 : 1, own = each * Others, count = own + (Primal ? each : 0);
  double dots[count] = {};
  reduce<count, Centred && Others == 2 ? 2 : 4>(n, dots, [&](int64_t i, auto tag, auto add) AAJR_LAMBDA {
    const vf primal = centred<Centred>(x + i, mean, tag);
    if (Primal) add(own, primal * primal);
    if (Primal && Centred) add(own + 1, primal);
    for (int j = 0; j < Others; ++j) {
      const vf tangent = centred<Centred>(other[j] + i, mean_of_other[j], tag);
      add(each * j, primal * tangent);
      if (Centred) add(each * j + 1, tangent);
    }
  });
  for (double& dot : dots) dot /= n;
  if constexpr (Primal && Centred) rest = static_cast<float>(dots[own + 1]);
  for (int j = 0; j < Others && Centred; ++j) rest_of_other[j] = static_cast<float>(dots[each * j + each - 1]);
  if constexpr (Primal) {
    const float square = static_cast<float>(dots[own]) - rest * rest;
    stats[0] = 1.0f / std::sqrt((square < 0.0f ? 0.0f : square) + p.eps);  // NaN stays
  }
  r = stats[0];
  for (int j = 0; j < Others; ++j) {
    const float c = stats[(1 + k + j) * p.rows] = (static_cast<float>(dots[each * j]) - rest * rest_of_other[j]) * r;
    rc[j] = r * c;
  }
  if (Centred) {
    if (Primal) settle(mean, rest), means[0] = mean;
    for (int j = 0; j < Others; ++j) {
      settle(mean_of_other[j], rest_of_other[j]);
      means[(1 + k + j) * p.rows] = mean_of_other[j];
    }
  }
  walk<2>(0, n, [&](int64_t i, int, auto tag) AAJR_LAMBDA {
    vf primal = centred<Centred>(x + i, mean, tag);
    if (Centred) primal -= rest;
    const vf hat = primal * r, w = read(scale + i, tag);
    if (Primal) write(y + i, shift ? hat * w + read(shift + i, tag) : hat * w, tag);
    for (int j = 0; j < Others; ++j) {
      vf tangent = centred<Centred>(other[j] + i, mean_of_other[j], tag);
      if (Centred) tangent -= rest_of_other[j];
      write(y + (1 + k + j) * y_stack + i, (tangent * r - hat * rc[j]) * w, tag);
    }
  });
}

template <class T, bool Centred>
void forward_row(const NormForward& p, const float* scale, const float* shift, int64_t row) {
  const int64_t n = p.size, tangents = p.stacks - 1;
  const T* x = reinterpret_cast<const T*>(p.x) + offset_of(p.x_rows, row);
  int64_t x_stack = p.x_stack;
  if (p.summed) {
    const T* residual = reinterpret_cast<const T*>(p.residual) + offset_of(p.residual_rows, row);
    T* summed = reinterpret_cast<T*>(p.summed) + row * n;
    for (int64_t j = 0; j <= tangents; ++j)
      add_rows(j < p.x_stacks ? x + j * p.x_stack : nullptr,
               j < p.residual_stacks ? residual + j * p.residual_stack : nullptr, summed + j * p.rows * n, n);
    x = summed, x_stack = p.rows * n;
  }
  T* y = reinterpret_cast<T*>(p.y) + row * n;
  float* stats = p.stats + row;
  float rest = 0.0f;
  int64_t k = tangents % 2;
  if (k == 1) forward_group<T, Centred, true, 1>(p, x, x_stack, y, stats, scale, shift, 0, rest);
  else forward_group<T, Centred, true, 0>(p, x, x_stack, y, stats, scale, shift, 0, rest);
  for (; k < tangents; k += 2) forward_group<T, Centred, false, 2>(p, x, x_stack, y, stats, scale, shift, k, rest);
}

template <class T>
void forward_of(const NormForward& p, const float* scale, const float* shift) {
  parallel_ranges(p.rows, p.threads, [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; ++row)
      p.centred ? forward_row<T, true>(p, scale, shift, row) : forward_row<T, false>(p, scale, shift, row);
  });
}

// offset + weight in float32, or ones
void fill_scale(const char* weight, DType dtype, float offset, int64_t n, float* scale) {
  if (weight) return widen_row(weight, dtype, scale, n, offset);
  for (int64_t i = 0; i < n; ++i) scale[i] = 1.0f;
}

void forward(const NormForward& p) {
  Scratch<float> scale(p.size), shift(p.bias ? p.size : 1);
  fill_scale(p.weight, p.weight_dtype, p.offset, p.size, scale.get());
  if (p.bias) widen_row(p.bias, p.bias_dtype, shift.get(), p.size);
  const float* added = p.bias ? shift.get() : nullptr;
  if (p.dtype == DType::f32) forward_of<float>(p, scale.get(), added);
  else if (p.dtype == DType::bf16) forward_of<bf16>(p, scale.get(), added);
  else forward_of<f16>(p, scale.get(), added);
}

// Statistics of a tangent in a row.
struct Tangent {
  float beta, mean_b, c, mean_x, rest_x;
};

// Where a share of the rows sums the parameter gradients; null where not needed.
struct Sums {
  float *w, *b;
};

// One row of the inputs.
template <class T>
struct Row {
  const T *x, *y_bar;
  float r, mean, rest;
  Tangent* each;  // [K]
};

// Sums over a row for the primal (if Primal) and `Others` tangents from number k on, and the row's share of the
// parameter gradients. Fills β and m(b) of these tangents; adds to s, and sets m(a).
template <class T, bool Centred, bool Primal, int Others>
AAJR_INLINE void backward_group(const NormBackward& p, const Row<T>& row, const float* scale, const Sums& out,
                                int64_t k, float& s, float& mean_a) {
  const int64_t n = p.size;
  const T* x[2] = {row.x + (1 + k) * p.x_stack, row.x + (2 + k) * p.x_stack};
  const T* g[2] = {row.y_bar + (1 + k) * p.y_stack, row.y_bar + (2 + k) * p.y_stack};
  float mean[2] = {}, rest[2] = {}, rrc[2] = {};
  for (int j = 0; j < Others; ++j) {
    const Tangent& t = row.each[k + j];
    mean[j] = t.mean_x, rest[j] = t.rest_x, rrc[j] = row.r * row.r * t.c;
  }
  // of each tangent m(b x), m(b ẋ) and, centred, m(b); then of the primal m(a x), m(a)
  constexpr int each = Centred ? 3 : 2, own = each * Others, count = own + (Primal ? each - 1 : 0);
  double total[count] = {};
  reduce<count, Others == 2 ? 1 : 2>(n, total, [&](int64_t i, auto tag, auto add) AAJR_LAMBDA {
    const vf w = read(scale + i, tag), primal = centred<Centred>(row.x + i, row.mean, tag, row.rest);
    vf w_bar{};
    if (Primal) {
      const vf g0 = read(row.y_bar + i, tag), a = g0 * w;
      add(own, a * primal);
      if (Centred) add(own + 1, a);
      if (out.b) write(out.b + i, read(out.b + i, tag) + g0, tag);
      w_bar = g0 * (primal * row.r);
    }
    for (int j = 0; j < Others; ++j) {
      const vf gj = read(g[j] + i, tag), b = gj * w, tangent = centred<Centred>(x[j] + i, mean[j], tag, rest[j]);
      add(each * j, b * primal);
      add(each * j + 1, b * tangent);
      if (Centred) add(each * j + 2, b);
      w_bar += gj * (tangent * row.r - primal * rrc[j]);
    }
    if (out.w) write(out.w + i, read(out.w + i, tag) + w_bar, tag);
  });
  if constexpr (Primal) s += row.r * static_cast<float>(total[own] / n);
  if constexpr (Primal && Centred) mean_a = static_cast<float>(total[own + 1] / n);
  for (int j = 0; j < Others; ++j) {
    Tangent& t = row.each[k + j];
    t.beta = row.r * static_cast<float>(total[each * j] / n);
    if constexpr (Centred) t.mean_b = static_cast<float>(total[each * j + 2] / n);
    s += row.r * (static_cast<float>(total[each * j + 1] / n) - 3.0f * t.c * t.beta);
  }
}

// The cotangents of x. Several vectors together share the look-up of a tangent's coefficients.
template <class T, bool Centred, bool Single>
AAJR_INLINE void backward_write(const NormBackward& p, const Row<T>& row, const float* scale, const T* add, T* x_bar,
                                float s, float mean_a) {
  const int64_t n = p.size, tangents = Single ? 1 : p.stacks - 1;
  const float r = row.r, rr = r * r;
  const auto block = [&](int64_t i, auto tag, auto vectors) AAJR_LAMBDA {
    constexpr int U = sizeof(vectors);
    vf primal[U], w[U], small[U];
    for (int u = 0; u < U; ++u) {
      primal[u] = centred<Centred>(row.x + i + u * W, row.mean, tag, row.rest);
      w[u] = read(scale + i + u * W, tag);
      small[u] = primal[u] * s;
    }
    for (int64_t k = 0; k < tangents; ++k) {
      const Tangent t = row.each[k];
      const float scaled = rr * t.beta;
      const int64_t g = (1 + k) * p.y_stack + i, x = (1 + k) * p.x_stack + i, to = (1 + k) * p.rows * n + i;
      for (int u = 0; u < U; ++u) {
        vf b = read(row.y_bar + g + u * W, tag) * w[u];
        if (Centred) b -= t.mean_b;
        small[u] += b * t.c + centred<Centred>(row.x + x + u * W, t.mean_x, tag, t.rest_x) * t.beta;
        vf tangent = b * r - primal[u] * scaled;
        if (add) tangent += read(add + (1 + k) * p.sum_stack + i + u * W, tag);
        write(x_bar + to + u * W, tangent, tag);
      }
    }
    for (int u = 0; u < U; ++u) {
      vf a = read(row.y_bar + i + u * W, tag) * w[u];
      if (Centred) a -= mean_a;
      vf result = a * r - small[u] * rr;
      if (add) result += read(add + i + u * W, tag);
      write(x_bar + i + u * W, result, tag);
    }
  };
  struct One { char vectors[1]; };
  struct Several { char vectors[Single ? 1 : 4]; };
  constexpr int step = sizeof(Several) * W;
  int64_t i = 0;
  for (; i + step <= n; i += step) block(i, Whole{}, Several{});
  for (; i < n; i += W) block(i, Part{n - i}, One{});
}

template <class T, bool Centred>
void backward_row(const NormBackward& p, const float* scale, Tangent* each, const Sums& out, int64_t index) {
  const int64_t n = p.size, tangents = p.stacks - 1;
  const float* stats = p.stats + index;
  const float* means = stats + p.stacks * p.rows;
  const T* x = reinterpret_cast<const T*>(p.x) + offset_of(p.x_rows, index);
  const float mean = Centred ? means[0] : 0.0f;
  const Row<T> row{x,    reinterpret_cast<const T*>(p.y_bar) + offset_of(p.y_rows, index), stats[0],
                   mean, mean_of<Centred>(x, n, mean), each};
  for (int64_t k = 0; k < tangents; ++k) {
    const float mean_x = Centred ? means[(1 + k) * p.rows] : 0.0f;
    each[k] = {0.0f, 0.0f, stats[(1 + k) * p.rows], mean_x, mean_of<Centred>(x + (1 + k) * p.x_stack, n, mean_x)};
  }
  float s = 0.0f, mean_a = 0.0f;
  int64_t k = tangents % 2;
  if (k == 1) backward_group<T, Centred, true, 1>(p, row, scale, out, 0, s, mean_a);
  else backward_group<T, Centred, true, 0>(p, row, scale, out, 0, s, mean_a);
  for (; k < tangents; k += 2) backward_group<T, Centred, false, 2>(p, row, scale, out, k, s, mean_a);
  if (!p.x_bar) return;
  const T* add = p.sum_bar ? reinterpret_cast<const T*>(p.sum_bar) + offset_of(p.sum_rows, index) : nullptr;
  T* x_bar = reinterpret_cast<T*>(p.x_bar) + index * n;
  if (tangents == 1) backward_write<T, Centred, true>(p, row, scale, add, x_bar, s, mean_a);
  else backward_write<T, Centred, false>(p, row, scale, add, x_bar, s, mean_a);
}

template <class T>
void backward_of(const NormBackward& p, const float* scale) {
  // Parameter gradients: two levels per share (64 rows, all rows), then the shares in their order.
  const int64_t n = p.size, padded = (n + 15) / 16 * 16, tangents = p.stacks - 1;
  const int64_t parts = p.threads > p.rows ? (p.rows > 0 ? p.rows : 1) : p.threads;
  Scratch<float> sums(parts * 4 * padded);
  Scratch<Tangent> scratch(parts * (tangents + 4));
  parallel_ranges(p.rows, p.threads, [&](int64_t first, int64_t last, int part) {
    float* mine = sums.get() + part * 4 * padded;
    const Sums near{p.w_bar ? mine : nullptr, p.b_bar ? mine + padded : nullptr};
    const Sums far{mine + 2 * padded, mine + 3 * padded};
    clear(mine, 4 * padded);
    Tangent* each = scratch.get() + part * (tangents + 4);
    for (int64_t row = first; row < last; ++row) {
      if (p.centred) backward_row<T, true>(p, scale, each, near, row);
      else backward_row<T, false>(p, scale, each, near, row);
      if ((row + 1 - first) % kSumRows == 0 || row + 1 == last) flush(near.w, far.w, n), flush(near.b, far.b, n);
    }
  });
  clear(p.w_bar, n), clear(p.b_bar, n);
  for (int64_t part = 0; part < parts && p.rows > 0; ++part) {
    if (p.w_bar) flush(sums.get() + (part * 4 + 2) * padded, p.w_bar, n);
    if (p.b_bar) flush(sums.get() + (part * 4 + 3) * padded, p.b_bar, n);
  }
}

void backward(const NormBackward& p) {
  Scratch<float> scale(p.size);
  fill_scale(p.weight, p.weight_dtype, p.offset, p.size, scale.get());
  if (p.dtype == DType::f32) backward_of<float>(p, scale.get());
  else if (p.dtype == DType::bf16) backward_of<bf16>(p, scale.get());
  else backward_of<f16>(p, scale.get());
}

}  // namespace

const NormKernels& norm_kernels() {
  static const NormKernels kernels{forward, backward};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
