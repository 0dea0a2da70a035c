"""Suite `attention`: the dual's forward and backward against torch's own plain attention."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aajr_kernels.dual import Dual
from aajr_kernels.ops.attention import attention

from ..case import Case, Gradients, Run, Selection, Suite, Variant, draw, has_kernels, portion, true_portion

HEADS, KEY_HEADS = 6, 2
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


def cases(selection: Selection) -> list[Case]:
    return [
        attention_case(features, dtype, n, selection)
        for features, lengths in LENGTHS.items()
        if selection.wants(f"d{features}")
        for dtype, n in selection.grid(("float32", "bfloat16"), lengths)
    ]


def attention_case(features: int, dtype: str, length: int, selection: Selection) -> Case:
    """Heads of so many features."""
    product = 2.0 * HEADS * length * (length + 1) / 2 * features
    judge = functools.partial(functools.partial, features=features, dtype=dtype, part=selection.part)
    make = functools.partial(judge, device=selection.device)
    truth, exact = judge(_plain_truth), judge(_dual_truth)
    bound = BOUNDS.get((features, dtype, length)) if selection.bounded else None
    plain, dual = (count * product for count in PRODUCTS[selection.part])
    # read and written once: q, k, v and out; then those and four gradients
    tensors = {"forward": 2, "backward": 4, "both": 6}[selection.part]
    item = getattr(torch, dtype).itemsize
    moved = float(tensors * item * length * (HEADS + KEY_HEADS) * features)
    variants = [
        Variant("plain", make(_plain), truth, flops=plain, bytes=moved),
        Variant("plain, keys repeated", make(_plain, repeat=True), truth, flops=plain, bytes=moved),
        Variant(
            "dual",
            make(_dual),
            exact,
            flops=dual,
            bytes=2 * moved,
            bounds={} if bound is None else {"ratio": bound},
        ),
    ]
    if has_kernels("attention", selection.device):
        variants.append(
            Variant("dual, reference", make(_dual), exact, backend="reference", rounds=3, peak=False)
        )
    if length <= 512:
        variants.append(
            Variant("torch.func.jvp", make(_forward_mode), exact, optional=True, rounds=3, peak=False)
        )
    return Case(
        "attention",
        f"d{features}",
        dtype,
        length,
        tuple(variants),
        base=("plain", "plain, keys repeated"),
        config={"B": 1, "H": HEADS, "HK": KEY_HEADS, "D": features, "causal": True},
        gate_length=min(length, 257),
        repeats=60 if length <= 1024 else 16,
        part=selection.part,
        device=selection.device,
        why="the dual ÷ torch's plain attention",
    )


def _inputs(length: int, features: int, dtype: str, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """Stacked q, k, v and the cotangent ``[2, B, N, heads, D]``, in memory as projections leave them."""
    shapes = [(2, 1, length, heads, features) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    *leaves, cotangent = (draw(*shape, dtype=dtype, seed=i).to(device) for i, shape in enumerate(shapes))
    return leaves, cotangent.transpose(2, 3)


def _plain(length: int, features: int, dtype: str, part: str, device: str, repeat: bool = False) -> Run:
    stacks, cotangent = _inputs(length, features, dtype, device)
    leaves = [x[0].clone().requires_grad_() for x in stacks]

    def forward() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in leaves)
        if repeat:
            k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat)

    return portion(forward, leaves, cotangent[0], part)


def _dual(length: int, features: int, dtype: str, part: str, device: str) -> Run:
    leaves, cotangent = _inputs(length, features, dtype, device)
    leaves = [x.requires_grad_() for x in leaves]

    def forward() -> Tensor:
        q, k, v = (Dual(x.transpose(2, 3)) for x in leaves)
        out = attention(q, k, v, causal=True)
        assert isinstance(out, Dual)
        return out.stacked

    return portion(forward, leaves, cotangent, part)


def _forward_mode(length: int, features: int, dtype: str, part: str, device: str) -> Run:
    leaves, cotangent = _inputs(length, features, dtype, device)
    leaves = [x.requires_grad_() for x in leaves]
    return portion(functools.partial(_forward_over, leaves, _sdpa), leaves, cotangent, part)


def _forward_over(leaves: list[Tensor], function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Value and tangent by PyTorch's forward mode, stacked."""
    primals, tangents = (tuple(x[i].transpose(1, 2) for x in leaves) for i in (0, 1))
    with sdpa_kernel(SDPBackend.MATH):
        return torch.stack(torch.func.jvp(function, primals, tangents))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def _plain_truth(length: int, features: int, dtype: str, part: str) -> Gradients:
    stacks, cotangent = _inputs(length, features, dtype)
    leaves = [x[0].double().requires_grad_() for x in stacks]
    out = _formula(*(x.transpose(1, 2) for x in leaves))
    return true_portion(out, leaves, cotangent[0].double(), part)


def _dual_truth(length: int, features: int, dtype: str, part: str) -> Gradients:
    stacks, cotangent = _inputs(length, features, dtype)
    leaves = [x.double().requires_grad_() for x in stacks]
    return true_portion(_forward_over(leaves, _formula), leaves, cotangent.double(), part)


SUITE = Suite("attention", "attention, causal, B1 H6 KV2, D64 and D128", ("d64", "d128"), cases)
