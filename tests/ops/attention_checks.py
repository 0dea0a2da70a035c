"""Problems of attention, and the comparison of the op with the float64 forward mode of its formula."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from assertions import assert_exact
from torch import Tensor

from aajr_kernels.dual import Dual
from aajr_kernels.ops.attention import attention
from aajr_kernels.testing.formulas import attention as formula

FULL = (1, 1, 1)


@dataclass
class Case:
    """Leaves ``[1 | 1+K, ...]``: a leading 1 is a plain tensor, as `context_k` and `context_v` are."""

    leaves: dict[str, Tensor]
    mask: Tensor | None = None  # a boolean mask, which has no gradient

    def at(self, x: Tensor, index: int) -> Tensor:
        return x[index] if x.shape[0] > 1 else torch.zeros_like(x[0])

    @property
    def tangents(self) -> int:
        return max(x.shape[0] for x in self.leaves.values()) - 1

    def to(self, dtype: torch.dtype) -> Case:
        leaves = {n: x.detach().to(dtype).requires_grad_(x.requires_grad) for n, x in self.leaves.items()}
        return Case(leaves, self.mask)

    def ours(self, **options: Any) -> Tensor:
        args = {n: Dual(x) if x.shape[0] > 1 else x[0] for n, x in self.leaves.items()}
        if self.mask is not None:
            args["mask"] = self.mask
        if "context_k" in args:
            args["context"] = args.pop("context_k"), args.pop("context_v")
        out = attention(**args, **options)
        return out.stacked if isinstance(out, Dual) else out[None]

    def oracle(self, **options: Any) -> Tensor:
        names = list(self.leaves)

        def call(*values: Tensor) -> Tensor:
            args = dict(zip(names, values, strict=True))
            before = (args["context_k"], args["context_v"]) if "context_k" in args else None
            mask = args.get("mask", self.mask)
            return formula(args["q"], args["k"], args["v"], mask, context=before, **options)

        primals = tuple(x[0] for x in self.leaves.values())
        rows = [call(*primals)]
        for j in range(1, 1 + self.tangents):
            rows.append(torch.func.jvp(call, primals, tuple(self.at(x, j) for x in self.leaves.values()))[1])
        return torch.stack(rows)

    def gradients(self, out: Tensor, out_bar: Tensor) -> dict[str, Tensor | None]:
        grads = torch.autograd.grad(out, list(self.leaves.values()), out_bar, allow_unused=True)
        return dict(zip(self.leaves, grads, strict=True))


def make(
    tangents: tuple[int, int, int] = FULL,
    mask: tuple[int, ...] | str | None = None,
    *,
    sizes: tuple[int, ...] = (2, 4, 2, 13, 11, 5, 3),
    mask_tangents: int = 0,
    size: float = 1.0,
    context: int | None = None,
) -> Case:
    B, H, HK, N, M, D, V = sizes
    shapes = {"q": (B, H, N, D), "k": (B, HK, M, D), "v": (B, HK, M, V)}
    leaves = {
        name: size * torch.randn(1 + kk, *shape, dtype=torch.float64)
        for kk, (name, shape) in zip(tangents, shapes.items(), strict=True)
    }
    boolean = None
    if isinstance(mask, str):
        boolean = torch.rand(B, 1, N if mask == "square" else 1, (context or 0) + M) > 0.3
        boolean[0, 0, 0] = False  # an empty row, or a batch row without keys
    elif mask is not None:
        leaves["mask"] = torch.randn(1 + mask_tangents, *mask, dtype=torch.float64)
        leaves["mask"][0, ..., : M // 3].masked_fill_(
            torch.rand_like(leaves["mask"][0, ..., : M // 3]) > 0.6, -math.inf
        )
    if context is not None:
        for name, features in (("context_k", D), ("context_v", V)):
            leaves[name] = size * torch.randn(1, B, HK, context, features, dtype=torch.float64)
    return Case({n: x.requires_grad_() for n, x in leaves.items()}, boolean)


def check(case: Case, **options: Any) -> None:
    expected = case.oracle(**options)
    actual = case.ours(**options)
    assert_exact(actual, expected, "output", tolerance=1e-12, floor=1.0)
    out_bar = torch.randn_like(expected)
    expected_gradients, got = case.gradients(expected, out_bar), case.gradients(actual, out_bar)
    for name, gradient in expected_gradients.items():
        assert gradient is not None and got[name] is not None, name
        assert_exact(got[name], gradient, name, tolerance=1e-11, floor=1.0)


TANGENTS = [FULL, (3, 3, 3), (2, 0, 0), (0, 2, 0), (0, 0, 2), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
OPTIONS = [
    {},
    {"scale": 0.3, "softcap": 1.5},
    {"causal": True},
    {"causal": "lower_right", "softcap": 2.0},
    {"causal": "lower_right", "window": 3},
    {"causal": True, "window": 4, "softcap": 1.0},
]
