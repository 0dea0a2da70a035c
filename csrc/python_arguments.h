// How Python's arguments become those of an entry point, for every module of entry points.
//
// A tensor is None or (data_ptr, dtype code, shape, strides in elements), see aajr_kernels/backends/cpu.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>

#include "registry.h"

namespace aajr {

namespace py = pybind11;

inline View view_of(const py::handle& item) {
  View v;
  if (item.is_none()) return v;
  if (!py::isinstance<py::tuple>(item) || py::len(item) != 4)
    fail("a tensor must be None or (data_ptr, dtype code, shape, strides).");
  const auto parts = py::cast<py::tuple>(item);
  const auto shape = py::cast<py::tuple>(parts[2]);
  const auto strides = py::cast<py::tuple>(parts[3]);
  const int dtype = py::cast<int>(parts[1]);
  if (dtype < 0 || dtype >= kDTypes) fail("there is no dtype code " + std::to_string(dtype) + ".");
  if (shape.size() > kMaxDims || shape.size() != strides.size())
    fail("a tensor must have at most " + std::to_string(kMaxDims) + " axes and one stride for each.");
  v.present = true;
  v.data = reinterpret_cast<char*>(py::cast<uintptr_t>(parts[0]));
  v.dtype = static_cast<DType>(dtype);
  v.dim = static_cast<int>(shape.size());
  bool empty = false;
  for (int i = 0; i < v.dim; ++i) {
    v.size[i] = py::cast<int64_t>(shape[i]);
    v.stride[i] = py::cast<int64_t>(strides[i]);
    if (v.size[i] < 0) fail("a tensor has a negative size.");
    empty = empty || v.size[i] == 0;
  }
  int64_t count = 1;
  for (int i = 0; i < v.dim && !empty; ++i) {
    if (count > INT64_MAX / item_size(v.dtype) / v.size[i]) fail("a tensor has more elements than memory has bytes.");
    count *= v.size[i];
  }
  if (!empty) {
    if (v.data == nullptr) fail("a tensor with elements has no memory.");
    if (reinterpret_cast<uintptr_t>(v.data) % item_size(v.dtype))
      fail("a tensor's memory is not aligned to its elements: clone() it.");
  }
  return v;
}

inline void call(const Registered& target, const py::tuple& tensors, const py::tuple& ints, const py::tuple& floats,
          int threads) {
  Args args;
  args.tensors.reserve(tensors.size());
  for (const auto& item : tensors) args.tensors.push_back(view_of(item));
  for (const auto& item : ints) args.ints.push_back(py::cast<int64_t>(item));
  for (const auto& item : floats) args.floats.push_back(py::cast<double>(item));
  // more could exhaust the system, and OpenMP would end the process
  args.threads = std::min(std::max(threads, 1), 1024);
  py::gil_scoped_release release;
  target.entry(args);
}

// Makes every registered entry point a function of the module.
inline void define_entries(py::module_& m) {
  for (const Registered& entry : registry()) {
    m.def(
        entry.name,
        [target = entry](const py::tuple& tensors, const py::tuple& ints, const py::tuple& floats, int threads) {
          call(target, tensors, ints, floats, threads);
        },
        py::arg("tensors"), py::arg("ints"), py::arg("floats"), py::arg("threads"), entry.doc);
  }
}

}  // namespace aajr
