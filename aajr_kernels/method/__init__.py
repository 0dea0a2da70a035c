"""The method: ascent, directions, head, aligned penalty, baselines and diagnostics."""

from .ascent import ascend
from .baselines import baseline_penalty, trajectory_baseline
from .directions import inject, normalize
from .divergence import lm_kl
from .graphs import Graphed, graphed
from .head import LMHead
from .losses import lm_loss
from .penalty import aligned_penalty
from .stability import StabilityReport, stability_report, step_condition
from .trajectory import PenaltyStatistics, Trajectory, trajectory_penalty

__all__ = [
    "Graphed",
    "LMHead",
    "PenaltyStatistics",
    "StabilityReport",
    "Trajectory",
    "aligned_penalty",
    "ascend",
    "baseline_penalty",
    "graphed",
    "inject",
    "lm_kl",
    "lm_loss",
    "normalize",
    "stability_report",
    "step_condition",
    "trajectory_baseline",
    "trajectory_penalty",
]
