// Rotary embedding. With (x1, x2) a pair of features and (c1, c2), (s1, s2) its entries in the tables,
//   y1 = c1 x1 − s1 x2,  y2 = c2 x2 + s2 x1
// and the transpose, which takes cotangents back, is x1 = c1 y1 + s2 y2, x2 = c2 y2 − s1 y1.
#include "rotary.h"

#include "parallel.h"
#include "rows.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

typedef uint64_t vpair __attribute__((vector_size(AAJR_VECTOR_BYTES)));

AAJR_INLINE vf swap_neighbours(vf x) {
  const vpair pairs = bit_cast<vpair>(x);
  return bit_cast<vf>(pairs << 32 | pairs >> 32);
}
AAJR_INLINE vf negate_even(vf x) { return bit_cast<vf>(bit_cast<vpair>(x) ^ (vpair{} + 0x80000000u)); }
AAJR_INLINE vf negate_odd(vf x) { return bit_cast<vf>(bit_cast<vpair>(x) ^ (vpair{} + (uint64_t{1} << 63))); }

template <class T, bool Interleaved, bool Transposed>
AAJR_INLINE void rotate_row(const T* x, T* y, const float* cos, const float* sin, int64_t size, int64_t rotated) {
  if (Interleaved) {
    walk<2>(0, rotated, [&](int64_t i, int, auto tag) AAJR_LAMBDA {
      const vf v = read(x + i, tag), s = read(sin + i, tag);
      const vf turned = Transposed ? negate_odd(swap_neighbours(v * s)) : negate_even(swap_neighbours(v)) * s;
      write(y + i, v * read(cos + i, tag) + turned, tag);
    });
  } else {
    const int64_t half = rotated / 2;
    walk<2>(0, half, [&](int64_t i, int, auto tag) AAJR_LAMBDA {
      const vf x1 = read(x + i, tag), x2 = read(x + half + i, tag);
      const vf s1 = read(sin + i, tag), s2 = read(sin + half + i, tag);
      write(y + i, x1 * read(cos + i, tag) + (Transposed ? x2 * s2 : -(x2 * s1)), tag);
      write(y + half + i, x2 * read(cos + half + i, tag) + (Transposed ? -(x1 * s1) : x1 * s2), tag);
    });
  }
  if (rotated < size) std::memcpy(y + rotated, x + rotated, (size - rotated) * sizeof(T));
}

// A table row in float32: where it lies, or converted into `buffer` unless the last one asked for is the same.
AAJR_INLINE const float* table_row(const char* table, DType dtype, int64_t offset, int64_t n, float* buffer,
                                   int64_t& held) {
  if (dtype == DType::f32) return reinterpret_cast<const float*>(table) + offset;
  if (held != offset) widen_row(table + 2 * offset, dtype, buffer, n);
  held = offset;
  return buffer;
}

template <class T, bool Interleaved, bool Transposed>
void rotate_rows(const Rotary& p) {
  const int64_t padded = (p.rotated + 15) / 16 * 16, inner = p.axes.size[p.axes.count - 1];
  const int last_axis = p.axes.count - 1;
  Scratch<float> buffers(p.threads * 2 * padded);
  parallel_ranges(p.rows, p.threads, [&](int64_t first, int64_t last, int part) {
    float* const buffer = buffers.get() + part * 2 * padded;
    int64_t held_cos = -1, held_sin = -1;
    for (int64_t row = first; row < last;) {
      const int64_t start = row % inner, run = inner - start < last - row ? inner - start : last - row;
      int64_t x = start * p.axes.x[last_axis], y = start * p.axes.y[last_axis];
      int64_t cos = start * p.axes.cos[last_axis], sin = start * p.axes.sin[last_axis];
      int64_t above = row / inner;
      for (int a = last_axis - 1; a >= 0; --a) {
        const int64_t index = above % p.axes.size[a];
        above /= p.axes.size[a];
        x += index * p.axes.x[a], y += index * p.axes.y[a];
        cos += index * p.axes.cos[a], sin += index * p.axes.sin[a];
      }
      for (int64_t i = 0; i < run; ++i) {
        const float* c = table_row(p.cos, p.table_dtype, cos, p.rotated, buffer, held_cos);
        const float* s = table_row(p.sin, p.table_dtype, sin, p.rotated, buffer + padded, held_sin);
        rotate_row<T, Interleaved, Transposed>(reinterpret_cast<const T*>(p.x) + x, reinterpret_cast<T*>(p.y) + y, c, s,
                                               p.size, p.rotated);
        x += p.axes.x[last_axis], y += p.axes.y[last_axis];
        cos += p.axes.cos[last_axis], sin += p.axes.sin[last_axis];
      }
      row += run;
    }
  });
}

template <class T>
void rotate_of(const Rotary& p) {
  if (p.interleaved) p.transposed ? rotate_rows<T, true, true>(p) : rotate_rows<T, true, false>(p);
  else p.transposed ? rotate_rows<T, false, true>(p) : rotate_rows<T, false, false>(p);
}

void rotate(const Rotary& p) {
  if (p.dtype == DType::f32) rotate_of<float>(p);
  else if (p.dtype == DType::bf16) rotate_of<bf16>(p);
  else rotate_of<f16>(p);
}

AAJR_INLINE void offsets(const RotaryAxes& axes, int64_t row, int64_t& x, int64_t& y) {
  for (int a = axes.count - 1; a >= 0; --a) {
    const int64_t index = row % axes.size[a];
    row /= axes.size[a];
    x += index * axes.x[a], y += index * axes.y[a];
  }
}

// cos_bar += ȳ x and sin_bar += ȳ rot(x) of one row
template <class T>
AAJR_INLINE void add_tables(const T* x, const T* g, float* cos_bar, float* sin_bar, int64_t rotated, bool interleaved) {
  const auto add = [](float* to, vf v, auto tag) AAJR_LAMBDA { write(to, read(to, tag) + v, tag); };
  if (interleaved) {
    walk<1>(0, rotated, [&](int64_t i, int, auto tag) AAJR_LAMBDA {
      const vf v = read(x + i, tag), w = read(g + i, tag);
      add(cos_bar + i, v * w, tag);
      add(sin_bar + i, negate_even(swap_neighbours(v)) * w, tag);
    });
    return;
  }
  const int64_t half = rotated / 2;
  walk<1>(0, half, [&](int64_t i, int, auto tag) AAJR_LAMBDA {
    const vf x1 = read(x + i, tag), x2 = read(x + half + i, tag);
    const vf g1 = read(g + i, tag), g2 = read(g + half + i, tag);
    add(cos_bar + i, g1 * x1, tag);
    add(cos_bar + half + i, g2 * x2, tag);
    add(sin_bar + i, -(g1 * x2), tag);
    add(sin_bar + half + i, g2 * x1, tag);
  });
}

template <class T>
void tables_of(const RotaryTables& p) {
  constexpr int64_t kSumRows = 64;  // two levels keep the float32 sums short
  const int64_t padded = (p.rotated + 15) / 16 * 16, n = p.rotated;
  Scratch<float> sums(p.threads * 2 * padded);
  parallel_ranges(p.tables, p.threads, [&](int64_t first, int64_t last, int part) {
    float* const near = sums.get() + part * 2 * padded;
    std::memset(near, 0, 2 * padded * sizeof(float));
    for (int64_t table = first; table < last; ++table) {
      float *cos_bar = p.cos_bar + table * n, *sin_bar = p.sin_bar + table * n;
      std::memset(cos_bar, 0, n * sizeof(float));
      std::memset(sin_bar, 0, n * sizeof(float));
      int64_t x0 = 0, y0 = 0;
      offsets(p.kept, table, x0, y0);
      for (int64_t row = 0; row < p.rows; ++row) {
        int64_t x = x0, y = y0;
        offsets(p.reduced, row, x, y);
        add_tables(reinterpret_cast<const T*>(p.x) + x, reinterpret_cast<const T*>(p.y_bar) + y, near, near + padded, n,
                   p.interleaved);
        if ((row + 1) % kSumRows && row + 1 < p.rows) continue;
        for (int64_t i = 0; i < n; ++i) {
          cos_bar[i] += near[i], sin_bar[i] += near[padded + i];
          near[i] = near[padded + i] = 0.0f;
        }
      }
    }
  });
}

void tables(const RotaryTables& p) {
  if (p.dtype == DType::f32) tables_of<float>(p);
  else if (p.dtype == DType::bf16) tables_of<bf16>(p);
  else tables_of<f16>(p);
}

}  // namespace

const RotaryKernels& rotary_kernels() {
  static const RotaryKernels kernels{rotate, tables};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
