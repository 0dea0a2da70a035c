"""Peers that are measured where they are installed.

``jvp-flash-attention`` (MIT) has Triton kernels for attention under PyTorch's forward mode. The step with it is
``torch.func.jvp`` of the unmodified model whose ``scaled_dot_product_attention`` is replaced. Like all forward modes of
PyTorch it is at the mercy of the other layers' derivatives; the column of gradient errors shows the effect.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

JVP_FLASH = "jvp-flash-attention"


class JVPFlashAttention(TorchFunctionMode):
    """Inside, PyTorch's attention is that package's, which has kernels for CUDA devices only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = _attention if func is F.scaled_dot_product_attention else func
        return function(*args, **(kwargs or {}))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    from jvp_flash_attention.jvp_attention import JVPAttn

    if enable_gqa or k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out: Tensor = JVPAttn.fwd_dual(q, k, v, attn_mask=attn_mask, causal=is_causal, sm_scale=scale)
    return out


def device_peers() -> tuple[str, ...]:
    """Those that are installed, where there is a device for them."""
    there = importlib.util.find_spec("jvp_flash_attention") is not None
    return (JVP_FLASH,) if there and torch.cuda.is_available() else ()
