"""The models: a small Llama over bytes, SmolLM2 with adapters, and a random stand-in for the latter."""

from __future__ import annotations

from typing import Any

from torch import nn

from aajr_kernels.integrations.transformers import fuse
from common import texts

from .text import Text, encoded, plays

BYTES = 256


def small(config: dict[str, Any], seed: int) -> nn.Module:
    """A Hugging Face Llama over bytes, fused, with random weights.

    Raises:
        MissingPackage: transformers is not installed.
    """
    model = _llama(config, seed)
    fuse(model)
    return model


def adapted(config: dict[str, Any], seed: int) -> tuple[nn.Module, Text]:
    """A pretrained model with fresh LoRA adapters on query and value projections, fused; and the text in its tokens.

    Args:
        config: ``model`` is ``"smollm2"``, or ``"stand-in"`` for a random Llama over bytes that takes the same way.
        seed: of the adapters.

    Raises:
        MissingPackage: peft, transformers, gguf or the package with the weights is not installed.
    """
    if config["model"] == "smollm2":
        base, tokenizer = texts.smollm2()
        text = encoded(tokenizer, config["characters"])
    else:
        base, text = _llama(config, 0), plays()
    return texts.adapted(base, config["rank"], seed), text


def _llama(config: dict[str, Any], seed: int) -> nn.Module:
    model: nn.Module = texts.small_llama(
        seed,
        vocab_size=BYTES,
        hidden_size=config["width"],
        intermediate_size=5 * config["width"] // 2,
        num_hidden_layers=config["layers"],
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=config["length"],
    )
    return model
