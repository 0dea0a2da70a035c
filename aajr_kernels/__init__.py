"""Exact directional derivatives of transformers, and the gradient of their squared size.

The public names, once. See README.md for a tour and the docstrings for shapes, dtypes and errors.
"""

from .cli import waiting as _waiting  # noqa: F401  before torch is imported

# isort: split
from .rules import install as _install  # noqa: F401  all rules, in their order

# isort: split
from . import integrations, nn, training
from .backends.choice import backends, use_backend
from .backends.errors import BackendUnavailable, UnsupportedOperation
from .coverage import Coverage, coverage
from .dual import Dual, dual, is_dual, unpack
from .method import (
    LMHead,
    StabilityReport,
    Trajectory,
    aligned_penalty,
    ascend,
    graphed,
    inject,
    lm_kl,
    lm_loss,
    normalize,
    stability_report,
    trajectory_penalty,
)
from .ops.activation import geglu, gelu, quick_gelu, relu, relu2, sigmoid, silu, swiglu, tanh
from .ops.attention import attention
from .ops.head import lm_head_sensitivity
from .ops.linear import linear
from .ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .ops.rotary import rotary
from .ops.sensitivity import sensitivity
from .recompute import recompute
from .rules.leaving import strict
from .transforms import jvp, tuple_arguments

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Coverage",
    "Dual",
    "LMHead",
    "StabilityReport",
    "Trajectory",
    "UnsupportedOperation",
    "add_layer_norm",
    "add_rms_norm",
    "aligned_penalty",
    "ascend",
    "attention",
    "backends",
    "coverage",
    "dual",
    "geglu",
    "gelu",
    "graphed",
    "inject",
    "integrations",
    "is_dual",
    "jvp",
    "layer_norm",
    "linear",
    "lm_head_sensitivity",
    "lm_kl",
    "lm_loss",
    "nn",
    "normalize",
    "quick_gelu",
    "recompute",
    "relu",
    "relu2",
    "rms_norm",
    "rotary",
    "sensitivity",
    "sigmoid",
    "silu",
    "stability_report",
    "strict",
    "swiglu",
    "tanh",
    "training",
    "trajectory_penalty",
    "tuple_arguments",
    "unpack",
    "use_backend",
]
