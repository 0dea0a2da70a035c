"""What `aajr validate` runs: cases, an oracle made of formulas, error budgets."""

from .checks import Row, validate_all
from .suite import OPS
from .targets import DEVICES, DTYPES, Target, find_targets

__all__ = ["DEVICES", "DTYPES", "OPS", "Row", "Target", "find_targets", "validate_all"]
