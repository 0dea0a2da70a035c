"""Tests which dtypes Triton's interpreter multiplies correctly."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import interpreted, launch


@triton.jit
def _product_kernel(x: Any, y: Any, SIZE: tl.constexpr) -> None:
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    a = tl.load(x + at)
    tl.store(y + at, tl.dot(a, a).to(y.dtype.element_ty))


@functools.cache
def exact_bfloat16() -> bool:
    """Whether bfloat16 can be validated: always on a device; Triton's interpreter multiplies its bits as integers."""
    if not interpreted():
        return True
    # 1/3 has no short representation, so that a cast which cuts bits off is seen too
    x = torch.full((16, 16), 1 / 3).bfloat16()
    y = torch.zeros_like(x)
    launch(_product_kernel, (1,), x.device, x, y, SIZE=16)
    return torch.equal(y, (x.float() @ x.float()).bfloat16())
