"""Layers whose residual stream is summed inside their norms, forward and backward.

A layer runs its own forward on a :class:`Residual`: a Dual whose sum with the result of a block is left to whoever
asks for it. Mostly that is the next norm, which forms sum and norm in one pass, and in the backward the gradients of
both. A norm of the stream as it is passes the stream on, so that its two gradients meet in that norm's backward too.
This fits pre-norm layers, post-norm layers and those with four norms, with any arguments, caches and hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dual import Dual
from ...ops.norm import add_layer_norm, add_rms_norm, rms_norm

__all__ = ["Residual", "on_residuals", "rms_norm_of"]

_FUSED: dict[Any, Callable[..., Any]] = {F.layer_norm: add_layer_norm, F.rms_norm: add_rms_norm}


class Residual(Dual):
    """A Dual, or the sum of one and what a block computed, which is formed when it is needed."""

    def __init__(self, stacked: Tensor, branch: Dual | None = None) -> None:
        self._sum, self._branch = stacked, branch

    @property
    def stacked(self) -> Tensor:
        if self._branch is not None:
            branch, self._branch = self._branch, None
            self._sum = torch.add(Dual(self._sum), branch).stacked  # type: ignore[call-overload]
        return self._sum

    @stacked.setter
    def stacked(self, value: Tensor) -> None:
        self._sum, self._branch = value, None

    dtype = property(lambda self: self._sum.dtype)
    shape = property(lambda self: self._sum.shape[1:])

    def normed(self, add_norm: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The norm of the stream by ``add_rms_norm`` or ``add_layer_norm``, whose sum the stream goes on with."""
        y, total = add_norm(Dual(self._sum), self._branch, *args, **options)
        self.stacked = total.stacked
        return y

    def __add__(self, other: Any) -> Any:
        if type(other) is Dual and other.dtype == self.dtype and other.stacked.shape == self._sum.shape:
            return Residual(self.stacked, other)
        return Dual(self.stacked) + other

    __radd__ = __add__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FUSED and isinstance(args[0], cls):
            return args[0].normed(_FUSED[func], *args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def rms_norm_of(x: Any, *args: Any, **options: Any) -> Any:
    """``rms_norm``, in one pass with the sum where x is a residual stream."""
    return (
        x.normed(add_rms_norm, *args, **options) if isinstance(x, Residual) else rms_norm(x, *args, **options)
    )


@functools.cache
def on_residuals(own: Callable[..., Any]) -> Callable[..., Any]:
    """The forward `own` of a layer, its Duals as residual streams."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            args = tuple(map(_stream, args))
            kwargs = {name: _stream(value) for name, value in kwargs.items()}
        return _settled(own(self, *args, **kwargs))

    return forward


def _stream(value: Any) -> Any:
    return Residual(value.stacked) if type(value) is Dual else value


def _settled(output: Any) -> Any:
    if type(output) is tuple:
        return tuple(map(_settled, output))
    return Dual(output.stacked) if isinstance(output, Residual) else output
