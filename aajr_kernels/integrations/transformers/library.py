"""The one place that imports transformers, and the registration of the attention implementation."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from .attention import attention_forward
from .masks import mask_builder

__all__ = [
    "NAME",
    "cache_classes",
    "checkpointed_layer_class",
    "pretrained_model_class",
    "register",
    "trainer_class",
]

NAME = "aajr"


@functools.cache
def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"aajr_kernels.integrations.transformers needs transformers ({error}): "
            'install it with pip install "aajr_kernels[hf]".'
        ) from error
    return transformers


def pretrained_model_class() -> type:
    """``transformers.PreTrainedModel``."""
    return _library().PreTrainedModel


def cache_classes() -> tuple[Any, tuple[type, ...]]:
    """``transformers.DynamicCache``, and the classes of its layers that hold keys and values and nothing else."""
    caches = _library().cache_utils
    return caches.DynamicCache, (caches.DynamicLayer, caches.DynamicSlidingWindowLayer)


def checkpointed_layer_class() -> type:
    """``transformers.modeling_layers.GradientCheckpointingLayer``, which drops the cache it is given."""
    return _library().modeling_layers.GradientCheckpointingLayer


def trainer_class() -> type:
    """``transformers.Trainer``.

    Raises:
        ImportError: transformers is not installed, or accelerate, without which it has no trainer.
    """
    library = _library()
    try:
        return library.Trainer
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"aajr_kernels.integrations.trainer needs accelerate ({error}): install it with "
            'pip install "aajr_kernels[trainer]".'
        ) from error


@functools.cache
def register() -> None:
    """Offer the attention implementation ``"aajr"`` to every model of transformers; nothing changes until one uses it.

    After this call ``from_pretrained(..., attn_implementation="aajr")`` and ``model.set_attn_implementation("aajr")``
    work. :func:`fuse` calls it. The mask function is registered with it: without one, transformers hands every custom
    attention a mask of None, and padding would be attended to.

    Raises:
        ImportError: transformers is not installed, or builds masks from other arguments than this package knows.
    """
    library = _library()
    if "q_length" not in inspect.signature(library.masking_utils.sdpa_mask).parameters:
        raise ImportError(
            f"transformers {library.__version__} describes masks by cache positions, which aajr_kernels does not "
            'support: install a current one with pip install --upgrade "aajr_kernels[hf]".'
        )
    library.AttentionInterface.register(NAME, attention_forward)
    library.AttentionMaskInterface.register(NAME, mask_builder(library.masking_utils))
