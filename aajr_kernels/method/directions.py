"""Directions: normalising an adversary's gradient, and seeding a model called with token ids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..dual import Dual, dual
from .checks import check_choices, included, kind_of
from .places import changed
from .scopes import Groups, kept

__all__ = ["inject", "normalize"]

SCOPES = ("token", "sequence")


def normalize(g: torch.Tensor, scope: str = "token", mask: torch.Tensor | None = None) -> torch.Tensor:
    """Scale `g` to unit Euclidean norm per token or per sequence; zero stays zero.

    The norm is taken after division by the largest magnitude, so that gradients far below the square root of the
    smallest number keep their direction, and in float32 for lower dtypes.

    Args:
        g: ``[..., T, C]`` (or ``[B, C]``), floating point; typically a detached gradient.
        scope: ``"token"`` (the default, which goes with ``unit="token"``, that of :func:`aligned_penalty`), the norm
            over the last axis, or ``"sequence"``, over the last two (the last one when `g` has two axes).
        mask: the axes of `g` before the last, leading ones may be missing (``[B, T]`` for ``[K, B, T, C]``); bool or
            integer, nonzero = included. Masked entries are set to zero first, be they NaN.

    Returns:
        Tensor like `g`.

    Raises:
        TypeError: `g` is not a floating point tensor or `mask` is a float.
        ValueError: unknown scope, or a mask whose shape does not fit.
    """
    if isinstance(g, Dual) or not isinstance(g, torch.Tensor) or not g.is_floating_point():
        raise TypeError(f"g must be a plain floating point tensor, got {kind_of(g)}.")
    check_choices(SCOPES, scope=scope)
    if g.dim() == 0:
        raise ValueError("g must have at least one axis, got a 0-dimensional tensor.")
    if mask is not None:
        keep = included(mask, tuple(g.shape[-1 - mask.dim() : -1]), "mask").to(g.device)
        g = kept(g, keep.unsqueeze(-1))
    if g.numel() == 0:
        return g
    rows = g.reshape(-1, *g.shape[-1 if scope == "token" or g.dim() <= 2 else -2 :])
    return Groups("sequence", rows.shape).unit(rows).reshape(g.shape)


@contextlib.contextmanager
def inject(embedding_module: nn.Module, v: torch.Tensor) -> Iterator[None]:
    """Inside the block, `embedding_module` returns ``dual(output, v)``: call the model with token ids as usual.

    Args:
        embedding_module: the module whose output is the input of the policy, e.g. ``model.get_input_embeddings()``, or
            a layer inside the policy. It returns a tensor, or a tuple that starts with one, whose other entries stay.
        v: direction(s) shaped like that tensor ``[B, T, C]``, or ``[K, B, T, C]``.

    Raises:
        TypeError: the module is not an nn.Module or returns something else.
        RuntimeError: the block ended without a call of the module (no tangent was seeded).
    """
    if not isinstance(embedding_module, nn.Module):
        raise TypeError(f"embedding_module must be an nn.Module, got {type(embedding_module).__name__}.")
    calls = 0

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal calls
        calls += 1
        return changed(output, lambda y: dual(y, v), f"embedding_module ({type(module).__name__})")

    handle = embedding_module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if calls == 0:
        raise RuntimeError(
            f"embedding_module ({type(embedding_module).__name__}) was not called inside the block, so nothing "
            "carries a tangent: pass the module that embeds the tokens."
        )
