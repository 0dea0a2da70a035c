"""Options of a penalty, from q, one number per token, to the penalty, as one frozen object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dual import Dual
from .checks import check_choices, check_number, check_scalar, included
from .head import LMHead
from .scopes import UNITS, kept

__all__ = ["FORMS", "METRICS", "Metric", "PenaltyOptions"]

METRICS = ("l2", "logits", "fisher", "probs")
FORMS = ("squared", "hinge", "hinge2")
REDUCTIONS = ("mean", "sum", "none")

Metric = str | Callable[[Dual], Tensor]


@dataclass(frozen=True, eq=False)
class PenaltyOptions:
    """The arguments of the same names of :func:`~aajr_kernels.aligned_penalty`, checked.

    Raises:
        TypeError, ValueError: a type or a value is wrong.
    """

    metric: Metric = "fisher"
    head: LMHead | nn.Linear | None = None
    labels: Tensor | None = None
    gamma: float | None = None
    form: str = "squared"
    mask: Tensor | None = None
    unit: str = "token"
    reduction: str = "mean"
    denominator: float | Tensor | None = None
    return_primal: bool = False
    penalty_weight: float | Tensor | None = None

    def __post_init__(self) -> None:
        if not callable(self.metric):
            check_choices(METRICS, metric=self.metric)
        check_choices(FORMS, form=self.form)
        check_choices(UNITS, unit=self.unit)
        check_choices(REDUCTIONS, reduction=self.reduction)
        gamma, denominator = self.gamma, self.denominator
        if gamma is None and self.form != "squared":
            raise ValueError(f"gamma must be given with form={self.form!r}: the threshold on the root of q.")
        if gamma is not None:
            check_number("gamma", gamma, 0)
        if denominator is not None:
            if self.reduction != "mean":
                raise ValueError(
                    f"denominator applies to reduction='mean' only, got reduction={self.reduction!r}."
                )
            check_scalar("denominator", denominator)
            if not isinstance(denominator, Tensor) and not denominator > 0:
                raise ValueError(f"denominator must be positive, got {denominator}.")
        if self.penalty_weight is not None:
            check_scalar("penalty_weight", self.penalty_weight)

    def units(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """q ``[K, *units]`` that the form is applied to, from q ``[K, *batch]``, and the included units (None: all)."""
        keep = self.included(tuple(q.shape[1:]), q.device)
        if self.unit == "sequence" and q.dim() > 1:
            masked = kept(q, keep)
            q = masked.flatten(2).sum(-1) if q.dim() > 2 else masked
            keep = keep.flatten(1).any(-1) if keep is not None and keep.dim() > 1 else keep
        return q, keep

    @torch.no_grad()
    def observed(self, q: Tensor) -> Tensor:
        """:meth:`units` of q as ``[K, U]``, detached, NaN where a unit is not included."""
        units, keep = self.units(q.detach())
        units = units.reshape(len(units), -1)
        return units if keep is None else torch.where(keep.reshape(-1), units, torch.nan)

    def included(self, batch: tuple[int, ...], device: torch.device) -> Tensor | None:
        """The mask as bool ``[*batch]``, checked; None for all."""
        return None if self.mask is None else included(self.mask, batch, "mask").to(device)

    def reduce(self, q: Tensor) -> Tensor:
        """The penalty of q ``[K, *batch]``."""
        q, keep = self.units(q)
        values = kept(self.shaped(q), keep)
        if self.reduction == "none":
            return values
        total = values.sum()
        return total if self.reduction == "sum" else total / (q.shape[0] * self.divisor(q[0].numel(), keep))

    def divisor(self, count: int, keep: Tensor | None) -> Any:
        """The divisor of a mean over `count` units, of which `keep` are included."""
        if self.denominator is None:
            return max(count, 1) if keep is None else keep.sum().clamp(min=1)
        return self.denominator.reshape(()) if isinstance(self.denominator, Tensor) else self.denominator

    def shaped(self, q: Tensor) -> Tensor:
        """The form of every q; the root of q has derivative 0 at q = 0."""
        if self.gamma is None:
            return q
        if self.form == "squared":
            return torch.relu(q - self.gamma**2)
        root = torch.where(q > 0, torch.where(q > 0, q, 1.0).sqrt(), 0.0)
        excess = torch.relu(root - self.gamma)
        return excess if self.form == "hinge" else excess.square()

    def slope(self, q: Tensor) -> Tensor:
        """Derivative of the form at every q."""
        if self.gamma is None:
            return torch.ones_like(q)
        if self.form == "squared":
            return (q - self.gamma**2 > 0).to(q.dtype)
        root = torch.where(q > 0, q, 1.0).sqrt()
        excess = torch.where(q > 0, root - self.gamma, 0.0)
        return torch.where(excess > 0, (0.5 if self.form == "hinge" else excess) / root, 0.0)
