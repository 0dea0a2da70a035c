"""Checks that several ops make of their weights; every error is one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.errors import UnsupportedOperation
from ..dual import Dual


def refuse_duals(op: str, instead: str, **weights: object) -> None:
    """UnsupportedOperation where a weight is a Dual; `instead`: how to write the op then, ``{name}`` for the weight."""
    for name, value in weights.items():
        if isinstance(value, Dual):
            raise UnsupportedOperation(
                f"{op}: {name} is a Dual, and this op takes plain weights: {instead.format(name=name)}, or pass "
                f"{name}.primal where no tangent is wanted."
            )


def check_dtypes(op: str, of: str, dtypes: tuple[torch.dtype, ...], **weights: Tensor | None) -> None:
    """RuntimeError where the dtype of a weight is not among `dtypes`, the first of which is the operand's, `of`."""
    for name, value in weights.items():
        if value is not None and value.dtype not in dtypes:
            raise RuntimeError(
                f"{op}: {name} must have the dtype of {of} ({dtypes[0]}), got {value.dtype}: cast one of them."
            )
