// Small problems for the self-test: tensors of random numbers, entry points called by name, results kept for comparison.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../registry.h"
#include "../view.h"

namespace aajr {
namespace selftest {

inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return h & 0x8000 ? -size : size;
}

// Of moderate size and exact: a multiple of 2^-7 below 8 is a number of all three types.
inline uint16_t float_to_half(float x) {
  if (x != x) return 0x7e00;
  if (x == 0.0f) return 0;
  int exponent;
  const float mantissa = std::frexp(std::fabs(x), &exponent);  // [1/2, 1)
  const int bits = static_cast<int>(mantissa * 2048.0f);
  return static_cast<uint16_t>((x < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | (bits & 1023));
}

// Entry points that some problem called.
inline std::set<std::string>& called() {
  static std::set<std::string> names;
  return names;
}

// One run of a problem. The same calls in the same order give the same inputs on every capability.
class Run {
 public:
  Run(DType dtype, int threads) : dtype_(dtype), threads_(threads) {}
  DType dtype() const { return dtype_; }

  View random(std::initializer_list<int64_t> shape, DType dtype, float size = 1.0f) {
    View v = memory(shape, dtype);
    for (int64_t i = 0; i < v.numel(); ++i) {
      // a sum of three uniform numbers is nearly normal; coarse, so that every type holds it
      int sum = 0;
      for (int j = 0; j < 3; ++j) sum += static_cast<int>(next() % 129) - 64;
      put(v, i, size * static_cast<float>(sum) / 64.0f);
    }
    return v;
  }
  View random(std::initializer_list<int64_t> shape, float size = 1.0f) { return random(shape, dtype_, size); }
  View integers(std::initializer_list<int64_t> values) {
    View v = memory({static_cast<int64_t>(values.size())}, DType::i64);
    int64_t i = 0;
    for (int64_t x : values) v.as<int64_t>()[i++] = x;
    return v;
  }
  View booleans(std::initializer_list<int64_t> shape) {
    View v = memory(shape, DType::boolean);
    for (int64_t i = 0; i < v.numel(); ++i) v.data[i] = next() % 4 != 0;
    return v;
  }
  // Every step-th of `count` elements from the first on.
  static void fill(const View& v, int64_t first, int64_t count, int64_t step, float x) {
    for (int64_t i = first; i < first + count; i += step) put(v, i, x);
  }
  // Memory for a result, filled with NaN (or zeros); compared afterwards if it has a name.
  View result(const char* name, std::initializer_list<int64_t> shape, DType dtype, bool zeroed = false) {
    View v = memory(shape, dtype);
    for (int64_t i = 0; i < v.numel(); ++i) put(v, i, zeroed ? 0.0f : NAN);
    if (name != nullptr) results_.push_back({name, v});
    return v;
  }
  View result(const char* name, std::initializer_list<int64_t> shape) { return result(name, shape, dtype_); }

  void call(const std::string& name, std::vector<View> tensors, std::initializer_list<int64_t> ints = {},
            std::initializer_list<double> floats = {}) const {
    for (const Registered& entry : registry())
      if (name == entry.name) {
        Args args;
        args.tensors = tensors, args.ints = ints, args.floats = floats, args.threads = threads_;
        {
          static std::mutex mutex;
          const std::lock_guard<std::mutex> lock(mutex);
          called().insert(name);
        }
        entry.entry(args);
        return;
      }
    throw std::runtime_error("there is no entry point " + name + ".");
  }

  struct Result {
    std::string name;
    View view;
  };
  const std::vector<Result>& results() const { return results_; }

  static float number(const View& v, int64_t i) {
    if (v.dtype == DType::f32) return v.as<float>()[i];
    const uint16_t bits = v.as<uint16_t>()[i];
    if (v.dtype == DType::f16) return half_to_float(bits);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }

 private:
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  static void put(const View& v, int64_t i, float x) {
    if (v.dtype == DType::f32) {
      v.as<float>()[i] = x;
    } else if (v.dtype == DType::f16) {
      v.as<uint16_t>()[i] = float_to_half(x);
    } else {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      v.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  View memory(std::initializer_list<int64_t> shape, DType dtype) {
    View v;
    v.present = true, v.dtype = dtype, v.dim = static_cast<int>(shape.size());
    int i = 0;
    for (int64_t n : shape) v.size[i++] = n;
    int64_t step = 1;
    for (i = v.dim - 1; i >= 0; --i) v.stride[i] = step, step *= v.size[i];
    memory_.emplace_back(static_cast<size_t>(v.numel() * item_size(dtype)) + 64);
    v.data = memory_.back().data();
    return v;
  }

  DType dtype_;
  int threads_;
  uint64_t state_ = 1;
  std::deque<std::vector<char>> memory_;
  std::vector<Result> results_;
};

// Largest relative difference of the results of two runs, in the Euclidean norm of each entry of the first axis, so
// that a large primal does not hide its tangents. What is tiny beside the largest entry refers to that one.
struct Difference {
  double error = 0.0;
  std::string name;
};

inline Difference difference(const Run& a, const Run& b) {
  Difference worst;
  worst.name = "none";
  for (size_t r = 0; r < a.results().size(); ++r) {
    const View &x = a.results()[r].view, &y = b.results()[r].view;
    const int64_t outer = x.dim > 1 ? x.size[0] : 1, inner = outer ? x.numel() / outer : 0;
    std::vector<double> apart(outer), size(outer);
    double largest = 0.0;
    for (int64_t i = 0; i < outer; ++i) {
      for (int64_t j = 0; j < inner; ++j) {
        const double p = Run::number(x, i * inner + j), q = Run::number(y, i * inner + j);
        if (p == q) {
          if (std::isfinite(p)) size[i] += q * q;
          continue;  // infinities too
        }
        apart[i] += (p - q) * (p - q), size[i] += q * q;
      }
      apart[i] = std::sqrt(apart[i]), size[i] = std::sqrt(size[i]);
      largest = size[i] > largest ? size[i] : largest;
    }
    for (int64_t i = 0; i < outer; ++i) {
      const double scale = size[i] > 1e-3 * largest ? size[i] : 1e-3 * largest;
      const double error = apart[i] == 0.0 ? 0.0 : apart[i] / scale;
      if (error > worst.error || error != error) {
        worst.error = error == error ? error : std::numeric_limits<double>::infinity();
        worst.name = a.results()[r].name + (outer > 1 ? "[" + std::to_string(i) + "]" : "");
      }
    }
  }
  return worst;
}

}  // namespace selftest
}  // namespace aajr
