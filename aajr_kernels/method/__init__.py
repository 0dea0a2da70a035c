"""The method: the adversary's ascent, directions, the head, the aligned penalty, its rivals, and diagnostics."""

from ..training import FitConfig, fit
from .ascent import ascend
from .baselines import baseline_penalty, trajectory_baseline
from .directions import normalize, seed
from .head import LMHead
from .losses import lm_loss
from .penalty import aligned_penalty
from .stability import StabilityReport, stability_report, step_condition
from .trajectory import PenaltyStatistics, Trajectory, trajectory_penalty

__all__ = [
    "FitConfig",
    "LMHead",
    "PenaltyStatistics",
    "StabilityReport",
    "Trajectory",
    "aligned_penalty",
    "ascend",
    "baseline_penalty",
    "fit",
    "lm_loss",
    "normalize",
    "seed",
    "stability_report",
    "step_condition",
    "trajectory_baseline",
    "trajectory_penalty",
]
