"""Ops as the plain formulas of a textbook, on plain tensors, in their own dtype; :mod:`.oracle` has the norms.

Nothing here calls our ops or PyTorch's fused layers. Derivatives come only from PyTorch's forward mode and from
ordinary autograd through it. In float64 that is the truth an op is measured against; in a low dtype it is the eager
computation whose error an op may not much exceed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .oracle import masked_softmax


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def relu2(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * x, torch.zeros_like(x))


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, unsqueeze_dim: int) -> Tensor:
    """Rotation of the pairs (i, i + R/2), or (2i, 2i + 1) if interleaved, of the first R features."""
    size = cos.shape[-1]
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        partner = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        partner = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
    return torch.cat([turned * cos + partner * sin, rest], -1)


def allowed_positions(
    queries: int, keys: int, causal: bool | str, window: int | None, context: int = 0
) -> Tensor:
    """``[N, M]`` bool, True where the query may attend to the key; `context` of the keys come before the others."""
    # distance of a key behind its query; the diagonal starts in the upper left or ends in the lower right corner
    shift = keys - queries if causal == "lower_right" else context
    behind = torch.arange(queries).unsqueeze(1) + shift - torch.arange(keys)
    allowed = torch.ones(queries, keys, dtype=torch.bool) if not causal else behind >= 0
    return allowed if window is None else allowed & (behind < window)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    dropped: Tensor | None = None,
    context: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention with keys repeated over their query heads; a row that may see nothing gives zeros.

    `dropped` multiplies the weights: 0, or 1 / (1 - p), after a dropout. A context is put before keys and values.
    """
    before = 0 if context is None else context[0].shape[2]
    if context is not None:
        k, v = (torch.cat(pair, 2) for pair in zip(context, (k, v)))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = allowed_positions(q.shape[2], k.shape[2], causal, window, before).to(q.device)
    weights = masked_softmax(scores, allowed, mask)
    return (weights if dropped is None else weights * dropped) @ v


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Output of a language-model head, ``cap(scale (W h + b))``."""
    z = scale * F.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def fisher(z: Tensor, z_tan: Tensor) -> Tensor:
    """Σ p(ż − Σ pż)² of the last axis, p = softmax z, as model code would write it; the peers of benchmarks take it."""
    p = z.softmax(-1)
    return (p * (z_tan - (p * z_tan).sum(-1, keepdim=True)).square()).sum(-1)
