"""Attention modules that ask transformers' registry of implementations, and the rotary embedding that they apply.

A candidate holds a configuration that names an implementation, and linear layers. Its twin runs with that one, or with
its eager one where that cannot run; with one that is not registered, which the registry refuses; with ``"aajr"``; and
with the function ``apply_rotary_pos_emb`` of its model file replaced (see ``verify``).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from itertools import product
from math import inf
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ...ops.rotary import rotaries
from .forms import Replacement, verified
from .library import NAME, pretrained_model_class
from .masks import Visibility
from .projections import one_by_one, sharing
from .verify import LowRank, Method, Trial, draw, first, linear_sizes, undisturbed
from .wrappers import chains

__all__ = ["asking"]

ROTARY = "apply_rotary_pos_emb"


def apply_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    """``apply_rotary_pos_emb`` of the model files, by the fused op."""
    q, k = rotaries((q, k), cos, sin, unsqueeze_dim=unsqueeze_dim)
    return q, k


class Calls:
    """How to call an attention module, or a layer with one, on two times four tokens, by the names of its parameters.

    Attributes:
        config: that names the implementation, or None where there is none to choose.
        width: of other tokens.
        names: of the parameters of its forward and of the decorators of that.
        implementation: of attention.
        cross: whether another sequence is attended to.
    """

    def __init__(self, module: nn.Module, config: Any, width: int) -> None:
        self.config, self.width, self.own = config, width, type(module).forward
        functions = [chain[-1] for chain in chains(self.own) if isinstance(chain[-1], FunctionType)]
        self.names = {n for f in functions for n in inspect.signature(f, follow_wrapped=False).parameters}
        self.implementation, self.cross = "eager", False

    def trial(self, module: nn.Module, dtype: torch.dtype, width: int) -> Trial:
        """The first of these that can be run, or the last: configured or eager attention, without and with `cross`."""
        configured = getattr(self.config, "_attn_implementation", None)
        usual = "eager" if configured in (None, NAME) else configured
        for self.implementation, self.cross in product(dict.fromkeys((usual, "eager")), (False, True)):
            trial = Trial(module, dtype, self.method(), width, tokenwise=False)
            if not trial.reason:
                break
        return trial

    def arguments(self, x: Any, implementation: str, stretch: float) -> dict[str, Any]:
        """Masks and other arguments of the module beside the tokens `x`; positions are `stretch` apart."""
        dtype = x.dtype
        hidden = torch.full((1, 1, 4, 4), torch.finfo(dtype).min, dtype=dtype).triu(1)
        mask = Visibility("upper_left") if implementation == NAME else hidden
        known: dict[str, Any] = dict.fromkeys(("attention_mask", "mask", "encoder_attention_mask"), mask)
        if "position_embeddings" in self.names:
            size, options = (
                getattr(self.config, "head_dim", None),
                getattr(self.config, "rope_parameters", None),
            )
            size = size or self.config.hidden_size // self.config.num_attention_heads
            pairs = int(size * ((options or {}).get("partial_rotary_factor") or 1.0)) // 2
            positions = stretch * torch.arange(4, dtype=torch.float64)[:, None]
            angles = (positions * torch.linspace(1.0, 0.1, 2 * pairs, dtype=torch.float64))[None]
            known["position_embeddings"] = (angles.cos().to(dtype), angles.sin().to(dtype))
        known["input_tensor"] = x[..., : self.width]
        if self.cross:
            states = draw((2, 4, self.width), dtype, torch.Generator("cpu").manual_seed(1))
            known |= dict.fromkeys(("encoder_hidden_states", "key_value_states"), states)
        return {name: value for name, value in known.items() if name in self.names}

    def method(self, forward: Any = None, implementation: str = "", stretch: float = 1.0) -> Method:
        """The module's own forward or another one, with this implementation or the one that is set."""
        config, name = copy.copy(self.config), implementation or self.implementation
        if config is not None:
            config._attn_implementation = name
            config._experts_implementation = "eager"  # others have no forward-mode derivative

        def call(twin: Any, x: Any) -> Any:
            for part in twin.modules():
                if part.__dict__.get("config") is not None:
                    part.__dict__["config"] = config
            return (forward or self.own)(twin, x, **self.arguments(x, name, stretch))

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
    calls = Calls(module, config, width)
    trial = calls.trial(module, dtype, width)
    if trial.reason:
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
    names, why = _of_tokens(trial, calls)
    if names and not why:
        rotates = pieces[-1].function is not None
        rotary_forward = pieces.pop().function if rotates else None
        body = sharing(rotary_forward or calls.own, names)
        pieces.append(Replacement("rotary + projections" if rotates else "projections", body))
    elif names:
        pieces.append(Replacement("projections", reason=why))
    return [dataclasses.replace(piece, runs_own=True) for piece in pieces]


def _of_tokens(trial: Trial, calls: Calls) -> tuple[tuple[str, ...], str]:
    """The linear layers that take the tokens, if there are several, and why they cannot be computed together."""
    twin, x, *_ = trial.runs[0]
    layers = {name: child for name, child in twin.named_children() if type(child) is LowRank}
    called: dict[str, Any] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: called.update({name: args[0]}))
        for name, layer in layers.items()
    ]
    with undisturbed():
        calls.method()(twin, x)
    for hook in hooks:
        hook.remove()
    names = tuple(name for name, given in called.items() if given is x)
    if len(names) < 2:
        return (), ""
    difference = trial.difference(
        calls.method(sharing(calls.own, names, one_by_one)), "linear", 2 * len(layers)
    )
    return names, "" if difference is None else f"projections of one input: {difference[1]}"
