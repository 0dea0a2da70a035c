// Arguments from Python: views of tensors, and the checks that every entry point makes before it touches memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace aajr {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, boolean = 3, i64 = 4 };
constexpr int kDTypes = 5;

inline int64_t item_size(DType t) {
  switch (t) {
    case DType::f32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    case DType::boolean: return 1;
    case DType::i64: return 8;
  }
  return 0;
}

inline const char* dtype_name(DType t) {
  static const char* const names[] = {"float32", "bfloat16", "float16", "bool", "int64"};
  return names[static_cast<int>(t)];
}

inline bool is_floating(DType t) { return t == DType::f32 || t == DType::bf16 || t == DType::f16; }

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

constexpr int kMaxDims = 8;

// A borrowed tensor: strides count elements. `data == nullptr && !present` stands for Python's None.
struct View {
  char* data = nullptr;
  bool present = false;
  DType dtype = DType::f32;
  int dim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  explicit operator bool() const { return present; }
  template <class T>
  T* as() const { return reinterpret_cast<T*>(data); }
  int64_t numel() const {
    int64_t n = 1;
    // first, since the other sizes of an empty tensor may overflow
    for (int i = 0; i < dim; ++i)
      if (size[i] == 0) return 0;
    for (int i = 0; i < dim; ++i) n *= size[i];
    return n;
  }
  // Strides of a dense row-major tensor, whatever the strides of axes of size 1 are.
  bool contiguous_from(int axis) const {
    int64_t expected = 1;
    for (int i = dim - 1; i >= axis; --i) {
      if (size[i] != 1 && stride[i] != expected) return false;
      expected *= size[i];
    }
    return true;
  }
  bool contiguous() const { return numel() == 0 || contiguous_from(0); }
};

// The arguments of one call, in the order the entry point documents; threads >= 1.
struct Args {
  std::vector<View> tensors;
  std::vector<int64_t> ints;
  std::vector<double> floats;
  int threads = 1;
};

inline void check_count(const Args& a, size_t tensors, size_t ints, size_t floats) {
  if (a.tensors.size() != tensors || a.ints.size() != ints || a.floats.size() != floats)
    fail("expected " + std::to_string(tensors) + " tensors, " + std::to_string(ints) + " integers and " +
         std::to_string(floats) + " floats, got " + std::to_string(a.tensors.size()) + ", " +
         std::to_string(a.ints.size()) + " and " + std::to_string(a.floats.size()) + ".");
}

inline void check_shape(const View& v, const char* name, std::initializer_list<int64_t> shape) {
  bool same = v.present && v.dim == static_cast<int>(shape.size());
  int i = 0;
  for (int64_t n : shape) same = same && v.size[i++] == n;
  if (same) return;
  std::string got = "None", want;
  if (v.present) {
    got.clear();
    for (int j = 0; j < v.dim; ++j) got += (j ? ", " : "") + std::to_string(v.size[j]);
    got = "[" + got + "]";
  }
  for (int64_t n : shape) want += (want.empty() ? "" : ", ") + std::to_string(n);
  fail(std::string(name) + " must have shape [" + want + "], got " + got + ".");
}

inline void check_dtype(const View& v, const char* name, DType dtype) {
  if (v.present && v.dtype != dtype)
    fail(std::string(name) + " must be " + dtype_name(dtype) + ", got " + dtype_name(v.dtype) + ".");
}

inline void check_floating(const View& v, const char* name) {
  if (v.present && !is_floating(v.dtype))
    fail(std::string(name) + " must be float32, bfloat16 or float16, got " + dtype_name(v.dtype) + ".");
}

inline void check_contiguous(const View& v, const char* name) {
  if (v.present && !v.contiguous()) fail(std::string(name) + " must be contiguous.");
}

inline void check_last_stride(const View& v, const char* name) {
  if (v.present && v.dim && v.size[v.dim - 1] > 1 && v.stride[v.dim - 1] != 1 && v.numel() > 0)
    fail(std::string(name) + " must have stride 1 on its last axis.");
}

}  // namespace aajr
