"""The method: directions, the language-model head and the aligned penalty."""

from .directions import normalize, seed
from .head import LMHead
from .penalty import aligned_penalty

__all__ = ["LMHead", "aligned_penalty", "normalize", "seed"]
