"""Layers whose residual stream is summed inside their norms, forward and backward.

A layer runs its own forward on a :class:`Residual`: a Dual whose sum with the result of a block is left to whoever
asks for it. Mostly that is the next norm, which forms sum and norm in one pass, and in the backward the gradients of
both. A norm of the stream as it is passes the stream on, so that its two gradients meet in that norm's backward too.
This fits pre-norm layers, post-norm layers and those with four norms, with any arguments and caches. A stream changes
in its norm. Where something else may keep it, a hook of a module inside or the gradient checkpointing of transformers,
the layer runs on plain Duals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...coverage import recording
from ...dual import Dual, flatten_dual, is_dual, unflatten_dual
from ...ops.autograd import is_taken_down
from ...ops.between import Sum
from ...ops.norm import add_layer_norm, add_rms_norm, rms_norm
from ...torch_private import pytree, unhooked

__all__ = ["Residual", "on_residuals", "rms_norm_of"]

_FUSED: dict[Any, Callable[..., Any]] = {F.layer_norm: add_layer_norm, F.rms_norm: add_rms_norm}


class Residual(Dual):
    """A Dual, or the sum of one and what a block computed, which is formed when it is needed.

    It is formed in the grad mode of the addition, whatever mode its first reader is in.
    """

    def __init__(self, stacked: Tensor, branch: Dual | None = None) -> None:
        self._sum, self._branch, self._has_grad = stacked, branch, torch.is_grad_enabled()

    @property
    def stacked(self) -> Tensor:
        if self._branch is not None:
            if torch.is_grad_enabled() == self._has_grad:
                self.stacked = self._total(self._branch)
            else:
                with torch.inference_mode(False), torch.set_grad_enabled(self._has_grad):
                    self.stacked = self._total(self._branch)
        return self._sum

    @stacked.setter
    def stacked(self, value: Tensor) -> None:
        self._sum, self._branch = value, None

    def _total(self, branch: Dual) -> Tensor:
        # their stacks have one shape and dtype
        if not torch.compiler.is_compiling() and is_taken_down():
            total: Tensor = Sum.apply(self._sum, branch.stacked)
            return total
        if not recording():
            return torch.add(self._sum, branch.stacked)
        added: Dual = torch.add(Dual(self._sum), branch)  # type: ignore[call-overload]
        return added.stacked

    dtype = property(lambda self: self._sum.dtype)
    shape = property(lambda self: self._sum.shape[1:])

    def normed(self, add_norm: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The norm of the stream by ``add_rms_norm`` or ``add_layer_norm``, whose sum the stream goes on with."""
        if torch.is_grad_enabled() != self._has_grad:
            return add_norm(Dual(self.stacked), None, *args, **options)[0]
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
        others = (*args[1:], *(kwargs or {}).values())
        if func in _FUSED and args and isinstance(args[0], cls) and not any(map(is_dual, others)):
            return args[0].normed(_FUSED[func], *args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


# trees of streams are trees of Duals afterwards
pytree.register_pytree_node(
    Residual, flatten_dual, unflatten_dual, serialized_type_name="aajr_kernels.Residual"
)


def rms_norm_of(x: Any, *args: Any, **options: Any) -> Any:
    """``rms_norm``, in one pass with the sum where x is a residual stream."""
    return (
        x.normed(add_rms_norm, *args, **options) if isinstance(x, Residual) else rms_norm(x, *args, **options)
    )


@functools.lru_cache(512)  # keys are of callers' classes
def on_residuals(own: Callable[..., Any]) -> Callable[..., Any]:
    """The forward `own` of a layer, its Duals as residual streams."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_checkpointed(self) or unhooked(self) is None:
            return own(self, *args, **kwargs)
        streams: dict[int, Residual] = {}  # one for each Dual, however often it is given
        args = tuple(_stream(value, streams) for value in args)
        kwargs = {name: _stream(value, streams) for name, value in kwargs.items()}
        return _settled(own(self, *args, **kwargs))

    return forward


def _is_checkpointed(layer: Any) -> bool:
    return getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()


def _stream(value: Any, streams: dict[int, Residual]) -> Any:
    return streams.setdefault(id(value), Residual(value.stacked)) if type(value) is Dual else value


def _settled(output: Any) -> Any:
    """`output` with Duals in the place of streams."""
    if type(output) in (tuple, list):
        return type(output)(map(_settled, output))
    if isinstance(output, dict):
        for name, value in list(output.items()):
            if isinstance(value, Residual):
                output[name] = _settled(value)
    return Dual(output.stacked) if isinstance(output, Residual) else output
