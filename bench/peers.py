"""Peers that are measured where they are installed.

``jvp-flash-attention`` (MIT) has Triton kernels for attention under PyTorch's forward mode. The step with it is
``torch.func.jvp`` of the unmodified model whose ``scaled_dot_product_attention`` is replaced. Like all forward modes of
PyTorch it is at the mercy of the other layers' derivatives; the column of gradient errors shows the effect.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

JVP_FLASH = "jvp-flash-attention"


def installed(name: str) -> bool:
    """Whether the package of a peer is there."""
    return importlib.util.find_spec(name.replace("-", "_")) is not None


class _Attention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _jvp_flash(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _jvp_flash(
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

    if not q.is_cuda:
        raise RuntimeError("jvp-flash-attention has kernels for CUDA devices only.")
    if enable_gqa or k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out: Tensor = JVPAttn.fwd_dual(q, k, v, attn_mask=attn_mask, causal=is_causal, sm_scale=scale)
    return out


@contextmanager
def jvp_flash_attention(active: bool = True) -> Iterator[None]:
    """Inside, PyTorch's attention is that package's, if `active`.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if active and not installed(JVP_FLASH):
        raise ModuleNotFoundError(f"{JVP_FLASH} is not installed: pip install {JVP_FLASH}.", name=JVP_FLASH)
    with _Attention() if active else nullcontext():
        yield


def device_peers() -> tuple[str, ...]:
    """Those that are installed, where there is a device for them."""
    return (JVP_FLASH,) if installed(JVP_FLASH) and torch.cuda.is_available() else ()
