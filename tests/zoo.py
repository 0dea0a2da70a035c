"""The zoo: tiny models of every family, built from their configurations (nothing is downloaded).

Every parameter is random and non-constant, norm weights and biases included; sequences are of odd length and longer
than the sliding window. The models are the unmodified classes of transformers and torch, in eval mode.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LENGTH = 13
WINDOW = 5
VOCABULARY = 97


@dataclass
class Subject:
    """A model with what is needed to call it on its differentiable input.

    Attributes:
        model: in eval mode.
        x: the input that is perturbed.
        call: model, input -> output of the model (a tensor or a model output).
        metric: of the penalty.
        mask: True for the output units that count.
        field: where a model output holds the tensor that is penalised.
    """

    model: nn.Module
    x: Tensor
    call: Callable[[nn.Module, Any], Any]
    metric: str = "fisher"
    mask: Tensor | None = None
    field: str = "logits"

    def to(self, dtype: torch.dtype) -> Subject:
        """A copy of the model, and its input, in another dtype."""
        model = copy.deepcopy(self.model).to(dtype)
        return Subject(model, self.x.to(dtype), self.call, self.metric, self.mask, self.field)

    def double(self) -> Subject:
        """The same model at the same weights in float64."""
        return self.to(torch.float64)

    def output(self, x: Any) -> Any:
        """Result of the model for ``x``."""
        return self.call(self.model, x)

    def tensor(self, x: Any) -> Any:
        """The tensor (or dual) in that output which is penalised."""
        return self.pick(self.output(x))

    def pick(self, output: Any) -> Any:
        return getattr(output, self.field, output)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())


@dataclass(frozen=True)
class Entry:
    """A named builder; ``idle`` names the parameters that the output does not depend on."""

    name: str
    build: Callable[[], Subject]
    decoder: bool = False
    idle: tuple[str, ...] = ()

    def __call__(self) -> Subject:
        return self.build()


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fills every parameter: matrices N(0, 1/fan_in), vectors (norm weights, biases) N(centre, 0.25^2)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                centre = 0.0 if parameter.isnan().any() else parameter.mean().round()
                parameter.copy_(centre + 0.25 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return model.eval()


def embeddings(*shape: int, seed: int = 7) -> Tensor:
    return 0.7 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding(lengths: tuple[int, ...], side: str = "right", size: int = LENGTH) -> Tensor:
    """Attention mask [len(lengths), size] with True on the tokens of each row."""
    position = torch.arange(size)
    counts = torch.tensor(lengths)[:, None]
    return position < counts if side == "right" else position >= size - counts


# -------------------------------------------------------------------------------------------- causal decoders
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, tie_word_embeddings=True)
_GEMMA |= dict(layer_types=["sliding_attention", "full_attention"])
_EXPERTS = dict(num_experts_per_tok=2)
_NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
_GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
)

#: name -> (config class, model class, options of the config, metric)
_DECODERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES, "fisher"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SIZES | {"head_dim": 8}, "logits"),
    "mistral": ("MistralConfig", "MistralForCausalLM", SIZES | {"sliding_window": WINDOW}, "probs"),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        SIZES | _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "fisher",
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SIZES | _GEMMA, "fisher"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SIZES, "fisher"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2, "fisher"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _NEOX, "logits"),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        SIZES | _EXPERTS | {"num_local_experts": 4},
        "fisher",
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        SIZES
        | _EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
        "probs",
    ),
}


def _from_config(config_class: str, model_class: str, options: dict[str, Any], attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = getattr(transformers, config_class)(**options)
    config._attn_implementation = attention
    model = getattr(transformers, model_class)(config)
    assert model.config._attn_implementation == attention
    return model


def _decoder(name: str, attention: str, experts: str = "", pad: str = "") -> Subject:
    config_class, model_class, options, metric = _DECODERS[name]
    model = _from_config(config_class, model_class, options, attention)
    if experts:
        model.set_experts_implementation(experts)
    if experts == "batched_mm":
        from transformers.integrations.moe import batched_mm_experts_forward

        if "clamp_" in batched_mm_experts_forward.__code__.co_names:
            pytest.skip("this transformers clamps the experts' ids in place, which its own backward refuses")
    mask = padding((LENGTH, LENGTH - 4), pad.removeprefix("pad_")) if pad else None

    def call(model: nn.Module, x: Any) -> Any:
        return model(inputs_embeds=x, attention_mask=None if mask is None else mask.long())

    return Subject(randomise(model, 11), embeddings(2, LENGTH, 32), call, metric, mask)


def _decoder_entries() -> list[Entry]:
    forms: list[tuple[str, ...]] = []
    for name in _DECODERS:
        for attention in ("eager",) if name == "gemma2" else ("eager", "sdpa"):
            if name in ("mixtral", "qwen3_moe"):
                forms.append((name, attention, "eager" if attention == "eager" else "grouped_mm"))
            else:
                forms.append((name, attention))
    forms.append(("mixtral", "sdpa", "batched_mm"))
    forms += [
        ("llama", attention, "", side)
        for attention in ("eager", "sdpa")
        for side in ("pad_left", "pad_right")
    ]
    forms += [("gemma2", "eager", "", "pad_left"), ("mistral", "sdpa", "", "pad_left")]
    return [
        Entry(
            "-".join(part for part in form if part),
            partial(_decoder, *form),
            True,
            _untied_embedding(form[0]),
        )
        for form in forms
    ]


def _untied_embedding(name: str) -> tuple[str, ...]:
    """The embedding table is bypassed by ``inputs_embeds``, unless the head shares it."""
    tables = {"gemma2": (), "gemma3": (), "gpt2": (), "gpt_neox": ("gpt_neox.embed_in.weight",)}
    return tables.get(name, ("model.embed_tokens.weight",))


# ------------------------------------------------------------------------------ encoders and encoder-decoders
_ENCODER = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "bos_token_id")}


def _bert(attention: str) -> Subject:
    model = _from_config("BertConfig", "BertForMaskedLM", _ENCODER, attention)
    mask = padding((LENGTH, 8, 3))
    types = torch.arange(LENGTH) // 6 % 2

    def call(model: nn.Module, x: Any) -> Any:
        return model(inputs_embeds=x, attention_mask=mask.long(), token_type_ids=types.expand(3, -1))

    return Subject(randomise(model, 12), embeddings(3, LENGTH, 32), call, "fisher", mask)


def _modernbert(attention: str) -> Subject:
    options = _ENCODER | dict(local_attention=WINDOW, layer_types=["full_attention", "sliding_attention"])
    options |= dict(norm_bias=True, bos_token_id=1, cls_token_id=1, sep_token_id=2)
    model = _from_config("ModernBertConfig", "ModernBertForMaskedLM", options, attention)
    mask = padding((LENGTH, 9))

    def call(model: nn.Module, x: Any) -> Any:
        return model(inputs_embeds=x, attention_mask=mask.long())

    return Subject(randomise(model, 13), embeddings(2, LENGTH, 32), call, "fisher", mask)


def _vit(attention: str) -> Subject:
    options = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=7
    )
    options |= dict(image_size=(12, 16), patch_size=4, num_channels=3)
    model = _from_config("ViTConfig", "ViTForImageClassification", options, attention)
    return Subject(
        randomise(model, 14), embeddings(3, 3, 12, 16), lambda model, x: model(pixel_values=x), "fisher"
    )


def _t5(attention: str, side: str) -> Subject:
    """Perturbs the embeddings of the encoder (plain queries meet dual keys) or of the decoder (the reverse)."""
    options = dict(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
    )
    options |= dict(
        relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0
    )
    options |= dict(feed_forward_proj="gated-gelu" if side == "encoder" else "relu")
    transformers = pytest.importorskip("transformers")
    if not transformers.T5PreTrainedModel._supports_sdpa:  # before 5.15 T5 has one attention, of its own
        attention = "eager"
    model = _from_config("T5Config", "T5ForConditionalGeneration", options, attention)
    mask = padding((LENGTH, 9))
    tokens = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    source = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(4))

    def call(model: nn.Module, x: Any) -> Any:
        if side == "encoder":
            return model(inputs_embeds=x, attention_mask=mask.long(), decoder_input_ids=tokens)
        return model(input_ids=source, attention_mask=mask.long(), decoder_inputs_embeds=x)

    x = embeddings(2, LENGTH if side == "encoder" else 7, 32)
    return Subject(randomise(model, 15), x, call, "fisher" if side == "encoder" else "probs")


# --------------------------------------------------------------------------------------------------- torch.nn
def _transformer_encoder(norm_first: bool) -> Subject:
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, activation="gelu" if norm_first else "relu", batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=not norm_first)
    mask = padding((LENGTH, 9))

    def call(model: nn.Module, x: Any) -> Any:
        return model(x, src_key_padding_mask=~mask)

    return Subject(randomise(model, 16), embeddings(2, LENGTH, 32), call, "l2", mask)


class _DecoderLayers(nn.Module):
    """Two nn.TransformerDecoderLayer, one of each norm order, with cross-attention to a learned memory."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = dict(d_model=32, nhead=4, dim_feedforward=48, batch_first=True)
        self.first = nn.TransformerDecoderLayer(**options, norm_first=True)
        self.second = nn.TransformerDecoderLayer(**options, norm_first=False, activation="gelu")
        self.memory = nn.Parameter(torch.zeros(1, 6, 32))

    def forward(self, x: Any) -> Any:
        memory = self.memory.expand(x.shape[0], -1, -1)
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        x = self.first(x, memory, tgt_mask=causal, tgt_is_causal=True)
        return self.second(x, memory, tgt_mask=causal, tgt_is_causal=True)


def _transformer_decoder() -> Subject:
    return Subject(
        randomise(_DecoderLayers(), 17), embeddings(2, LENGTH, 32), lambda model, x: model(x), "l2"
    )


class _Attention(nn.Module):
    """nn.MultiheadAttention in one of its call forms, with a residual."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        options: dict[str, Any] = dict(embed_dim=32, num_heads=4)
        if form == "self":
            options |= dict(batch_first=True)
        elif form == "extra":
            options |= dict(add_bias_kv=True, add_zero_attn=True)
        elif form == "cross":
            options |= dict(kdim=20, vdim=24, batch_first=True)
            self.key, self.value = nn.Parameter(torch.zeros(2, 6, 20)), nn.Linear(32, 24)
        self.attention = nn.MultiheadAttention(**options)

    def forward(self, x: Any) -> Any:
        if self.form == "self":
            y, weights = self.attention(x, x, x, need_weights=True)
            return x + y + weights.mean(-1, keepdim=True) + weights.amax(-1, keepdim=True)
        if self.form == "extra":
            rows = x.transpose(0, 1)
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            y, _ = self.attention(rows, rows, rows, attn_mask=causal, need_weights=False)
            return x + y.transpose(0, 1)
        y, _ = self.attention(x, self.key, self.value(x[:, :6]), need_weights=False)
        return x + y


def _attention(form: str) -> Subject:
    return Subject(
        randomise(_Attention(form), 18), embeddings(2, LENGTH, 32), lambda model, x: model(x), "l2"
    )


def _entries() -> list[Entry]:
    entries = _decoder_entries()
    for attention in ("eager", "sdpa"):
        entries += [
            Entry(f"bert-{attention}", partial(_bert, attention)),
            Entry(f"modernbert-{attention}", partial(_modernbert, attention)),
            Entry(f"vit-{attention}", partial(_vit, attention)),
            Entry(f"t5_encoder-{attention}", partial(_t5, attention, "encoder")),
            Entry(f"t5_decoder-{attention}", partial(_t5, attention, "decoder")),
        ]
    entries += [
        Entry("nn.TransformerEncoder-post_norm", partial(_transformer_encoder, False)),
        Entry("nn.TransformerEncoder-pre_norm", partial(_transformer_encoder, True)),
        Entry("nn.TransformerDecoderLayer", _transformer_decoder),
    ]
    return entries + [
        Entry(f"nn.MultiheadAttention-{f}", partial(_attention, f)) for f in ("self", "extra", "cross")
    ]


ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _entries()}
