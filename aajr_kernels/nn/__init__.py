"""Layers whose forward calls the fused operations: subclasses of torch's own, with the same state dict.

Plain tensors give what torch's layers give; Duals give exact tangents. They are optional: torch's own layers are exact
under a Dual as well.
"""

from .activation import GELU, QuickGELU, ReLU, ReLU2, Sigmoid, SiLU, Tanh
from .gated import GeGLU, SwiGLU
from .linear import Linear
from .norm import LayerNorm, RMSNorm

__all__ = [
    "GELU",
    "GeGLU",
    "LayerNorm",
    "Linear",
    "QuickGELU",
    "RMSNorm",
    "ReLU",
    "ReLU2",
    "SiLU",
    "Sigmoid",
    "SwiGLU",
    "Tanh",
]
