"""Activations and gated products on stacked tensors, by the native CPU kernels; contracts as in reference.py.

Tensors are read in place whatever their strides. Kernels run along the last axis, so the axes are put in the order of
the output's strides if that is not the dense one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import cpu as native
from . import operators
from .reference import POINTWISE

_CODES = {kind: code for code, kind in enumerate(POINTWISE)}


def _dense_rows(t: Tensor | None) -> bool:
    return (
        t is None or t.dim() < 2 or ((t.stride(-1) == 1 or t.shape[-1] == 1) and t.dim() <= native.MAX_AXES)
    )


def _call(name: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor | None, ...], code: int) -> None:
    """Run `name` on tensors whose last axis is dense in all of them; a copy of an input is the last resort."""
    if all(map(_dense_rows, inputs)) and all(map(_dense_rows, outputs)):
        native.call(name, (*inputs, *outputs), (code,))
        return
    guide: Any = next(t for t in outputs if t is not None)
    if (
        guide.dim() > native.MAX_AXES
    ):  # two axes are enough for any output, since it is dense; others are copied
        results = [None if t is None else t.new_empty(t.shape) for t in outputs]
        flat = [None if t is None else t.flatten(1) for t in results]
        native.call(name, (*(t.flatten(1) for t in inputs), *flat), (code,))
        for t, result in zip(outputs, results):
            if t is not None and result is not None:
                t.copy_(result)
        return
    order = [0, *sorted(range(1, guide.dim()), key=lambda axis: -guide.stride(axis))]
    inputs = tuple(t.permute(order) for t in inputs)
    inputs = tuple(t if _dense_rows(t) else t.contiguous() for t in inputs)
    native.call(name, (*inputs, *(None if t is None else t.permute(order) for t in outputs)), (code,))


@native.operator(operators.POINTWISE_FWD)
def pointwise_fwd(x: Tensor, kind: str) -> Tensor:
    y = native.empty_like(x)
    _call("pointwise_fwd", (x,), (y,), _CODES[kind])
    return y


@native.operator(operators.POINTWISE_BWD)
def pointwise_bwd(y_bar: Tensor, x: Tensor, kind: str) -> Tensor:
    x_bar = native.empty_like(x)
    _call("pointwise_bwd", (x, y_bar), (x_bar,), _CODES[kind])
    return x_bar


@native.operator(operators.GATED_FWD)
def gated_fwd(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    h = native.empty_like(gate if gate.shape[0] > 1 else up)
    _call("gated_fwd", (gate, up), (h,), _CODES[kind])
    return h


@native.operator(operators.GATED_BWD)
def gated_bwd(
    h_bar: Tensor, gate: Tensor, up: Tensor, kind: str, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    gate_bar = native.empty_like(gate) if need_gate else None
    up_bar = native.empty_like(up) if need_up else None
    if need_gate or need_up:
        _call("gated_bwd", (gate, up, h_bar), (gate_bar, up_bar), _CODES[kind])
    return gate_bar, up_bar
