"""Evaluation of a trained model under attacks that need not be those of its training."""

from .embedding import EmbeddingAttack
from .result import Evaluation
from .run import evaluate
from .scene import Found, Scene
from .tokens import TokenSubstitution

__all__ = [
    "EmbeddingAttack",
    "Evaluation",
    "Found",
    "Scene",
    "TokenSubstitution",
    "evaluate",
]
