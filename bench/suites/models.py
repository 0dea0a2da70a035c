"""The models of suite `step`: Llama, GPT-2 and BERT stacks, plain, fused, exact in float64, or on our primal ops."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from aajr_kernels.backends import choice
from aajr_kernels.coverage import record
from aajr_kernels.dual import Dual
from aajr_kernels.ops.activation import gelu, swiglu
from aajr_kernels.ops.attention.function import AttentionFunction
from aajr_kernels.ops.norm import layer_norm, rms_norm
from aajr_kernels.ops.rotary import rotary

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
    """Sizes by name: ``llama``, ``gpt2`` or ``bert``, alone or with ``-tiny`` or ``-base``; or a published model's."""
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
    found = sizes(kind, length)
    heads = f"{found.heads}/{found.key_heads}" if architecture(kind) == "llama" else f"{found.heads}"
    inner = found.intermediate if architecture(kind) == "llama" else 4 * found.hidden
    return f"{found.layers} layers, hidden {found.hidden}, intermediate {inner}, heads {heads}, B1"


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
    found, more = sizes(kind, length), {}
    if architecture(kind) == "llama":
        maker = transformers.LlamaModel
        config: Any = transformers.LlamaConfig(
            hidden_size=found.hidden,
            intermediate_size=found.intermediate,
            num_hidden_layers=found.layers,
            num_attention_heads=found.heads,
            num_key_value_heads=found.key_heads,
            vocab_size=97,
            max_position_embeddings=16384,
            use_cache=False,
        )
    elif architecture(kind) == "gpt2":
        maker = transformers.GPT2Model
        config = transformers.GPT2Config(
            n_embd=found.hidden,
            n_layer=found.layers,
            n_head=found.heads,
            vocab_size=97,
            bos_token_id=None,
            eos_token_id=None,
            n_positions=length,
            use_cache=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    else:
        maker, more = transformers.BertModel, {"add_pooling_layer": False}
        config = transformers.BertConfig(
            hidden_size=found.hidden,
            num_hidden_layers=found.layers,
            num_attention_heads=found.heads,
            intermediate_size=4 * found.hidden,
            vocab_size=97,
            max_position_embeddings=length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    model = maker._from_config(config, attn_implementation=attention, **more)
    # weights that are not constant: a norm whose weight is one hides a wrong gradient
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter) if "bias" not in name else 0.02)
    built: nn.Module = model.to(DTYPES[dtype])
    return built


def make_exact(model: nn.Module) -> nn.Module:
    """The model in float64, with norms that stay there and that PyTorch's forward mode differentiates rightly."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.__dict__["forward"] = _Bound(_rms_norm, module)
        elif isinstance(module, nn.LayerNorm):
            module.__dict__["forward"] = _Bound(_layer_norm, module)
    return model


class _Bound:
    """A function with its module as first argument; torch's own module machinery accepts any callable."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function, self.module = function, module

    def __call__(self, *args: Any) -> Any:
        return self.function(self.module, *args)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * (x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt())


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        module.weight * (centred * (centred.square().mean(-1, keepdim=True) + module.eps).rsqrt())
        + module.bias
    )


def fisher(z: Tensor, z_tan: Tensor) -> Tensor:
    """Σ p(ż − Σ pż)² of the last axis, p = softmax z, from elementary operations."""
    p = z.softmax(-1)
    return (p * (z_tan - (p * z_tan).sum(-1, keepdim=True)).square()).sum(-1)


# -- a plain step on our own primal kernels ---------------------------------------------------------------------------


def use_primal_ops(model: nn.Module) -> nn.Module:
    """A fused model whose norms and activations run on our kernels for plain tensors too, as a stack of one.

    Outside the benchmark a plain tensor goes to torch's own function. Attention and rotary follow inside
    :func:`primal_ops`.
    """
    for module in model.modules():
        name = type(module).__name__
        if name == "LlamaRMSNorm":
            module.__dict__["forward"] = _Bound(
                lambda m, x: _primal(rms_norm, x, m.weight.shape, m.weight, m.variance_epsilon), module
            )
        elif name == "LlamaMLP":
            module.__dict__["forward"] = _Bound(
                lambda m, x: m.down_proj(_primal_swiglu(m.gate_proj(x), m.up_proj(x))), module
            )
        elif name == "NewGELUActivation":
            module.__dict__["forward"] = _Bound(lambda m, x: _primal(gelu, x, "tanh"), module)
        elif isinstance(module, nn.LayerNorm):
            module.__dict__["forward"] = _Bound(
                lambda m, x: _primal(layer_norm, x, m.normalized_shape, m.weight, m.bias, m.eps), module
            )
    return model


@contextlib.contextmanager
def primal_ops() -> Iterator[None]:
    """Inside, the rotary embedding and the attention of fused models take plain tensors as a stack of one."""
    from aajr_kernels.integrations.transformers import attention as implementation
    from aajr_kernels.integrations.transformers import registry

    turned = lambda x, cos, sin, **options: _primal(rotary, x, cos, sin, **options)
    with (
        mock.patch.object(registry, "rotary", turned),
        mock.patch.object(implementation, "attention", _attention),
    ):
        yield


def _primal(op: Callable[..., Any], x: Tensor, *args: Any, **options: Any) -> Tensor:
    y: Tensor = op(Dual(x.unsqueeze(0)), *args, **options).stacked[0]
    return y


def _primal_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y: Tensor = swiglu(Dual(gate.unsqueeze(0)), Dual(up.unsqueeze(0))).stacked[0]  # type: ignore[union-attr]
    return y


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: Any, scale: float | None, **rest: Any) -> Tensor:
    if any(value not in (None, 0.0) for value in rest.values()) or not causal:
        raise ValueError(f"the benchmark's primal attention is causal and has no other options, got {rest}.")
    stacks = [x.unsqueeze(0) for x in (q, k, v)]
    backend = choice.select_backend("attention", *stacks)
    record("attention", backend)
    options = (q.shape[-1] ** -0.5 if scale is None else scale, None, 0, None, 0.0, False)
    out: Tensor = AttentionFunction.apply(*stacks, None, options, backend)[0]
    return out
