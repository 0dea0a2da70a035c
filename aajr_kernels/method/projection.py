"""Balls: projection onto one, and uniform draws from it, per scope.

An ``l2`` ball bounds the Euclidean norm of every group of a scope by the radius; an ``linf`` ball bounds every entry.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import capture
from .checks import is_number, kind_of
from .scopes import Groups, kept

__all__ = ["NORMS", "Ball", "checked_radius"]

NORMS = ("l2", "linf")


class Ball:
    """The set of perturbations: ‖δ‖ ≤ radius in every group.

    Args:
        norm: ``"l2"`` or ``"linf"``.
        radius: a number, or ``[B, 1]`` or ``[B, G]``.
        groups: the groups of the input.
    """

    def __init__(self, norm: str, radius: float | Tensor, groups: Groups) -> None:
        self.norm, self.radius, self.groups = norm, radius, groups

    def table(self, like: Tensor) -> Tensor:
        """The radius as ``[B, 1]`` or ``[B, G]``, dtype and device of `like`."""
        if isinstance(self.radius, Tensor):
            return self.radius.to(like)
        return like.new_full((self.groups.batch, 1), self.radius)

    def project(self, delta: Tensor) -> Tensor:
        """The nearest perturbation in the ball."""
        if not isinstance(self.radius, Tensor) and math.isinf(self.radius):
            return delta
        radius = self.table(delta)
        if self.norm == "linf":
            # by hand for agents: entries of no agent have no radius and are zero already
            bound = self.groups.broadcast(self._per_group(radius))
            return torch.minimum(torch.maximum(delta, -bound), bound)
        norm = self.groups.norm(delta)
        factor = torch.where(norm > radius, radius / torch.where(norm == 0, 1.0, norm), 1.0)
        return delta * self.groups.broadcast(factor)

    def reach(self, keep: Tensor | None, like: Tensor) -> Tensor:
        """Euclidean radius of the smallest l2 ball around every group's set, ``[B, G]``."""
        radius = self._per_group(self.table(like))
        return radius if self.norm == "l2" else radius * self._sizes(keep, like).sqrt()

    def draw(self, keep: Tensor | None, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """One perturbation, uniformly distributed in the ball; zero where nothing may be attacked.

        Args:
            keep: which entries may be attacked, broadcastable to `like`, or None; the others count as no dimension.
            like: gives shape, dtype and device.
            generator: any device; drawn there and moved.
        """
        device = like.device if generator is None else generator.device
        options: Any = dict(generator=generator, device=device, dtype=like.dtype)
        radius = self._per_group(self.table(like))
        if self.norm == "linf":
            noise = torch.rand(like.shape, **options).to(like.device) * 2 - 1
            return kept(noise, keep) * self.groups.broadcast(radius)
        noise = torch.randn(like.shape, **options).to(like.device)
        share = torch.rand(radius.shape, **options).to(like.device)
        # the volume inside radius r grows with r to the number of dimensions
        length = radius * share ** (1.0 / self._sizes(keep, like).clamp(min=1))
        return self.project(self.groups.unit(kept(noise, keep)) * self.groups.broadcast(length))

    def _per_group(self, radius: Tensor) -> Tensor:
        return radius.expand(self.groups.batch, self.groups.count)

    def _sizes(self, keep: Tensor | None, like: Tensor) -> Tensor:
        return self.groups.sum(kept(torch.ones_like(like), keep))


def checked_radius(radius: object, groups: Groups) -> float | Tensor:
    """`radius` as a number, ``[B, 1]`` or ``[B, G]``.

    Raises:
        TypeError: it is neither a number nor a floating point tensor.
        ValueError: it is not positive, or its shape does not fit.
    """
    if is_number(radius):
        if not radius > 0:
            raise ValueError(f"radius must be positive, got {radius}.")
        return float(radius)
    if not isinstance(radius, Tensor) or not radius.is_floating_point():
        raise TypeError(f"radius must be a number or a floating point tensor, got {kind_of(radius)}.")
    radius = radius.detach()
    b, g = groups.batch, groups.count
    captured = capture.reads_no_value(radius.device)
    if not captured and not bool((radius > 0).all()):
        raise ValueError(f"radius must be positive everywhere, got {radius.min().item()}.")
    if radius.dim() == 0:
        return radius.expand(b, 1) if captured else float(radius)
    if radius.shape == (b,):
        return radius.reshape(b, 1)
    if radius.shape in ((b, 1), (b, g)):
        return radius
    raise ValueError(
        f"radius must be a number, [{b}] (one per batch row) or [{b}, {g}] (one per group of the scope), got shape "
        f"{tuple(radius.shape)}."
    )
