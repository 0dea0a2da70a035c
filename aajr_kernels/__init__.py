"""aajr_kernels: exact directional derivatives of transformers and the gradient of their squared size."""

from . import rules as _rules  # registers every rule
from .dual import Dual, dual, is_dual, jvp, unpack
from .runtime import (
    BackendUnavailable,
    Coverage,
    UnsupportedOperation,
    coverage,
    use_backend,
)

__version__ = "0.1.0"
