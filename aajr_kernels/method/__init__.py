"""The method: the adversary's ascent, directions, the language-model head and the aligned penalty."""

from .ascent import ascend
from .directions import normalize, seed
from .head import LMHead
from .penalty import aligned_penalty
from .trajectory import Trajectory

__all__ = ["LMHead", "Trajectory", "aligned_penalty", "ascend", "normalize", "seed"]
