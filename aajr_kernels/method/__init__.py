"""The method: the adversary's ascent, directions, the head, the aligned penalty, its rivals, and diagnostics."""

from .ascent import ascend
from .baselines import baseline_penalty, trajectory_baseline
from .directions import normalize, seed
from .head import LMHead
from .losses import lm_loss
from .penalty import aligned_penalty
from .stability import StabilityReport, stability_report, step_condition
from .trajectory import PenaltyStatistics, Trajectory, trajectory_penalty

__all__ = [
    "LMHead",
    "PenaltyStatistics",
    "StabilityReport",
    "Trajectory",
    "aligned_penalty",
    "ascend",
    "baseline_penalty",
    "lm_loss",
    "normalize",
    "seed",
    "stability_report",
    "step_condition",
    "trajectory_baseline",
    "trajectory_penalty",
]
