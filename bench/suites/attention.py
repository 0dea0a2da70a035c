"""Suite `attention`: the dual's forward and backward against torch's own plain attention.

Families `context` and `context-plain`: the last quarter of the positions on all of them, of which only that quarter has
tangents, in two parts or put together first.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aajr_kernels.dual import Dual
from aajr_kernels.ops.attention import attention
from aajr_kernels.testing import formulas

from ..case import PARTS, Case, Selection, Suite, Variant, draw, has_kernels
from ..roofline import Attention
from .op import Op

LENGTHS = {64: (512, 2048), 128: (2048,)}
#: (features, dtype, length) -> largest ratio to torch's plain attention
BOUNDS = {
    (64, "float32", 512): 1.25,
    (64, "float32", 2048): 2.0,
    (128, "float32", 2048): 2.2,
    (64, "bfloat16", 2048): 1.5,
}
#: family -> largest ratio to keys and values that are put together, by variant
CONTEXT_BOUNDS: dict[str, dict[str, float]] = {
    "context": {"dual, context": 0.75, "dual, context, fixed": 0.6},
    "context-plain": {"context": 0.85, "context, fixed": 0.6},
}
#: matrix products over the visible pairs: plain, dual
PRODUCTS = {"both": (7, 21), "forward": (2, 6), "backward": (5, 15)}
#: tensors that are read and written once: q, k, v and out; then those and four gradients
TENSORS = {"forward": 2, "backward": 4, "both": 6}


def cases(selection: Selection) -> list[Case]:
    usual = [
        _case(features, dtype, n, selection)
        for features, lengths in LENGTHS.items()
        if selection.wants(f"d{features}")
        for dtype, n in selection.grid(("float32", "bfloat16"), lengths)
    ]
    in_parts = [
        _context_case(family, dtype, n, selection)
        for family in CONTEXT_BOUNDS
        if selection.wants(family)
        for dtype, n in selection.grid(("float32",), (2048,))
    ]
    return usual + in_parts


def _case(features: int, dtype: str, length: int, selection: Selection) -> Case:
    """Causal attention of six heads with so many features, on two heads of keys and values."""
    shape = Attention(1, 6, 2, length, length, features, causal=True, item=getattr(torch, dtype).itemsize)
    bound = BOUNDS.get((features, dtype, length)) if selection.bounded else None
    plain = {"plain": torchs(shape), "plain, keys repeated": torchs(shape, repeat=True)}
    bounds = {} if bound is None else {"ratio": bound}
    made = variants(shape, dtype, selection.part, selection.device, plain, bounds)
    slow: Any = {"rounds": 3, "peak": False, "bounds": {}, "work": ()}
    if has_kernels("attention", selection.device):
        made.append(dataclasses.replace(made[2], name="dual, reference", backend="reference", **slow))
    if length <= 512:
        by_torch = op_of(shape, dtype, selection.part, selection.device).forward_mode(torchs(shape))
        made.append(dataclasses.replace(made[2], name="torch.func.jvp", make=by_torch, optional=True, **slow))
    return selection.case(
        *("attention", f"d{features}", dtype, length, made),
        base=tuple(plain),
        config=config(shape),
        gate_length=257,
        repeats=60 if length <= 1024 else 16,
        why="the dual ÷ torch's plain attention",
    )


def variants(
    shape: Attention,
    dtype: str,
    part: str,
    device: str,
    plain: Mapping[str, Callable[..., Tensor]],
    bounds: Mapping[str, float],
) -> list[Variant]:
    """Ways of torch to compute the plain attention, by name, of which all but the first are optional; the dual."""
    op = op_of(shape, dtype, part, device)
    truth, exact = op.truth(formula(shape)), op.dual_truth(formula(shape))
    plain_costs, dual_costs = (_costs(dataclasses.replace(shape, K=K), part) for K in (0, 1))
    by_torch = [
        Variant(name, op.plain(function), truth, optional=i > 0, **plain_costs)
        for i, (name, function) in enumerate(plain.items())
    ]
    return [*by_torch, Variant("dual", op.dual(ours(shape)), exact, bounds=bounds, **dual_costs)]


def _costs(shape: Attention, part: str) -> dict[str, Any]:
    """Arithmetic and traffic that are necessary, and the kernels of the roofline model."""
    return {
        "flops": PRODUCTS[part][shape.K] * shape.product,
        "bytes": TENSORS[part] * (1 + shape.K) * (shape.queries + shape.keys),
        "work": tuple(work for way in PARTS[part] for work in getattr(shape, way)()),
    }


def config(shape: Attention) -> dict[str, Any]:
    """The sizes, for the rows."""
    return {name: getattr(shape, name) for name in ("B", "H", "HK", "D", "causal")}


def op_of(shape: Attention, dtype: str, part: str, device: str) -> Op:
    """q, k, v and the cotangent ``[2, B, N, heads, D]``, in memory as projections leave them."""

    def inputs(length: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        sizes = [(2, shape.B, length, heads, shape.D) for heads in (shape.H, shape.HK, shape.HK, shape.H)]
        *leaves, cotangent = (draw(*size, dtype=dtype, seed=i) for i, size in enumerate(sizes))
        return leaves, [], cotangent.transpose(2, 3)

    return Op(inputs, part, device)


def ours(shape: Attention) -> Callable[..., Any]:
    """Our attention of Duals ``[B, N, heads, D]``."""
    return lambda *qkv: attention(*(Dual(x.stacked.transpose(2, 3)) for x in qkv), causal=shape.causal)


def torchs(
    shape: Attention, backend: SDPBackend | None = None, repeat: bool = False
) -> Callable[..., Tensor]:
    """Torch's attention, on the backend that it chooses unless one is named."""

    def function(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        if repeat:
            k, v = (x.repeat_interleave(shape.H // shape.HK, dim=1) for x in (k, v))
        grouped = not repeat and shape.H != shape.HK
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=grouped)

    return function


def formula(shape: Attention) -> Callable[..., Tensor]:
    """The same, written out."""

    def function(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return formulas.attention(q, k, v, causal=shape.causal)

    return function


def _context_case(family: str, dtype: str, n: int, selection: Selection) -> Case:
    """Queries, keys and values of the last quarter of n positions, on the context of all others.

    `fixed`: the context needs no gradient, as inside an attack.
    """
    B, H, HK, D = 1, 6, 2, 64

    def inputs(length: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        last = -(-length // 4)
        moving = [draw(2, B, last, heads, D, dtype=dtype, seed=i) for i, heads in enumerate((H, HK, HK))]
        before = [draw(B, length - last, HK, D, dtype=dtype, seed=3 + i) for i in range(2)]
        return moving, before, draw(2, B, last, H, D, dtype=dtype, seed=5).transpose(2, 3)

    def function(joined: bool, fixed: bool, formula: bool = False) -> Callable[..., Any]:
        def call(*operands: Any) -> Any:
            q, k, v, *before = (x.transpose(-2, -3) for x in operands)
            before = [x.detach() if fixed else x for x in before]
            if formula:
                return formulas.attention(q, k, v, context=(before[0], before[1]), causal=True)
            if not joined:
                return attention(q, k, v, context=(before[0], before[1]), causal=True)
            k, v = (torch.cat(pair, -2) for pair in zip(before, (k, v)))
            return attention(q, k, v, causal="lower_right")

        return call

    op = Op(inputs, selection.part, selection.device)
    plain = family.endswith("plain")
    run, truth, prefix = (op.plain, op.truth, "") if plain else (op.dual, op.dual_truth, "dual, ")
    bounds = CONTEXT_BOUNDS[family] if selection.bounded else {}
    made = [
        Variant(
            name := prefix + ("joined" if joined else "context") + ", fixed" * fixed,
            run(function(joined, fixed)),
            truth(function(joined, fixed, formula=True)),
            bounds={"ratio": bounds[name]} if name in bounds else {},
        )
        for fixed in (False, True)
        for joined in (True, False)
    ]
    return selection.case(
        *("attention", family, dtype, n, made),
        base=(made[0].name,),
        config={"B": B, "H": H, "HK": HK, "D": D, "causal": True},
        gate_length=257,
        repeats=16,
        why="two parts of keys and values ÷ put together",
    )


SUITE = Suite(
    "attention", "attention, causal, B1 H6 KV2, D64 and D128", ("d64", "d128", *CONTEXT_BOUNDS), cases
)
