"""Layers whose forward calls the fused operations: subclasses of torch's own, with the same state dict.

Plain tensors give what torch's layers give; Duals give exact tangents. They are optional: torch's own layers are exact
under a Dual as well.
"""

from .layers import (
    GELU,
    GeGLU,
    LayerNorm,
    Linear,
    QuickGELU,
    ReLU,
    ReLU2,
    RMSNorm,
    Sigmoid,
    SiLU,
    SwiGLU,
    Tanh,
)

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
