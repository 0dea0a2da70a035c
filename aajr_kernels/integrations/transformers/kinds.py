"""The lines of the listing for what no known form replaces: attention, rotary, norms and MLPs by the names they have.

fuse() says something about every such module. Some have nothing to replace, since they run on the fused ops as they are
or are put together from parts that have lines of their own; the others are left with a reason.
"""

from __future__ import annotations

import re

from torch import nn

from .forms import names_of, uses_attention_interface
from .wrappers import chains

__all__ = ["kind_of", "line_for", "without_the_registry"]

#: kind -> what the class names of such modules look like
_LOOKS = {
    "attention": re.compile(r"Attention|Attn"),
    "rotary": re.compile(r"Rotary|RoPE|Rope"),
    "norm": re.compile(r"Norm"),
    "MLP": re.compile(r"(MLP|Mlp|FeedForward|FFN?|GLU|ActDense|Intermediate|Experts|MoE|MoeBlock)$"),
}
#: names used by MLPs that are two linear layers and an activation, of GPT-2, GPT-NeoX, BERT, ViT and T5
_PLAIN = (
    {"c_fc", "act", "c_proj", "dropout"},
    {"dense_h_to_4h", "act", "dense_4h_to_h"},
    {"dense", "intermediate_act_fn"},
    {"fc1", "activation_fn", "fc2"},
    {"wi", "act", "dropout", "isinstance", "wo", "weight", "torch", "Tensor", "dtype", "int8", "to"},
)


def kind_of(module: nn.Module) -> str | None:
    """``"attention"``, ``"rotary"``, ``"norm"``, ``"MLP"``, or None for a module that is none of these."""
    # where several fit, the last word says what it is: a RotaryAttention is attention, an AttentionNorm a norm
    ends = {
        kind: match.end() for kind, look in _LOOKS.items() for match in look.finditer(type(module).__name__)
    }
    return max(ends, key=lambda kind: ends[kind], default=None)


def line_for(module: nn.Module, kind: str) -> tuple[bool, str]:
    """(whether there is nothing to replace, why) for a module of this kind that no known form replaces."""
    forward = type(module).forward
    codes = [names_of(way[-1]) for way in chains(forward)]
    if _is_torchs(module):
        return True, f"{kind}: runs on the rules of torch's functions"
    if kind == "rotary" and any({"cos", "sin"} <= names for names in codes):
        return True, "rotary: computes cos and sin, which carry no tangent"
    if kind == "MLP" and any(names == plain for names in codes for plain in _PLAIN):
        return True, "MLP: linear layers and an activation run on the rules of torch's functions"
    parts = [name for name, part in module.named_modules() if part is not module and kind_of(part) == kind]
    if parts:
        return True, f"{kind}: consists of {', '.join(parts)}"
    if kind == "attention":
        return False, f"attention: {type(module).__name__} does not ask transformers' registry for it"
    return False, f"{type(module).__name__}.forward has an unknown form"


def _is_torchs(module: nn.Module) -> bool:
    return getattr(type(module).forward, "__module__", "").startswith("torch.nn.")


def without_the_registry(model: nn.Module) -> list[str]:
    """Names of the attention modules of `model` that compute it themselves, from masks that they understand."""
    return [
        name
        for name, module in model.named_modules()
        if kind_of(module) == "attention"
        and not _is_torchs(module)
        and not any(map(uses_attention_interface, module.modules()))
    ]
