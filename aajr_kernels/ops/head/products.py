"""Products of low-precision matrices with float32 results, by the vendor's library."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in float32 (float64).

    A logit rounded to 16 bits would be off by up to eps / 2 of its size, and its probability by that times the logit.
    Asking for float32 results also keeps the library from adding parts of a long sum in the low dtype.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if (
        a.device.type == "cpu" or torch.compiler.is_compiling()
    ):  # no such product; nothing can be tried in a graph
        return a.float() @ b.float()
    if _offers(a.device, "mm"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b`` for a float32 (float64) `total`, in one kernel where the library can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type != "cpu" and not torch.compiler.is_compiling() and _offers(a.device, "addmm"):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += product(a, b)


@functools.cache
def _offers(device: torch.device, name: str) -> bool:
    """Whether this torch has the product with float32 results; early versions lack one or the other on a device."""
    a = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
    total = torch.ones((16, 16), dtype=torch.float32, device=device)
    try:
        if name == "mm":
            return bool((torch.mm(a, a, out_dtype=torch.float32) == 16.0).all())
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
        return bool((total == 17.0).all())  # not where a library forgets what was there
    except (RuntimeError, NotImplementedError, TypeError):
        return False
