"""Attention in suite `gpu`: forward and backward apart, beside torch's flash and cuDNN attention."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aajr_kernels.dual import Dual
from aajr_kernels.ops.attention import attention

from ..case import Case, Gradients, Run, Variant, draw, portion, true_portion
from ..roofline import Attention

SHAPES = {
    "full": Attention(1, 24, 24, 8192, 8192, 128),
    "causal": Attention(4, 32, 8, 4096, 4096, 128, causal=True),
}
#: milliseconds on an H100; a published kernel takes 16.7 and 90.7
MILLISECONDS = {"forward": 7.0, "backward": 28.0}
#: over torch's flash attention
RATIOS = {"forward": 3.3, "backward": 5.0}
#: products over the visible pairs that have to be done: plain, dual
PRODUCTS = {"forward": (2, 6), "backward": (5, 15)}


def on_h100() -> bool:
    return torch.cuda.is_available() and "H100" in torch.cuda.get_device_name()


def case(name: str, part: str, dtype: str, length: int, device: str) -> Case:
    default = SHAPES[name]
    item = getattr(torch, dtype).itemsize
    shape = dataclasses.replace(default, N=length, M=length, item=item)
    forward = part == "forward"
    plain_work = tuple(shape.plain_forward() if forward else shape.plain_backward())
    work = tuple(shape.forward() if forward else shape.backward())
    plain, dual = PRODUCTS[part]
    bounds: dict[str, float] = {}
    if name == "causal" and shape == default:
        bounds["ratio"] = RATIOS[part]
    elif shape == default and on_h100():
        bounds["ms"] = MILLISECONDS[part]
    make = functools.partial(functools.partial, name=name, part=part, dtype=dtype)
    truth = make(_truth, stacked=False)
    torch_ways = {
        "flash": (SDPBackend.FLASH_ATTENTION, False),
        "flash, keys repeated": (SDPBackend.FLASH_ATTENTION, True),
        "cuDNN": (SDPBackend.CUDNN_ATTENTION, False),
    }
    variants = [
        Variant(
            label,
            make(_plain, backend=backend, repeat=repeat, device=device),
            truth,
            optional=label != "flash",
            flops=plain * shape.product,
            work=plain_work,
        )
        for label, (backend, repeat) in torch_ways.items()
        if not repeat or shape.H != shape.HK
    ]
    variants.append(
        Variant(
            "dual",
            make(_dual, device=device),
            make(_truth, stacked=True),
            flops=dual * shape.product,
            work=work,
            bounds=bounds,
        )
    )
    config = {key: getattr(shape, key) for key in ("B", "H", "HK", "D", "causal")}
    return Case(
        "gpu",
        f"{name}-{part}",
        dtype,
        length,
        tuple(variants),
        base=tuple(v.name for v in variants if v.name.startswith("flash")),
        config={**config, "part": part},
        gate_length=min(length, 129),
        repeats=20,
        device=device,
        why=f"{part} of the dual ÷ torch's plain flash attention",
    )


def _inputs(length: int, name: str, dtype: str, stacked: bool) -> tuple[list[Tensor], Tensor]:
    """Leaves as projections leave them, ``[2, B, N, heads, D]`` or without the first axis, and the cotangent."""
    s = SHAPES[name]
    shapes = [(2, s.B, length, heads, s.D) for heads in (s.H, s.HK, s.HK, s.H)]
    *leaves, cotangent = (draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    if not stacked:
        leaves, cotangent = [x[0].clone() for x in leaves], cotangent[0].clone()
    return leaves, cotangent.transpose(-2, -3)


def _plain(
    length: int, name: str, part: str, dtype: str, backend: SDPBackend, repeat: bool, device: str
) -> Run:
    leaves, cotangent = _inputs(length, name, dtype, False)
    leaves = [x.to(device).requires_grad_() for x in leaves]
    shape = SHAPES[name]

    def forward() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in leaves)
        if repeat:
            k, v = (x.repeat_interleave(shape.H // shape.HK, dim=1) for x in (k, v))
        gqa = not repeat and shape.H != shape.HK
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=gqa)

    return portion(forward, leaves, cotangent.to(device), part)


def _dual(length: int, name: str, part: str, dtype: str, device: str) -> Run:
    leaves, cotangent = _inputs(length, name, dtype, True)
    leaves = [x.to(device).requires_grad_() for x in leaves]

    def forward() -> Tensor:
        out = attention(*(Dual(x.transpose(2, 3)) for x in leaves), causal=SHAPES[name].causal)
        assert isinstance(out, Dual)
        return out.stacked

    return portion(forward, leaves, cotangent.to(device), part)


def _formula(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v


def _truth(length: int, name: str, part: str, dtype: str, stacked: bool) -> Gradients:
    leaves, cotangent = _inputs(length, name, dtype, stacked)
    leaves = [x.double().requires_grad_() for x in leaves]
    function = functools.partial(_formula, causal=SHAPES[name].causal)
    if stacked:
        out = torch.stack(torch.func.jvp(function, tuple(x[0] for x in leaves), tuple(x[1] for x in leaves)))
    else:
        out = function(*leaves)
    return true_portion(out, leaves, cotangent.double(), part)
