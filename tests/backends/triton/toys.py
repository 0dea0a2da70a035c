"""Small kernels that are right, and some that break the rules on purpose."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from aajr_kernels.backends.triton import launch as gpu


@triton.jit
def _product_kernel(a, b, c, size, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for t in range(0, size, K):
        x = tl.load(a + i[:, None] * S + (t + k)[None, :])
        y = tl.load(b + (t + k)[:, None] * S + j[None, :])
        total = tl.dot(x, y, total)
    tl.store(c + i[:, None] * S + j[None, :], total.to(c.dtype.element_ty))


@triton.jit
def _broken_kernel(a, S: tl.constexpr):
    tl.static_assert(S < 0, "broken on purpose")


@triton.jit
def ordered_sum_kernel(x, total):
    """Every program adds its number to a total: the sum depends on who comes first."""
    tl.store(total, tl.load(total) + tl.load(x + tl.program_id(0)))


@dataclass(frozen=True)
class Toy:
    kernel: Any
    sizes: dict[str, int]
    options: dict[str, int]
    count: int = 3

    def run(self) -> None:
        x = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
        pointers = [x] * self.count
        gpu.launch(
            self.kernel,
            (1,),
            x.device,
            *pointers,
            *([256] if self.count == 3 else []),
            S=256,
            **self.sizes,
            **self.options,
        )


_product = functools.partial(Toy, _product_kernel)
CONFIGS = {
    "good": _product({"M": 128, "N": 128, "K": 64}, {"num_warps": 8, "num_stages": 2}),
    "spills": _product({"M": 128, "N": 128, "K": 64}, {"num_warps": 8, "num_stages": 2, "maxnreg": 64}),
    "too much shared memory": _product({"M": 128, "N": 256, "K": 128}, {"num_warps": 8, "num_stages": 3}),
    "small products": _product({"M": 16, "N": 64, "K": 64}, {"num_warps": 4, "num_stages": 2}),
    "serialised": _product({"M": 128, "N": 256, "K": 32}, {"num_warps": 4, "num_stages": 2}),
    "broken": Toy(_broken_kernel, {}, {"num_warps": 4}, 1),
}
