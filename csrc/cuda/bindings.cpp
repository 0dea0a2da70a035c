// The Python module aajr_kernels._cuda, or _cuda_host where the kernels run on a CPU: the entry points, and what it was
// built for.
#include "../python_arguments.h"
#include "facts.h"

PYBIND11_MODULE(AAJR_CUDA_MODULE, m) {
  m.doc() = "CUDA C++ kernels of aajr_kernels. Call them through aajr_kernels.ops.";
  aajr::define_entries(m);
  if (aajr::cuda::on_host()) m.def("run_backwards", &aajr::cuda::run_backwards);
  m.attr("host") = aajr::cuda::on_host();
  m.attr("architectures") = aajr::cuda::architectures();
  m.attr("toolkit") = aajr::cuda::toolkit();
  m.attr("tile") = aajr::cuda::kTile;
}
