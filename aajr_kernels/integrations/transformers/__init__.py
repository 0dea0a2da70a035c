"""Hugging Face transformers: fused operations on one model instance, reversibly.

========================  ==================================================================================
module                    what it does
========================  ==================================================================================
``fuse``                  :func:`fuse` and the handle it returns
``forms``                 the table of known forms of norms, gated products and rotary, and their replacements
``wrappers``              decorators of their methods: what is inside, and the same around a replacement
``kinds``                 attention, rotary, norms and MLPs by their names: a line for what no form replaces
``attention``             the attention implementation ``"aajr"``
``masks``                 its masks: structure (causal, window, padding) instead of [B, 1, N, M] tensors
``recomputed``            norms and activations whose results are computed again in the backward
``library``               the one place that imports transformers
========================  ==================================================================================
"""

from .fuse import KNOWN, Fusion, fuse
from .library import register

__all__ = ["KNOWN", "Fusion", "fuse", "register"]
