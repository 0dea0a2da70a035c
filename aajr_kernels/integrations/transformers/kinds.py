"""The lines of the listing for what is no candidate: attention, rotary, norms and MLPs by the names of their classes.

fuse() says something about every such module. Some have nothing to replace, since they run on the fused ops as they are
or are put together from parts that have lines of their own; the others are left with a reason.
"""

from __future__ import annotations

import re

from torch import nn

from .forms import is_torchs, parts

__all__ = ["kind_of", "line_for"]

#: kind -> what the class names of such modules look like
_LOOKS = {
    "attention": re.compile(r"Attention|Attn"),
    "rotary": re.compile(r"Rotary|RoPE|Rope"),
    "norm": re.compile(r"Norm"),
    "MLP": re.compile(r"(MLP|Mlp|FeedForward|FFN?|GLU|ActDense|Intermediate|Experts|MoE|MoeBlock)$"),
}


def kind_of(module: nn.Module) -> str | None:
    """``"attention"``, ``"rotary"``, ``"norm"``, ``"MLP"``, or None for a module that is none of these."""
    # where several fit, the last word says what it is: a RotaryAttention is attention, an AttentionNorm a norm
    ends = {
        kind: match.end() for kind, look in _LOOKS.items() for match in look.finditer(type(module).__name__)
    }
    return max(ends, key=lambda kind: ends[kind], default=None)


def line_for(module: nn.Module, kind: str) -> tuple[bool, str]:
    """(whether there is nothing to replace, why) for a module of this kind that no replacement was tried on."""
    if is_torchs(module):
        return True, f"{kind}: runs on the rules of torch's functions"
    if kind == "rotary" and module._buffers and next(module.parameters(), None) is None:
        return True, "rotary: computes cos and sin, which carry no tangent"
    if kind == "MLP" and parts(module) is not None:
        return True, "MLP: linear layers and an activation run on the rules of torch's functions"
    inner = [name for name, part in module.named_modules() if part is not module and kind_of(part) == kind]
    if inner:
        return True, f"{kind}: consists of {', '.join(inner)}"
    if kind == "attention":
        return False, f"attention: {type(module).__name__} does not ask transformers' registry for it"
    return False, f"{type(module).__name__}.forward has an unknown form"
