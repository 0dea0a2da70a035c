"""Suite `attention`: the dual's forward and backward against torch's own plain attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aajr_kernels.dual import Dual
from aajr_kernels.ops.attention import attention
from aajr_kernels.testing import formulas

from ..case import Case, Selection, Suite, Variant, draw, has_kernels
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
#: matrix products over the visible pairs: plain, dual
PRODUCTS = {"both": (7, 21), "forward": (2, 6), "backward": (5, 15)}
#: tensors that are read and written once: q, k, v and out; then those and four gradients
TENSORS = {"forward": 2, "backward": 4, "both": 6}


def cases(selection: Selection) -> list[Case]:
    return [
        attention_case(features, dtype, n, selection)
        for features, lengths in LENGTHS.items()
        if selection.wants(f"d{features}")
        for dtype, n in selection.grid(("float32", "bfloat16"), lengths)
    ]


def attention_case(features: int, dtype: str, length: int, selection: Selection) -> Case:
    """Causal attention of six heads with so many features, on two heads of keys and values."""
    item = getattr(torch, dtype).itemsize
    shape = Attention(1, 6, 2, length, length, features, causal=True, item=item)
    op = op_of(shape, dtype, selection.part, selection.device)
    truth, exact = op.truth(formula(shape)), op.dual_truth(formula(shape))
    bound = BOUNDS.get((features, dtype, length)) if selection.bounded else None
    plain, dual = (count * shape.product for count in PRODUCTS[selection.part])
    moved = TENSORS[selection.part] * (shape.queries + shape.keys)
    bounds = {} if bound is None else {"ratio": bound}
    variants = [
        Variant("plain", op.plain(torchs(shape)), truth, flops=plain, bytes=moved),
        Variant(
            "plain, keys repeated", op.plain(torchs(shape, repeat=True)), truth, flops=plain, bytes=moved
        ),
        Variant("dual", op.dual(ours(shape)), exact, flops=dual, bytes=2 * moved, bounds=bounds),
    ]
    slow: Any = {"rounds": 3, "peak": False}
    if has_kernels("attention", selection.device):
        variants.append(Variant("dual, reference", op.dual(ours(shape)), exact, backend="reference", **slow))
    if length <= 512:
        by_torch = op.forward_mode(torchs(shape))
        variants.append(Variant("torch.func.jvp", by_torch, exact, optional=True, **slow))
    return selection.case(
        *("attention", f"d{features}", dtype, length, variants),
        base=("plain", "plain, keys repeated"),
        config=config(shape),
        gate_length=257,
        repeats=60 if length <= 1024 else 16,
        why="the dual ÷ torch's plain attention",
    )


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


SUITE = Suite("attention", "attention, causal, B1 H6 KV2, D64 and D128", ("d64", "d128"), cases)
