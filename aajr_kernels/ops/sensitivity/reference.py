"""Sensitivities of materialised outputs, and softmax, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """p ``[*batch, V]`` and e = ż − μ ``[K, *batch, V]``."""
    z, z_tan = y[0], y[1:]
    p = z.softmax(-1)
    p = p / p.sum(
        -1, keepdim=True
    )  # torch's float32 softmax on a CPU is off by 3e-5 in its sum over 49k classes
    reference = z_tan.gather(-1, z.argmax(-1, keepdim=True).expand(*z_tan.shape[:-1], 1))
    e = z_tan - reference
    return p, e - (p * e).sum(-1, keepdim=True)


def sensitivity_fwd(y: Tensor, metric: str) -> Tensor:
    """q ``[K, *batch]`` in float32 (float64 for float64) of a stacked output ``[1 + K, *batch, V]``."""
    if metric in ("l2", "logits"):
        return _wide(y[1:]).square().sum(-1)
    p, e = _moments(_wide(y))
    weight = p if metric == "fisher" else p * p
    return (weight * e * e).sum(-1)


def sensitivity_bwd(q_bar: Tensor, y: Tensor, metric: str) -> Tensor:
    """Stacked cotangent of y; q_bar is ``[K, *batch]``."""
    g = q_bar.unsqueeze(-1)
    y_bar = torch.empty_like(y)
    if metric in ("l2", "logits"):
        y_bar[0] = 0
        y_bar[1:] = 2.0 * g * _wide(y[1:])
        return y_bar
    p, e = _moments(_wide(y))
    pe = p * e
    if metric == "fisher":
        q = (pe * e).sum(-1, keepdim=True)
        y_bar[0] = (g * (pe * e - q * p)).sum(0)
        y_bar[1:] = 2.0 * g * pe
    else:
        ppe = p * pe
        q, kappa = (ppe * e).sum(-1, keepdim=True), ppe.sum(-1, keepdim=True)
        y_bar[0] = (2.0 * g * (ppe * e - q * p - kappa * pe)).sum(0)
        y_bar[1:] = 2.0 * g * (ppe - kappa * p)
    return y_bar


def softmax_fwd(x: Tensor) -> Tensor:
    """Stacked p and ``p∘(ẋ_k − Σ p ẋ_k)`` of ``[1 + K, ..., V]``, along the last axis."""
    p, e = _moments(_wide(x))
    y = torch.empty_like(x)
    y[0] = p
    y[1:] = p * e
    return y


def softmax_bwd(y_bar: Tensor, x: Tensor) -> Tensor:
    """Stacked cotangent of x.

    With e = ẋ − μ and ν_k = Σ p ẏ̄_k: ``ẋ̄_k = p∘(ẏ̄_k − ν_k)`` and ``x̄ = p∘(a − Σ p a)``, where
    ``a = ȳ + Σ_k (ẏ̄_k − ν_k)∘e_k``. (The cotangent of p is a up to terms that p's own derivative annihilates.)
    """
    g = _wide(y_bar)
    p, e = _moments(_wide(x))
    above = g[1:] - (p * g[1:]).sum(-1, keepdim=True)
    a = g[0] + (above * e).sum(0)
    x_bar = torch.empty_like(x)
    x_bar[0] = p * (a - (p * a).sum(-1, keepdim=True))
    x_bar[1:] = p * above
    return x_bar
