"""Hugging Face transformers: fused operations on one model instance, reversibly, and a context that steps share.

========================  ==================================================================================
module                    what it does
========================  ==================================================================================
``fuse``                  :func:`fuse` and the handle it returns
``forms``                 norms, activations and gated products: candidates by structure, and their replacements
``registry``              attention modules that ask transformers' registry, and their rotary embedding
``layers``                layers with a residual stream
``residual``              that stream, summed inside norms
``projections``           linear layers of one input, whose gradient gathers in one buffer
``verify``                whether a replacement does what a module does, tried on a small twin of it
``wrappers``              decorators of their methods: unwrapping, and wrapping a replacement
``kinds``                 attention, rotary, norms and MLPs by their names: a line for what is no candidate
``attention``             the attention implementation ``"aajr"``
``masks``                 its masks: structure (causal, window, padding) instead of [B, 1, N, M] tensors
``recomputed``            norms and activations whose results are computed again in the backward
``context``               :func:`shared_context`: one forward of what no attack can change, for a whole training step
``context_cache``         its keys and values, in transformers' own caches
``context_keys``          keys and values in two parts, between that cache and attention
``context_checks``        what may be split into context and suffix, and the numerical check of a split
``context_segments``      activation checkpointing of layers that keep their cache
``adapters``              agents that share a model with an adapter each
``places``                :class:`Places`: a model as a function of what is added inside it
``place_names``           the modules that names and numbers of places stand for
``place_hooks``           hooks of one forward: clean, or perturbed and without the layers below
``library``               the one place that imports transformers
========================  ==================================================================================
"""

from ...training.policy import CONTEXTS, PLACES
from .adapters import adapter_agent, generated
from .context import SharedContext, shared_context
from .fuse import KNOWN, Fusion, fuse
from .library import register
from .places import opened_at

__all__ = [
    "KNOWN",
    "Fusion",
    "SharedContext",
    "adapter_agent",
    "fuse",
    "generated",
    "register",
    "shared_context",
]

CONTEXTS.append(shared_context)  # policies of decoders share their context by it
PLACES.append(opened_at)
