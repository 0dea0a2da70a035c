"""Layers with a residual stream, found by their structure: those that add to it and normalise it."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .decoder import by_form, form_of
from .forms import Replacement, find
from .library import pretrained_model_class
from .registry import Calls
from .residual import on_residuals
from .verify import linear_sizes

__all__ = ["residual_sums"]


def residual_sums(module: nn.Module, dtype: torch.dtype, recompute: bool = False) -> Replacement | None:
    """The replacement of a layer that adds to what it normalises; None for other modules.

    Where it has a :class:`.decoder.Form` it runs by that, unless its results are to be computed again.

    A candidate has norms and linear layers in it. Where its forward adds to no residual stream that a norm of its own
    takes, there is nothing to fuse.
    """
    norms = {
        name: forward for name, child in module.named_children() if (forward := _norm_forward(child, dtype))
    }
    linear = any(linear_sizes(part) for part in module.modules())
    if not norms or not linear or isinstance(module, pretrained_model_class()):
        return None
    own = type(module).forward
    layers = [isinstance(getattr(module, name), nn.LayerNorm) for name in norms]
    op = "add_layer_norm" if all(layers) else "add_rms_norm"
    configs = (part.__dict__.get("config") for part in module.modules())
    config = next((config for config in configs if hasattr(config, "_attn_implementation")), None)
    hidden = next((w.numel() for name in norms if (w := getattr(module, name).weight) is not None), None)
    if hidden is None:
        return None
    calls = Calls(module, config, hidden)
    width = next((sizes[0] for child in module.children() if (sizes := linear_sizes(child))), hidden)
    trial = calls.trial(module, dtype, width)
    if trial.reason:
        return Replacement(
            "residual sums", reason=f"residual sums: {type(module).__name__}.forward {trial.reason}"
        )
    body = on_residuals(own)

    def fused(twin: Any, x: Any) -> Any:
        with _replaced(twin, norms):
            return calls.method(body)(twin, x)

    count = trial.count(fused, op)
    if not count:
        return None
    difference = trial.difference(fused, op, count)
    reason = (
        ""
        if difference is None
        else f"residual sums: {type(module).__name__}.forward differs: {difference[1]}"
    )
    if reason:
        return Replacement("residual sums", reason=reason, runs_own=True)
    if not recompute:
        known = [getattr(module, name) for name in norms]
        form = form_of(
            module,
            trial,
            calls,
            lambda part: part in known or _norm_forward(part, dtype) is not None,
            lambda twin: _replaced(twin, norms),
        )
        body = body if form is None else by_form(body, form)
    return Replacement("residual sums", body, runs_own=True)


def _norm_forward(module: nn.Module, dtype: torch.dtype) -> Callable[..., Any] | None:
    """How a norm runs in a fused model, or None for what is no norm or is left as it is."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return type(module).forward
    replacement = find(module, dtype) if not module._modules and len(module._parameters) == 1 else None
    return replacement.function if replacement is not None and replacement.what == "RMS norm" else None


@contextlib.contextmanager
def _replaced(twin: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    children = {name: twin.get_submodule(name) for name in forwards}
    for name, child in children.items():
        child.__dict__["forward"] = types.MethodType(forwards[name], child)
    try:
        yield
    finally:
        for child in children.values():
            del child.__dict__["forward"]
