"""The models of suite `step`: Llama, GPT-2 and BERT stacks."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..case import DTYPES, SEED
from ..roofline import Decoder

#: size -> hidden size, layers, heads, heads of keys and values (Llama), intermediate size (Llama; 4 · hidden elsewhere)
SIZES = {
    "tiny": Decoder(128, 2, 2, 1, 352),
    "small": Decoder(384, 4, 6, 2, 1024),
    "base": Decoder(768, 6, 12, 4, 2048),
}
ARCHITECTURES = ("llama", "gpt2", "bert")
#: models of one published size: the sizes, and the words of their head
SMOLLM2 = Decoder(576, 30, 9, 3, 1536)
WORDS = {"smollm2": 49152}
#: up to this length large models have two layers: enough for their gradients to be checked in float64
SHALLOW = 128


def sizes(kind: str, length: int) -> Decoder:
    """Sizes by name: ``llama``, ``gpt2`` or ``bert``, also with ``-tiny`` or ``-base``; or a published model's."""
    if kind == "llama-1b":
        return Decoder(2048, 16 if length > SHALLOW else 2, 32, 8, 8192)
    if kind == "smollm2":
        return SMOLLM2 if length > SHALLOW else dataclasses.replace(SMOLLM2, layers=2)
    return SIZES[kind.partition("-")[2] or "small"]


def architecture(kind: str) -> str:
    """``llama``, ``gpt2`` or ``bert``."""
    return "llama" if kind == "smollm2" else kind.partition("-")[0]


def described(kind: str, length: int) -> str:
    """The sizes in words, for the rows."""
    size = sizes(kind, length)
    heads = f"{size.heads}/{size.key_heads}" if architecture(kind) == "llama" else f"{size.heads}"
    inner = size.intermediate if architecture(kind) == "llama" else 4 * size.hidden
    return f"{size.layers} layers, hidden {size.hidden}, intermediate {inner}, heads {heads}, B1"


def checkpoint(model: nn.Module) -> None:
    """Switch on Hugging Face's activation checkpointing of every layer, non-reentrant."""
    library: Any = model.train()  # in evaluation its layers are not checkpointed; nothing has dropout
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in the newest transformers
        library.gradient_checkpointing_enable({"use_reentrant": False})


def build(kind: str, dtype: str, length: int, attention: str = "sdpa") -> nn.Module:
    """A model without a head; the same weights for the same kind, dtype and length."""
    import transformers

    torch.manual_seed(SEED)
    size, name, more = sizes(kind, length), architecture(kind), {}
    config: dict[str, Any] = {"vocab_size": 97}
    if name == "gpt2":
        config |= {"n_embd": size.hidden, "n_layer": size.layers, "n_head": size.heads, "n_positions": length}
        config |= {"bos_token_id": None, "eos_token_id": None, "use_cache": False}
        config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        config |= {"hidden_size": size.hidden, "num_hidden_layers": size.layers}
        config |= {"num_attention_heads": size.heads, "max_position_embeddings": length}
    if name == "llama":
        config |= {"intermediate_size": size.intermediate, "num_key_value_heads": size.key_heads}
        config |= {"max_position_embeddings": 16384, "use_cache": False}
    if name == "bert":
        config |= {"intermediate_size": 4 * size.hidden}
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        more = {"add_pooling_layer": False}
    prefix = {"llama": "Llama", "gpt2": "GPT2", "bert": "Bert"}[name]
    maker, settings = getattr(transformers, f"{prefix}Model"), getattr(transformers, f"{prefix}Config")
    model = maker._from_config(settings(**config), attn_implementation=attention, **more)
    # weights that are not constant: a norm whose weight is one hides a wrong gradient
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter) if "bias" not in name else 0.02)
    built: nn.Module = model.to(DTYPES[dtype])
    return built


def adapted(model: nn.Module, rank: int) -> nn.Module:
    """With adapters on queries and values whose matrices are all random: a zero one would hide wrong gradients."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers renamed
        config = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model_: nn.Module = peft.get_peft_model(model, config)
    return model_


def crossentropy(z: Tensor, labels: Tensor) -> Tensor:
    """The mean over tokens, in float32 as models compute it."""
    return F.cross_entropy(z.float().flatten(0, 1), labels.flatten())


def head(hidden: int, vocab_size: int, dtype: str) -> nn.Linear:
    """A language-model head."""
    return nn.Linear(hidden, vocab_size, bias=False).to(DTYPES[dtype])


def outputs(model: nn.Module, head: nn.Linear | None) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Functions of the embeddings: the hidden states, and the logits where there is a head."""
    hidden: Callable[[Any], Any] = lambda x: model(inputs_embeds=x).last_hidden_state
    return hidden, hidden if head is None else lambda x: head(hidden(x))
