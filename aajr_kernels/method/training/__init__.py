"""A plain training loop for the method: attack, loss at the worst point, penalty; resumable."""

from .batches import Stream, prepared
from .checkpoints import load_checkpoint
from .config import Attack, Diagnostics, FitConfig, Penalty
from .loop import FitResult, NonFiniteLossError, fit
from .policy import Policy, policy_of
from .record import read_rows
from .schedules import Constant, Cosine, Linear, Schedule, WarmUp

__all__ = [
    "Attack",
    "Constant",
    "Cosine",
    "Diagnostics",
    "FitConfig",
    "FitResult",
    "Linear",
    "NonFiniteLossError",
    "Penalty",
    "Policy",
    "Schedule",
    "Stream",
    "WarmUp",
    "fit",
    "load_checkpoint",
    "policy_of",
    "prepared",
    "read_rows",
]
