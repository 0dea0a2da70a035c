"""Evaluation of a trained model under attacks that need not be those of its training."""

from .embedding import EmbeddingAttack
from .hidden import HiddenAttack
from .result import Evaluation
from .run import evaluate
from .scene import Found, Scene
from .suffix import SuffixSearch
from .tokens import TokenSubstitution
from .universal import UniversalPerturbation

__all__ = [
    "EmbeddingAttack",
    "Evaluation",
    "Found",
    "HiddenAttack",
    "Scene",
    "SuffixSearch",
    "TokenSubstitution",
    "UniversalPerturbation",
    "evaluate",
]
