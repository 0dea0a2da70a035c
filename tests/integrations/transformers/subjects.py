"""Tiny models of every type that fuse() knows: the zoo's, and those that the zoo leaves out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import zoo
from torch import nn
from zoo import LENGTH, SIZES, WINDOW, Subject, embeddings, padding, randomise

#: name -> (config class, model class, options); the types that are not in the zoo
_MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 8}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
}


def tiny(name: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    """A model of one of the types above, or ``"llama"``, with random parameters in eval mode."""
    import transformers

    config_class, model_class, more = _MORE.get(name, ("LlamaConfig", "LlamaForCausalLM", {}))
    config = getattr(transformers, config_class)(**(SIZES | more | options))
    config._attn_implementation = attention
    return randomise(getattr(transformers, model_class)(config), 21)


@cache
def cache_name() -> str:
    """Name of the cache in models: ``past_key_values`` until transformers 5.23, ``cache`` since."""
    import transformers

    taken = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


def _subject(name: str) -> Subject:
    return Subject(tiny(name), embeddings(2, LENGTH, 32), lambda model, x: model(inputs_embeds=x), mask=None)


def padded_llama(side: str) -> Subject:
    """A Llama called with a batch padded on one side."""
    mask = padding((LENGTH, LENGTH - 4), side)

    def call(model: nn.Module, x: Any) -> Any:
        return model(inputs_embeds=x, attention_mask=mask.long())

    return Subject(tiny("llama"), embeddings(2, LENGTH, 32), call, mask=mask)


#: one or two forms of every known type
SUBJECTS: dict[str, Callable[[], Subject]] = {name: partial(_subject, name) for name in _MORE}
SUBJECTS |= {
    name: zoo.ENTRIES[name]
    for name in (
        "llama-sdpa",
        "llama-sdpa-pad_left",
        "llama-eager-pad_right",
        "mistral-sdpa",
        "mistral-sdpa-pad_left",
        "qwen3-sdpa",
        "gemma2-eager",
        "gemma2-eager-pad_left",
        "gemma3-sdpa",
        "phi3-sdpa",
        "gpt2-sdpa",
        "gpt_neox-sdpa",
        "mixtral-sdpa-grouped_mm",
        "mixtral-sdpa-batched_mm",
        "mixtral-eager-eager",
        "qwen3_moe-sdpa-grouped_mm",
        "bert-sdpa",
        "modernbert-sdpa",
        "vit-sdpa",
        "t5_encoder-sdpa",
        "t5_decoder-eager",
    )
}
