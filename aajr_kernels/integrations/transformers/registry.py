"""Attention modules that ask transformers' registry of implementations, and the rotary embedding that they apply.

A candidate holds a configuration that names an implementation, and linear layers. Its twin runs with that one, or with
its eager one where that cannot run; with one that is not registered, which the registry refuses; with ``"aajr"``; and
with the function ``apply_rotary_pos_emb`` of its model file replaced (see ``verify``).
"""

from __future__ import annotations

import copy
import inspect
from itertools import product
from math import inf
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ...ops.rotary import rotary
from .forms import Replacement, verified
from .library import NAME, pretrained_model_class
from .masks import Visibility
from .verify import Method, Trial, draw, first, linear_sizes, undisturbed
from .wrappers import chains

__all__ = ["asking"]

ROTARY = "apply_rotary_pos_emb"


def apply_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    """``apply_rotary_pos_emb`` of the model files, by the fused op."""
    return rotary(q, cos, sin, unsqueeze_dim=unsqueeze_dim), rotary(k, cos, sin, unsqueeze_dim=unsqueeze_dim)


class _Calls:
    """How to call an attention module on two times four tokens, by the names of its parameters.

    Attributes:
        names: of the parameters of its forward and of the decorators of that.
        implementation: of attention.
        cross: whether another sequence is attended to.
    """

    def __init__(self, module: nn.Module) -> None:
        self.config, self.own = module.__dict__["config"], type(module).forward
        functions = [chain[-1] for chain in chains(self.own) if isinstance(chain[-1], FunctionType)]
        self.names = {n for f in functions for n in inspect.signature(f, follow_wrapped=False).parameters}
        self.implementation, self.cross = "eager", False

    def arguments(self, dtype: torch.dtype, implementation: str, stretch: float) -> dict[str, Any]:
        """Masks and other arguments of the module beside the tokens; positions are `stretch` apart."""
        size, options = getattr(self.config, "head_dim", None), getattr(self.config, "rope_parameters", None)
        size = size or self.config.hidden_size // self.config.num_attention_heads
        pairs = int(size * ((options or {}).get("partial_rotary_factor") or 1.0)) // 2
        positions = stretch * torch.arange(4, dtype=torch.float64)[:, None]
        angles = (positions * torch.linspace(1.0, 0.1, 2 * pairs, dtype=torch.float64))[None]
        hidden = torch.full((1, 1, 4, 4), torch.finfo(dtype).min, dtype=dtype).triu(1)
        mask = Visibility("upper_left") if implementation == NAME else hidden
        known: dict[str, Any] = dict.fromkeys(("attention_mask", "mask", "encoder_attention_mask"), mask)
        known["position_embeddings"] = (angles.cos().to(dtype), angles.sin().to(dtype))
        if self.cross:
            states = draw((2, 4, self.config.hidden_size), dtype, torch.Generator("cpu").manual_seed(1))
            known |= {"encoder_hidden_states": states, "key_value_states": states}
        return {name: value for name, value in known.items() if name in self.names}

    def method(self, forward: Any = None, implementation: str = "", stretch: float = 1.0) -> Method:
        """The module's own forward or another one, with this implementation or the one that is set."""
        config, name = copy.copy(self.config), implementation or self.implementation
        config._attn_implementation = name

        def call(twin: Any, x: Any) -> Any:
            twin.__dict__["config"] = config
            return (forward or self.own)(twin, x, **self.arguments(x.dtype, name, stretch))

        return call


def asking(module: nn.Module, dtype: torch.dtype) -> list[Replacement]:
    """Replacements for an attention module that asks the registry: itself and its rotary embedding; none for others.

    Attention has no function of its own to replace: without a reason against it, the configuration is switched.
    """
    config: Any = module.__dict__.get("config")
    own, width = type(module).forward, getattr(config, "hidden_size", 1)
    holds = hasattr(config, "_attn_implementation") and any(map(linear_sizes, module.children()))
    if not holds or isinstance(module, pretrained_model_class()):
        return []
    replaced = module.__dict__.get("forward", own)
    if all(chain[-1] is not own for chain in chains(replaced)):
        return [Replacement("attention", reason="its forward was replaced on the instance by something else")]
    calls, configured = _Calls(module), config._attn_implementation
    usual = "eager" if configured in (None, NAME) else configured
    for calls.implementation, calls.cross in product(dict.fromkeys((usual, "eager")), (False, True)):
        trial = Trial(module, dtype, calls.method(), width, tokenwise=False)
        if not trial.reason:
            break
    else:
        reason = f"attention: {type(module).__name__}.forward {trial.reason}"
        return [Replacement("attention", reason=reason)] if hasattr(module, "is_causal") else []
    twin, x, _, y, *_ = trial.runs[0]
    try:
        with undisturbed():
            calls.method(implementation="one that is not there")(twin, x)
    except KeyError:  # from the registry
        pass
    else:
        return []
    difference = trial.difference(calls.method(implementation=NAME), "attention")
    index = twin.__dict__.get("layer_idx")
    if isinstance(index, int):
        layers = range(max(getattr(config, "num_hidden_layers", 1), index + 1))
        if trial.depends_on("layer_idx", layers):
            difference = inf, "what it computes depends on its layer_idx"
    reason = f"attention: {type(module).__name__} is not the fused attention: "
    pieces = [Replacement("attention", reason="" if difference is None else reason + difference[1])]
    with undisturbed():
        turns = not torch.equal(first(calls.method(stretch=2.0)(twin, x)), y)  # it applies positions here
    if turns:
        options: Any = dict(through=ROTARY, method=calls.method)
        pieces.append(verified(module, trial, "rotary", "rotary", [apply_rotary], **options))
    return pieces
