"""Sensitivities of materialised outputs, in plain PyTorch."""

from __future__ import annotations

import torch


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _moments(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """p ``[*batch, V]`` and e = ż − μ ``[K, *batch, V]``."""
    z, z_tan = y[0], y[1:]
    p = z.softmax(-1)
    p = p / p.sum(
        -1, keepdim=True
    )  # torch's float32 softmax on a CPU is off by 3e-5 in its sum over 49k classes
    reference = z_tan.gather(-1, z.argmax(-1, keepdim=True).expand(*z_tan.shape[:-1], 1))
    e = z_tan - reference
    return p, e - (p * e).sum(-1, keepdim=True)


def sensitivity_fwd(y: torch.Tensor, metric: str) -> torch.Tensor:
    """q ``[K, *batch]`` in float32 (float64 for float64) of a stacked output ``[1 + K, *batch, V]``."""
    if metric in ("l2", "logits"):
        return _wide(y[1:]).square().sum(-1)
    p, e = _moments(_wide(y))
    weight = p if metric == "fisher" else p * p
    return (weight * e * e).sum(-1)


def sensitivity_bwd(q_bar: torch.Tensor, y: torch.Tensor, metric: str) -> torch.Tensor:
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
