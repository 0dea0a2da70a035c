// Softmax and the sensitivities of an output in memory, row by row. A row is read several times, but from cache: the
// largest logit first, then what depends on it, so that nothing cancels.
//
// With p = softmax(z), μ = Σ pż and c = ż − μ:
//   fisher  q = Σ pc²,   z̄ = Σ_k q̄ p(c² − q),            ż̄ = 2q̄ pc
//   probs   q = Σ p²c²,  z̄ = Σ_k 2q̄ p(pc² − q − κc),     ż̄ = 2q̄ p(pc − κ),  κ = Σ p²c
//   softmax ẏ = pc,      x̄ = p(a − Σ pa), a = ȳ + Σ_k (ẏ̄ − ν)c,  ẋ̄ = p(ẏ̄ − ν),  ν = Σ pẏ̄
// ż is taken relative to its value at the largest logit before anything is summed: a common offset drops out exactly.
#include "sensitivity.h"

#include "math.h"
#include "parallel.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

// body(i, load, store) for every vector of a row; load and store take an array, the last ones are partial.
struct Whole {
  template <class T>
  AAJR_INLINE vf load(const T* p) const { return AAJR_ARCH::load(p); }
  template <class T>
  AAJR_INLINE void store(T* p, vf x) const { AAJR_ARCH::store(p, x); }
};
struct Part {
  int64_t n;
  template <class T>
  AAJR_INLINE vf load(const T* p) const { return load_part(p, n); }
  template <class T>
  AAJR_INLINE void store(T* p, vf x) const { store_part(p, x, n); }
};
template <class Body>
AAJR_INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

// Σ term(i, io) over a row in four interleaved sums; a term must be zero where a partial load gives zeros.
template <class Term>
AAJR_INLINE float sum_over(int64_t n, const Term& term) {
  vf s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 += term(i, Whole{});
    s1 += term(i + W, Whole{});
    s2 += term(i + 2 * W, Whole{});
    s3 += term(i + 3 * W, Whole{});
  }
  for (; i + W <= n; i += W) s0 += term(i, Whole{});
  if (i < n) s1 += term(i, Part{n - i});
  return sum((s0 + s1) + (s2 + s3));
}

// The largest of n > 0 numbers and where it is first; NaN is passed over.
template <class T>
float largest(const T* z, int64_t n, int64_t& at) {
  constexpr int64_t block = 512;
  float best = -__builtin_inff();
  int64_t best_start = 0;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t count = n - start < block ? n - start : block;
    vf top = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + W <= count; i += W) top = vmax(load(z + start + i), top);
    if (i < count) top = vmax(load_part(z + start + i, count - i, -__builtin_inff()), top);
    const float value = maximum(top);
    if (value > best) best = value, best_start = start;
  }
  at = best_start;
  for (int64_t i = best_start; i < n && i < best_start + block; ++i)
    if (get(z + i) == best) {
      at = i;
      break;
    }
  return best;
}

// Terms of a row of softmax. `e` holds e^(z − largest) and p = e * inverse; c_k = (ż_k − reference[k]) − mean[k].
struct Row {
  int64_t n, tangents;
  float* e;
  float inverse;
  float *reference, *mean;
};

// Floats of scratch memory: `rows` rows and `per_tangent` numbers a tangent, in whole cache lines.
int64_t row_floats(int64_t n) { return (n + 31) / 16 * 16; }
int64_t scratch_floats(int64_t n, int rows, int64_t tangents, int per_tangent) {
  return rows * row_floats(n) + row_floats(tangents * per_tangent);
}

template <class T, class IO>
AAJR_INLINE vf centred(const Row& r, const T* z_tan, int64_t k, int64_t i, const IO& io) {
  return (io.load(z_tan + i) - r.reference[k]) - r.mean[k];
}

// Fills r.e, r.inverse, r.reference and r.mean; tangents follow the primal in steps of `stack`.
template <class T>
void prepare(Row& r, const T* z, int64_t stack) {
  int64_t at;
  const float top = largest(z, r.n, at);
  const float total = sum_over(r.n, [&](int64_t i, auto io) {
    io.store(r.e + i, exp(io.load(z + i) - top));
    return io.load(r.e + i);  // what lies behind the row counts for nothing
  });
  r.inverse = 1.0f / total;
  for (int64_t k = 0; k < r.tangents; ++k) {
    const T* z_tan = z + (k + 1) * stack;
    const float reference = get(z_tan + at);
    r.reference[k] = reference;
    r.mean[k] = r.inverse *
                sum_over(r.n, [&](int64_t i, auto io) { return io.load(r.e + i) * (io.load(z_tan + i) - reference); });
  }
}

template <class T>
float sum_of_squares(const T* x, int64_t n) {
  return sum_over(n, [&](int64_t i, auto io) {
    const vf value = io.load(x + i);
    return value * value;
  });
}

// q and, for probs, κ of one tangent.
template <class T>
float moment(const Row& r, const T* z_tan, int64_t k, RowMetric metric, float* kappa) {
  if (metric == RowMetric::fisher)
    return r.inverse * sum_over(r.n, [&](int64_t i, auto io) {
             const vf c = centred(r, z_tan, k, i, io);
             return io.load(r.e + i) * c * c;
           });
  const float squared = r.inverse * r.inverse;
  if (kappa)
    *kappa = squared * sum_over(r.n, [&](int64_t i, auto io) {
               const vf e = io.load(r.e + i);
               return e * e * centred(r, z_tan, k, i, io);
             });
  return squared * sum_over(r.n, [&](int64_t i, auto io) {
           const vf ec = io.load(r.e + i) * centred(r, z_tan, k, i, io);
           return ec * ec;
         });
}

// body(row, memory) for every row, with `floats` of scratch memory for each of the threads.
template <class Body>
void each_row(const RowLayout& layout, int64_t tangents, int threads, int64_t floats, const Body& body) {
  const int64_t rows = layout.rows();
  if (rows * layout.size * (1 + tangents) < 1 << 13) threads = 1;
  if (threads > rows) threads = static_cast<int>(rows);
  const Scratch<float> scratch(floats * threads);
  parallel_ranges(rows, threads, [&](int64_t first, int64_t last, int part) {
    for (int64_t row = first; row < last; ++row) body(row, scratch.get() + part * floats);
  });
}

template <class T>
T* row_of(const Stream& s, const RowLayout& layout, int64_t row) {
  return reinterpret_cast<T*>(s.data) + s.offset(layout, row);
}

template <class T>
struct Forward {
  static void run(const Sensitivity& p) {
    const int64_t n = p.layout.size, k_count = p.tangents, rows = p.layout.rows();
    const bool squares = p.metric == RowMetric::squares;
    each_row(p.layout, k_count, p.threads, scratch_floats(n, 1, k_count, 2), [&](int64_t row, float* memory) {
      const T* z = row_of<T>(p.y, p.layout, row);
      Row r{n, k_count, memory, 0.0f, memory + row_floats(n), memory + row_floats(n) + k_count};
      if (!squares) prepare(r, z, p.y.stack);
      for (int64_t k = 0; k < k_count; ++k) {
        const T* z_tan = z + (k + 1) * p.y.stack;
        p.q[k * rows + row] = squares ? sum_of_squares(z_tan, n) : moment(r, z_tan, k, p.metric, nullptr);
      }
    });
  }
};

template <class T>
struct Backward {
  static void squares(const Sensitivity& p) {
    const int64_t n = p.layout.size, rows = p.layout.rows();
    each_row(p.layout, p.tangents, p.threads, 0, [&](int64_t row, float*) {
      const T* y = row_of<T>(p.y, p.layout, row);
      T* out = row_of<T>(p.y_bar, p.layout, row);
      for_vectors(n, [&](int64_t i, auto io) { io.store(out + i, vf{}); });
      for (int64_t k = 0; k < p.tangents; ++k) {
        const float twice = 2.0f * p.q_bar[k * rows + row];
        const T* y_tan = y + (k + 1) * p.y.stack;
        T* tan_out = out + (k + 1) * p.y_bar.stack;
        for_vectors(n, [&](int64_t i, auto io) { io.store(tan_out + i, twice * io.load(y_tan + i)); });
      }
    });
  }

  static void run(const Sensitivity& p) {
    if (p.metric == RowMetric::squares) return squares(p);
    const int64_t n = p.layout.size, k_count = p.tangents, rows = p.layout.rows();
    const bool fisher = p.metric == RowMetric::fisher;
    each_row(p.layout, k_count, p.threads, scratch_floats(n, 1, k_count, 5), [&](int64_t row, float* memory) {
      const T* z = row_of<T>(p.y, p.layout, row);
      T* out = row_of<T>(p.y_bar, p.layout, row);
      float* lists = memory + row_floats(n);
      Row r{n, k_count, memory, 0.0f, lists, lists + k_count};
      float *q = lists + 2 * k_count, *kappa = lists + 3 * k_count, *twice = lists + 4 * k_count;
      prepare(r, z, p.y.stack);
      for (int64_t k = 0; k < k_count; ++k) {
        q[k] = moment(r, z + (k + 1) * p.y.stack, k, p.metric, kappa + k);
        twice[k] = 2.0f * p.q_bar[k * rows + row];
      }
      for_vectors(n, [&](int64_t i, auto io) {
        const vf prob = io.load(r.e + i) * r.inverse;
        vf total{};
        for (int64_t k = 0; k < k_count; ++k) {
          const vf c = centred(r, z + (k + 1) * p.y.stack, k, i, io);
          const vf weight = twice[k] * prob;
          if (fisher) {
            total += (0.5f * twice[k]) * ((prob * c) * c - prob * q[k]);  // no probability times an overflow
            io.store(out + (k + 1) * p.y_bar.stack + i, weight * c);
          } else {
            total += weight * ((prob * c - kappa[k]) * c - q[k]);
            io.store(out + (k + 1) * p.y_bar.stack + i, weight * (prob * c - kappa[k]));
          }
        }
        io.store(out + i, total);
      });
    });
  }
};

template <class T>
struct SoftmaxForward {
  static void run(const Softmax& p) {
    const int64_t n = p.layout.size, k_count = p.tangents;
    each_row(p.layout, k_count, p.threads, scratch_floats(n, 1, k_count, 2), [&](int64_t row, float* memory) {
      const T* x = row_of<T>(p.x, p.layout, row);
      T* y = row_of<T>(p.y, p.layout, row);
      Row r{n, k_count, memory, 0.0f, memory + row_floats(n), memory + row_floats(n) + k_count};
      prepare(r, x, p.x.stack);
      for_vectors(n, [&](int64_t i, auto io) {
        const vf prob = io.load(r.e + i) * r.inverse;
        io.store(y + i, prob);
        for (int64_t k = 0; k < k_count; ++k)
          io.store(y + (k + 1) * p.y.stack + i, prob * centred(r, x + (k + 1) * p.x.stack, k, i, io));
      });
    });
  }
};

template <class T>
struct SoftmaxBackward {
  static void run(const Softmax& p) {
    const int64_t n = p.layout.size, k_count = p.tangents;
    each_row(p.layout, k_count, p.threads, scratch_floats(n, 2, k_count, 3), [&](int64_t row, float* memory) {
      const T *x = row_of<T>(p.x, p.layout, row), *g = row_of<T>(p.y, p.layout, row);
      T* out = row_of<T>(p.x_bar, p.layout, row);
      float *a = memory + row_floats(n), *lists = memory + 2 * row_floats(n), *nu = lists + 2 * k_count;
      Row r{n, k_count, memory, 0.0f, lists, lists + k_count};
      prepare(r, x, p.x.stack);
      for (int64_t k = 0; k < k_count; ++k) {
        const T* g_tan = g + (k + 1) * p.y.stack;
        nu[k] = r.inverse * sum_over(n, [&](int64_t i, auto io) { return io.load(r.e + i) * io.load(g_tan + i); });
      }
      const float mean = r.inverse * sum_over(n, [&](int64_t i, auto io) {
        vf total = io.load(g + i);
        const vf e = io.load(r.e + i), prob = e * r.inverse;
        for (int64_t k = 0; k < k_count; ++k) {
          const vf above = io.load(g + (k + 1) * p.y.stack + i) - nu[k];
          total += above * centred(r, x + (k + 1) * p.x.stack, k, i, io);
          io.store(out + (k + 1) * p.x_bar.stack + i, prob * above);
        }
        io.store(a + i, total);
        return e * total;
      });
      for_vectors(n, [&](int64_t i, auto io) {
        io.store(out + i, io.load(r.e + i) * r.inverse * (io.load(a + i) - mean));
      });
    });
  }
};

template <template <class> class Kernel, class Task>
void with_dtype(const Task& p) {
  switch (p.dtype) {
    case DType::f32: return Kernel<float>::run(p);
    case DType::bf16: return Kernel<bf16>::run(p);
    default: return Kernel<f16>::run(p);
  }
}

}  // namespace

const SensitivityKernels& sensitivity_kernels() {
  static const SensitivityKernels kernels{with_dtype<Forward, Sensitivity>, with_dtype<Backward, Sensitivity>,
                                          with_dtype<SoftmaxForward, Softmax>, with_dtype<SoftmaxBackward, Softmax>};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
