"""The models: a small Llama over bytes, SmolLM2 with adapters, and a random stand-in for the latter."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import nn

from aajr_kernels.integrations.transformers import fuse
from common.texts import require

from .text import CACHE, Text, encoded, plays

__all__ = ["BYTES", "adapted", "small"]

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
    require("transformers", "peft")
    if config["model"] == "smollm2":
        base, tokenizer = importlib.import_module("common.texts").smollm2(CACHE)
        text = encoded(tokenizer, config["characters"])
    else:
        base, text = _llama(config, 0), plays()
    peft = importlib.import_module("peft")
    options = peft.LoraConfig(
        r=config["rank"], lora_alpha=2 * config["rank"], target_modules=["q_proj", "v_proj"]
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that it renamed
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, options)
    fuse(model.get_base_model())
    return model, text


def _llama(config: dict[str, Any], seed: int) -> nn.Module:
    require("transformers")
    library = importlib.import_module("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = config["width"]
        found: nn.Module = library.LlamaForCausalLM(
            library.LlamaConfig(
                vocab_size=BYTES,
                hidden_size=width,
                intermediate_size=5 * width // 2,
                num_hidden_layers=config["layers"],
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=config["length"],
            )
        )
    return found
