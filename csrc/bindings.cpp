// The Python module aajr_kernels._native: every registered entry point as a function of (tensors, ints, floats,
// threads), and the choice of the CPU capability. This is the only file that knows pybind11; nothing here knows torch.
//
// A tensor is None or (data_ptr, dtype code, shape, strides in elements), see aajr_kernels/native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>

#include "dispatch.h"
#include "registry.h"
#include "scratch.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace aajr {

namespace {

View view_of(const py::handle& item) {
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

void call(const Registered& target, const py::tuple& tensors, const py::tuple& ints, const py::tuple& floats,
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

}  // namespace
}  // namespace aajr

PYBIND11_MODULE(_native, m) {
  using namespace aajr;
  m.doc() = "Native CPU kernels of aajr_kernels. Call them through aajr_kernels.ops.";
  for (const Registered& entry : registry()) {
    m.def(
        entry.name,
        [target = entry](const py::tuple& tensors, const py::tuple& ints, const py::tuple& floats, int threads) {
          call(target, tensors, ints, floats, threads);
        },
        py::arg("tensors"), py::arg("ints"), py::arg("floats"), py::arg("threads"), entry.doc);
  }
  m.def("capability", [] { return std::string(capability_name(current_capability())); },
        "Name of the CPU capability in use.");
  m.def(
      "prefer_large_pages",
      [](uintptr_t memory, size_t bytes) { prefer_large_pages(reinterpret_cast<void*>(memory), bytes); },
      py::arg("memory"), py::arg("bytes"), "Ask for large pages for memory that is about to be written.");
  m.def("set_capability", &set_capability, py::arg("name"), "Use another capability from now on.");
  m.def("capabilities", [] {
    std::vector<std::pair<std::string, bool>> all;
    for (Capability c : capabilities()) all.emplace_back(capability_name(c), capability_runs(c));
    return all;
  }, "(name, whether this processor runs it) of every capability this build holds, in ascending order.");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;  // names itself
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
}
