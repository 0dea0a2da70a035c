"""The stability report: its quantities, and its output."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .. import files

__all__ = ["StabilityReport"]


def _mean(values: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """Mean of the finite values (of those in `where`); NaN when there are none."""
    values = values.double()
    keep = torch.isfinite(values) if where is None else torch.isfinite(values) & where
    return values[keep].mean().item() if keep.any() else math.nan


def _number(value: float) -> float | None:
    """JSON has neither infinity nor NaN: null."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class StabilityReport:
    """Per step t and batch row b of an ascent; detached tensors ``[T, B]`` unless it says otherwise.

    What was not measured is None.

    Attributes:
        losses: ``[T + 1, B]``, the loss at every point.
        gains: increase of the loss in each step.
        displacement_norms: ‖Δ‖ of the realised displacement.
        moved: bool, Δ ≠ 0; fractions are of these steps.
        non_monotone: bool, the loss fell by more than rounding.
        projected: bool, the projection moved the step.
        alignment: ``[T − 1, B]``, cosine of successive directions; NaN where one is zero.
        kappa: κ, the largest negative curvature measured along the segment, ≥ 0.
        kappa_positive: κ⁺, the largest positive one, ≥ 0.
        slopes: ⟨∇g, Δ⟩ at the start of the segment.
        violated: bool, κ‖Δ‖² > 2⟨∇g, Δ⟩: the step is not known to be monotone.
        eta_max: the largest step size, in the ascent's own unit, that the condition admits; infinite where κ = 0 and
            NaN for a projected sign step, which no step size makes safe.
        sensitivity: largest √q along the segment in its own direction d.
        gauss_newton: bound of the first term of the curvature, L_out q.
        second_order: bound of the second, G_out ‖D²f[d,d]‖.
        smoothness: their sum, L_eff along the segment.
        smoothness_at_gamma: the same where the penalty's threshold is met by directions along the segment: with γ² for
            the q of u, which is longer than d where several groups have norm 1, and for each of the row's units in
            the unit ``"token"``.
        hinge_active: fraction of the units with √q > γ along uₜ.
        sandwich_lower: ‖Jᵀ∇L‖/‖∇L‖.
        sandwich_middle: ‖Ju‖.
        spectral_norm: ‖J‖₂, from below by power iteration, or exact.
        expansion: how the distance of the ascents from two starts grew in each step; NaN where it was zero.
    """

    losses: torch.Tensor
    gains: torch.Tensor
    displacement_norms: torch.Tensor
    moved: torch.Tensor
    non_monotone: torch.Tensor
    projected: torch.Tensor
    alignment: torch.Tensor
    kappa: torch.Tensor | None = None
    kappa_positive: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    violated: torch.Tensor | None = None
    eta_max: torch.Tensor | None = None
    sensitivity: torch.Tensor | None = None
    gauss_newton: torch.Tensor | None = None
    second_order: torch.Tensor | None = None
    smoothness: torch.Tensor | None = None
    smoothness_at_gamma: torch.Tensor | None = None
    hinge_active: torch.Tensor | None = None
    sandwich_lower: torch.Tensor | None = None
    sandwich_middle: torch.Tensor | None = None
    spectral_norm: torch.Tensor | None = None
    expansion: torch.Tensor | None = None

    @property
    def unexplained(self) -> torch.Tensor | None:
        """Bool ``[T, B]``: the condition held and the loss fell all the same. Then the sampled κ was too small."""
        return None if self.violated is None else self.non_monotone & ~self.violated

    def summary(self) -> dict[str, float]:
        """One number for each measured quantity, over all steps that moved and all rows; NaN where there are none."""
        summary = {
            "loss_start": _mean(self.losses[0]),
            "loss_end": _mean(self.losses[-1]),
            "moved_fraction": _mean(self.moved),
            "non_monotone_fraction": _mean(self.non_monotone, self.moved & torch.isfinite(self.gains)),
            "projected_fraction": _mean(self.projected, self.moved),
            "displacement_norm": _mean(self.displacement_norms, self.moved),
            "alignment": _mean(self.alignment),
        }
        if self.kappa is not None:
            assert self.violated is not None and self.unexplained is not None and self.eta_max is not None
            assert self.kappa_positive is not None
            kappa, positive = self.kappa[self.moved], self.kappa_positive[self.moved]
            finite = self.eta_max[self.moved & torch.isfinite(self.eta_max)]
            summary["kappa"] = _mean(self.kappa, self.moved)
            summary["kappa_max"] = kappa.max().item() if kappa.numel() else math.nan
            summary["kappa_positive"] = _mean(self.kappa_positive, self.moved)
            summary["kappa_positive_max"] = positive.max().item() if positive.numel() else math.nan
            summary["eta_max_smallest"] = finite.min().item() if finite.numel() else math.inf
            summary["violated_fraction"] = _mean(self.violated, self.moved)
            summary["unexplained_fraction"] = _mean(self.unexplained, self.moved)
        of_steps = "sensitivity gauss_newton second_order smoothness smoothness_at_gamma expansion".split()
        for name in of_steps:
            if (value := getattr(self, name)) is not None:
                summary[name] = _mean(value, self.moved)
        for name in ("hinge_active", "sandwich_lower", "sandwich_middle", "spectral_norm"):
            if (value := getattr(self, name)) is not None:
                summary[name] = _mean(value)
        return summary

    def per_step(self) -> dict[str, list[float]]:
        """Mean over the batch of every measured quantity, one value per step (one less for ``alignment``)."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: [_mean(row) for row in value] for name, value in columns.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ``summary``, and the ``steps`` of :meth:`per_step`. Infinite and undefined values are None."""
        return {
            "summary": {name: _number(value) for name, value in self.summary().items()},
            "steps": {name: [_number(value) for value in row] for name, row in self.per_step().items()},
        }

    def log(self, writer: Any, step: int, prefix: str = "stability") -> None:
        """Write to TensorBoard: ``prefix/name`` for the summary, ``prefix/name/step_t`` for every ascent step.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter`` (anything with ``add_scalar``), or a folder, in which
                one is opened and closed; that needs the package tensorboard.
            step: the training step.
            prefix: of all tags.
        """
        if isinstance(writer, (str, os.PathLike)):
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(os.fspath(writer)) as opened:
                self.log(opened, step, prefix)
            return
        if not hasattr(writer, "add_scalar"):
            raise TypeError(f"writer must be a SummaryWriter or a folder, got {type(writer).__name__}.")
        for name, value in self.summary().items():
            if math.isfinite(value):
                writer.add_scalar(f"{prefix}/{name}", value, step)
        for name, row in self.per_step().items():
            for t, value in enumerate(row):
                if math.isfinite(value):
                    writer.add_scalar(f"{prefix}/{name}/step_{t}", value, step)

    def append_jsonl(self, path: str | Path, step: int, **entries: Any) -> None:
        """Append one JSON line: ``step``, `entries`, :meth:`to_dict` and the line's ``crc32``.

        Raises:
            OSError: it could not be written; the file is as before.
        """
        files.append_rows(Path(path), [{"step": step, **entries, **self.to_dict()}])
