"""Modules whose results are computed again in the backward: ``fuse(model, recompute=True)``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...recompute import recompute
from .forms import Replacement

__all__ = ["as_it_is", "recomputed"]

_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


def recomputed(replacement: Replacement) -> Replacement:
    """The same replacement, inside the context; where the module's own forward runs, its parts are replaced."""
    if replacement.function is None or replacement.runs_own:
        return replacement
    what, function = f"{replacement.what}, recomputed", _inside(replacement.function)
    return dataclasses.replace(replacement, what=what, function=function)


def as_it_is(module: nn.Module) -> Replacement | None:
    """The module's own forward, inside the context, for norms and activations that run on the rules of torch's."""
    kind = type(module)
    if isinstance(module, nn.LayerNorm):
        what = "layer norm"
    elif isinstance(module, nn.RMSNorm):
        what = "RMS norm"
    elif kind.__module__ in _ACTIVATIONS and not any(True for _ in module.children()):
        what = kind.__name__
    else:
        return None
    return Replacement(f"{what}, recomputed", _inside(kind.forward))


@functools.lru_cache(512)  # keys are of callers' classes
def _inside(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(self, *args, **kwargs)
        with recompute():
            return function(self, *args, **kwargs)

    return forward
