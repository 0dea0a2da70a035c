"""Activations and gated products on stacked tensors, in plain PyTorch.

Large tensors are taken in blocks of rows that stay in cache, because every line is one pass over memory; low dtypes
are widened to float32 block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

POINTWISE = ("gelu", "gelu_tanh", "silu", "quick_gelu", "relu", "relu2", "tanh", "sigmoid")
GATES = ("silu", "gelu", "gelu_tanh")

_BLOCK_ELEMENTS = 1 << 20  # over all tensors of the call
_QUICK = 1.702
_GELU_SCALE = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def derivatives(kind: str, x: Tensor, order: int) -> tuple[Tensor, ...]:
    """``(f, f')`` or, for order 2, ``(f, f', f'')`` of an activation at x, float32 or float64."""
    result: tuple[Tensor, ...]
    if kind in ("relu", "relu2"):
        step = (x > 0).to(x.dtype)
        if kind == "relu":
            result = (x.relu(), step, torch.zeros_like(x) if order > 1 else x)
        else:
            positive = x.relu()
            result = (positive * positive, 2.0 * positive, 2.0 * step)
    elif kind == "tanh":
        t = x.tanh()
        slope = 1.0 - t * t
        result = (t, slope, -2.0 * t * slope if order > 1 else x)
    elif kind == "sigmoid":
        p = x.sigmoid()
        slope = p * (1.0 - p)
        result = (p, slope, slope * (1.0 - 2.0 * p) if order > 1 else x)
    elif kind == "gelu":
        near = x.clamp(-40.0, 40.0)  # beyond, the density is zero, and x² must not overflow
        # erfc keeps the negative tail, where 1 + erf cancels
        cdf = (near * -math.sqrt(0.5)).erfc_().mul_(0.5)
        square = near * near
        density = (square * -0.5).exp_().mul_(1.0 / math.sqrt(2.0 * math.pi))
        result = (x * cdf, cdf + near * density, density * (2.0 - square) if order > 1 else x)
    else:
        result = _x_sigmoid(kind, x, order)
    return result[: order + 1]


def _x_sigmoid(kind: str, x: Tensor, order: int) -> tuple[Tensor, ...]:
    """f = xσ(w(x)): silu with w = x, quick_gelu with w = βx, gelu's tanh form with (1 + tanh v)/2 = σ(2v).

    f' = σ + w' xs and f'' = 2w's + (w'' + (1−2σ)w'²) xs, with s = σ(1−σ). s is σ(w)σ(−w), because xw'² would enlarge
    what cancels in 1 − σ.
    """
    if kind == "gelu_tanh":
        near = x.clamp(-40.0, 40.0)  # beyond, σ is 0 or 1, and x³ must not overflow
        square = near * near
        w = ((square * _GELU_CUBIC + 1.0) * near).mul_(2.0 * _GELU_SCALE)
        p, rest = w.sigmoid(), w.neg().sigmoid_()
        slope = p * rest
        x_slope = x * slope
        w1 = (square * (3.0 * _GELU_CUBIC) + 1.0).mul_(2.0 * _GELU_SCALE)
        first = torch.addcmul(p, x_slope, w1)
        if order < 2:
            return x * p, first
        w2 = near.mul_(12.0 * _GELU_SCALE * _GELU_CUBIC)
        bend = rest.sub_(p).mul_(w1).mul_(w1).add_(w2)
        return x * p, first, slope.mul_(w1).mul_(2.0).addcmul_(x_slope, bend)
    beta = _QUICK if kind == "quick_gelu" else 1.0
    w = x * beta if beta != 1.0 else x
    p, rest = w.sigmoid(), w.neg().sigmoid_()
    slope = p * rest
    x_slope = x * slope
    first = p.add(x_slope, alpha=beta)
    if order < 2:
        return x * p, first
    return x * p, first, slope.mul_(2.0 * beta).addcmul_(x_slope, rest.sub_(p), value=beta * beta)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _over_tangents(x: Tensor) -> Tensor:
    """Sum over the leading axis of K; a view where K is 1."""
    return x[0] if x.shape[0] == 1 else x.sum(0)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors ``[S, *shape]`` in blocks of rows: views, and one block where that needs a copy or gains nothing."""
    first = tensors[0]
    if first.device.type == "cpu" and first.dim() > 2 and not torch.compiler.is_compiling():
        total = sum(t.numel() for t in tensors)
        if total > _BLOCK_ELEMENTS:
            try:
                rows = [t.view(t.shape[0], -1, t.shape[-1]) for t in tensors]
            except RuntimeError:
                rows = []
            if rows:
                count = rows[0].shape[1]
                step = max(1, _BLOCK_ELEMENTS * count // total)
                for start in range(0, count, step):
                    yield tuple(t[:, start : start + step] for t in rows)
                return
    yield tensors


def pointwise_fwd(x: Tensor, kind: str) -> Tensor:
    """Stacked ``f(x)`` and ``f'(x)∘ẋ_k`` of ``[1 + K, *shape]``."""
    y = torch.empty_like(x)
    for xs, ys in _blocks(x, y):
        f, f1 = derivatives(kind, _wide(xs[0]), 1)
        ys[0] = f
        torch.mul(xs[1:], f1, out=ys[1:])
    return y


def pointwise_bwd(y_bar: Tensor, x: Tensor, kind: str) -> Tensor:
    """Stacked cotangent of x, ``[1 + K, *shape]``."""
    x_bar = torch.empty_like(x)
    for gs, xs, out in _blocks(y_bar, x, x_bar):
        _, f1, f2 = derivatives(kind, _wide(xs[0]), 2)
        g = _wide(gs)
        primal = g[0] * f1
        if x.shape[0] > 1:
            primal.addcmul_(_over_tangents(g[1:] * xs[1:]), f2)
        out[0] = primal
        torch.mul(g[1:], f1, out=out[1:])
    return x_bar


def gated_fwd(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Stacked ``f(g)∘u`` and its tangents.

    Args:
        gate: ``[1 + K, *shape]``, or ``[1, *shape]`` without tangents.
        up: likewise.
        kind: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.

    Returns:
        ``[1 + K, *shape]``.
    """
    h = torch.empty_like(gate if gate.shape[0] > 1 else up)
    for gs, us, hs in _blocks(gate, up, h):
        f, f1 = derivatives(kind, _wide(gs[0]), 1)
        u = _wide(us[0])
        torch.mul(f, u, out=hs[0])
        if gs.shape[0] > 1:
            tangents = gs[1:] * f1.mul_(u)
            hs[1:] = tangents.addcmul_(_wide(us[1:]), f) if us.shape[0] > 1 else tangents
        elif us.shape[0] > 1:
            torch.mul(us[1:], f, out=hs[1:])
    return h


def gated_bwd(
    h_bar: Tensor, gate: Tensor, up: Tensor, kind: str, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Stacked cotangents of gate and up, shaped like them; None where not needed."""
    gate_bar = torch.empty_like(gate) if need_gate else None
    up_bar = torch.empty_like(up) if need_up else None
    outputs = [t for t in (gate_bar, up_bar) if t is not None]
    for hs, gs, us, *outs in _blocks(h_bar, gate, up, *outputs):
        f, f1, f2 = derivatives(kind, _wide(gs[0]), 2)
        u, h = _wide(us[0]), _wide(hs)
        slope = _over_tangents(h[1:] * gs[1:]) if gs.shape[0] > 1 else None  # Σ_k ḣ̄_k∘ġ_k
        if gate_bar is not None:
            out = outs.pop(0)
            primal = h[0] * u
            if us.shape[0] > 1:
                primal += _over_tangents(h[1:] * us[1:])
            primal *= f1
            if slope is not None:
                primal.addcmul_(slope, f2.mul_(u))
                torch.mul(h[1:], u * f1, out=out[1:])
            out[0] = primal
        if up_bar is not None:
            out = outs.pop(0)
            primal = h[0] * f
            if slope is not None:
                primal.addcmul_(slope, f1)
            out[0] = primal
            if us.shape[0] > 1:
                torch.mul(h[1:], f, out=out[1:])
    return gate_bar, up_bar
