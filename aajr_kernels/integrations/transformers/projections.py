"""Linear layers of one input, such as queries, keys and values, whose input gradient gathers in one buffer.

An attention module runs its own forward on a stand-in of itself: the same class and attributes, with those layers
computed in advance. Where one of them has a hook, an adapter, another forward than torch's or a weight that is a Dual,
and under autocast, all run as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...autocast import autocasting
from ...dual import Dual
from ...ops.linear import projections
from ...torch_private import has_hooks

__all__ = ["of_one_input", "one_by_one", "sharing"]

#: arguments that are attended to in the place of the tokens
_OTHERS = ("encoder_hidden_states", "key_value_states")

_Products = Callable[[Any, Sequence[nn.Module]], "Sequence[Any] | None"]


def of_one_input(x: Any, layers: Sequence[nn.Module]) -> Sequence[Any] | None:
    """Results of the linear layers for a Dual, by one op; None where they have to be called one by one."""
    if torch.compiler.is_compiling() or not isinstance(x, Dual) or not all(map(_is_bare, layers)):
        return None
    parameters: Any = [(layer.weight, layer.bias) for layer in layers]
    for weight, bias in parameters:
        if isinstance(weight, Dual) or isinstance(bias, Dual):
            return None
    if autocasting(x.stacked.device.type):
        return None
    return projections(x, parameters)


def one_by_one(x: Any, layers: Sequence[nn.Module]) -> Sequence[Any]:
    """The same by calls of any layers."""
    return [layer(x) for layer in layers]


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is torch's linear layer and no more."""
    own = type(module).forward is nn.Linear.forward and "forward" not in module.__dict__
    return own and not has_hooks(module)


class _Computed:
    """In the place of a linear layer: what it gives for `x`."""

    def __init__(self, layer: nn.Module, x: Any, y: Any) -> None:
        self.layer, self.x, self.y, self.has_grad = layer, x, y, torch.is_grad_enabled()

    def __call__(self, x: Any) -> Any:
        y, self.y = self.y, None  # not kept any longer than without the stand-in
        as_computed = y is not None and x is self.x and torch.is_grad_enabled() == self.has_grad
        return y if as_computed else self.layer(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


@functools.lru_cache(512)  # keys are of callers' classes
def sharing(
    own: Callable[..., Any], names: tuple[str, ...], products: _Products = of_one_input
) -> Callable[..., Any]:
    """The forward `own` of a module, with the layers of these names computed together where `products` can."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        layers = [getattr(self, name) for name in names]
        others = [name for name in _OTHERS if kwargs.get(name) is not None]
        results = None if others else products(x, layers)
        if results is not None:
            computed = {name: _Computed(layer, x, y) for name, layer, y in zip(names, layers, results)}
            twin = object.__new__(type(self))
            modules = {**self._modules, **computed}
            twin.__dict__.update(self.__dict__, _modules=modules)
            output = own(twin, *args, **kwargs)
            before = self.__dict__
            for name, value in twin.__dict__.items():  # what the forward noted on its module
                if before.get(name, computed) is not value and value is not modules:
                    before[name] = value
            return output
        return own(self, *args, **kwargs)

    return forward
