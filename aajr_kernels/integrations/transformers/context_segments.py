"""Activation checkpointing with a cache: the layers are segments of ours.

The layers of transformers drop the cache they are given while they are checkpointed, because a cache that grows would
grow again in the backward. That of a shared context does not grow.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...backends.errors import UnsupportedOperation
from .library import checkpointed_layer_class

__all__ = ["segments"]


@contextlib.contextmanager
def segments(
    model: nn.Module, has_cache: bool, around: Callable[[], Any] = contextlib.nullcontext
) -> Iterator[None]:
    """Inside, layers that transformers would checkpoint without their cache are checkpointed with it.

    Args:
        model: whose layers they are.
        has_cache: nothing changes without one.
        around: makes the context in which a checkpointed layer runs, also when the backward runs it again.

    Raises:
        UnsupportedOperation: the model checkpoints by itself, not by layers.
    """
    flagged = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if not has_cache or not flagged:
        yield
        return
    layers = [m for m in flagged if isinstance(m, checkpointed_layer_class())]
    if not layers:
        raise UnsupportedOperation(
            f"{type(model).__name__} uses activation checkpointing that takes the cache away: call "
            "model.gradient_checkpointing_disable(), or leave shared_context() out."
        )
    own = {layer: layer.__dict__.get("forward") for layer in layers if layer.training}
    with _unflagged(flagged):
        try:
            if torch.is_grad_enabled():
                for layer in own:
                    layer.__dict__["forward"] = functools.partial(_segment, layer, layer.forward, around)
            yield
        finally:
            for layer, forward in own.items():
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.__dict__["forward"] = forward


def _segment(
    layer: nn.Module, forward: Callable[..., Any], around: Callable[[], Any], *args: Any, **kwargs: Any
) -> Any:
    def run(*tensors: Any) -> Any:
        with _unflagged([layer]), around():  # in the backward too, when the flag is there again
            return forward(*tensors, **kwargs)

    return checkpoint(run, *args, use_reentrant=False)


@contextlib.contextmanager
def _unflagged(modules: Iterable[Any]) -> Iterator[None]:
    flags = [(m, m.__dict__.get("gradient_checkpointing")) for m in modules]
    try:
        for m, _ in flags:
            m.gradient_checkpointing = False
        yield
    finally:
        for m, flag in flags:
            if flag is None:
                del m.gradient_checkpointing
            else:
                m.gradient_checkpointing = flag
