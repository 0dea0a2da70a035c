// The Python module aajr_kernels._native: every registered entry point as a function of (tensors, ints, floats,
// threads), and the choice of the CPU capability. Only this file, csrc/cuda/bindings.cpp and what they share know pybind11;
// nothing here knows torch.
#include "dispatch.h"
#include "python_arguments.h"
#include "scratch.h"
#ifdef _OPENMP
#include <omp.h>
#endif

PYBIND11_MODULE(_native, m) {
  using namespace aajr;
  m.doc() = "Native CPU kernels of aajr_kernels. Call them through aajr_kernels.ops.";
  define_entries(m);
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
