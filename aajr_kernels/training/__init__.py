"""A plain training loop for the method: attack, loss at the worst point, penalty; resumable."""

from ..method.batch import prepared
from ..method.objectives import KL, CrossEntropy, Payoff, Targeted
from ..method.policy import Policy
from .agents import AgentsConfig, AgentsResult, Experience, fit_agents
from .checkpoints import load_checkpoint
from .config import Attack, Diagnostics, FitConfig, ObjectiveConfig, Penalty
from .constraint import Constraint, gamma_for_step
from .counts import Counts
from .loop import FitResult, NonFiniteLossError, fit
from .multiplier import Multiplier
from .objective import Terms
from .policy import policy_of
from .record import read_rows
from .schedules import Cosine, Linear, Schedule, Share, WarmUp
from .step import Objective
from .stream import Stream

__all__ = [
    "KL",
    "AgentsConfig",
    "AgentsResult",
    "Attack",
    "Constraint",
    "Cosine",
    "Counts",
    "CrossEntropy",
    "Diagnostics",
    "Experience",
    "FitConfig",
    "FitResult",
    "Linear",
    "Multiplier",
    "NonFiniteLossError",
    "Objective",
    "ObjectiveConfig",
    "Payoff",
    "Penalty",
    "Policy",
    "Schedule",
    "Share",
    "Stream",
    "Targeted",
    "Terms",
    "WarmUp",
    "fit",
    "fit_agents",
    "gamma_for_step",
    "load_checkpoint",
    "policy_of",
    "prepared",
    "read_rows",
]
