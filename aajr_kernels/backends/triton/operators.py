"""The Triton launchers as operators of torch: see :mod:`aajr_kernels.backends.operator`."""

from __future__ import annotations

from .. import triton as gpu
from ..operator import Registry

operator = Registry(
    "triton", ("CPU", "CUDA"), gpu.dry_run
)  # CPU: Triton's interpreter; ROCm calls itself CUDA
#: "aajr::name" of every operator that was registered
names = operator.names
