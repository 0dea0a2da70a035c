"""The table of what is validated: every public op, and a whole policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from ...ops import activation
from ...ops.norm import add_layer_norm, add_rms_norm
from .. import formulas
from .attention import attention_cases
from .case import Case, Draw
from .layers import (
    add_norm_cases,
    gated_cases,
    layer_norm_cases,
    linear_cases,
    pointwise_cases,
    rms_norm_cases,
    rotary_cases,
)
from .outputs import lm_head_penalty_cases, sensitivity_cases
from .policy import policy_cases

#: op -> its cases; the last is a policy through the public penalty and the rules of unmodified PyTorch functions
OPS: dict[str, Callable[[Draw], Iterable[Case]]] = {
    "linear": linear_cases,
    "rms_norm": rms_norm_cases,
    "layer_norm": layer_norm_cases,
    "add_rms_norm": partial(add_norm_cases, add_rms_norm, formulas.rms_norm, "weight"),
    "add_layer_norm": partial(add_norm_cases, add_layer_norm, formulas.layer_norm, "weight bias"),
    "gelu": partial(pointwise_cases, activation.gelu, formulas.gelu, forms=("none", "tanh")),
    "silu": partial(pointwise_cases, activation.silu, formulas.silu),
    "relu": partial(pointwise_cases, activation.relu, formulas.relu),
    "relu2": partial(pointwise_cases, activation.relu2, formulas.relu2),
    "quick_gelu": partial(pointwise_cases, activation.quick_gelu, formulas.quick_gelu),
    "tanh": partial(pointwise_cases, activation.tanh, torch.tanh),
    "sigmoid": partial(pointwise_cases, activation.sigmoid, torch.sigmoid),
    "swiglu": partial(gated_cases, activation.swiglu, formulas.silu),
    "geglu": partial(gated_cases, activation.geglu, formulas.gelu, forms=("none", "tanh")),
    "rotary": rotary_cases,
    "attention": attention_cases,
    "lm_head_penalty": lm_head_penalty_cases,
    "sensitivity": sensitivity_cases,
    "aligned_penalty": policy_cases,
}
