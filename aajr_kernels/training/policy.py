"""The policy of a model: how its parts are called, where the model does not say it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..method.attack_state import frozen_parameters
from ..method.head import LMHead
from ..method.places import At
from ..method.policy import Policy
from ..sharding import is_fully_sharded
from .frozen import without_adapters
from .wrappers import entered, unwrapped

__all__ = ["places_of", "policy_of"]

#: :func:`~aajr_kernels.integrations.transformers.shared_context`, which lies above and enters itself
CONTEXTS: list[Callable[..., Any]] = []
#: what opens places of a model, from the same package, from ``(model, at)`` to :attr:`Policy.places`
PLACES: list[Callable[..., Any]] = []


def policy_of(model: nn.Module, *, at: At = "embedding") -> Policy:
    """A policy for a Hugging Face causal language model, or for a module called with ``inputs_embeds``.

    Where the body and a linear head of a Hugging Face model can be called apart, and give the logits of the whole (this
    is tried on a few tokens), the head is streamed; otherwise logits are formed. The reference of a model of PEFT is
    the model without its adapters, in eval mode.

    Args:
        model: plain, fused or not, with adapters or not.
        at: where an adversary adds its perturbation: ``"embedding"``; the name of a module, or the end of one that no
            other module has (``"layers.3.self_attn.q_proj"``), to whose output it is added; the number of a layer of
            the model's one list of layers, negative from the end; the name of a list of modules, which stands for all
            of them; or several of these, perturbed together.

    Raises:
        TypeError: `model` is no module, takes no ``inputs_embeds``, is wrapped for several processes, or learns a
            prompt; `at` is no place.
        ValueError: `at` names no module, several, or one twice.
    """
    if unwrapped(model) is not model:
        raise TypeError(
            "model must be the plain module, got one that is spread over processes: give its .module, and call the "
            "policy through Objective or AAJRTrainer, which go through the wrapper."
        )
    peft: Any = getattr(model, "peft_config", None)
    if peft is not None and any(getattr(c, "is_prompt_learning", False) for c in peft.values()):
        raise TypeError(
            "model must not learn a prompt (PEFT), which token embeddings would bypass: use LoRA."
        )
    # an adapter's own wrapper adds nothing to the call; its layers are inside the model
    unwrap = getattr(model, "get_base_model", None) if peft is not None else None
    inner: Any = model if unwrap is None else unwrap()
    taken = inspect.signature(inner.forward).parameters
    if "inputs_embeds" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise TypeError(
            f"model must take inputs_embeds=, which {type(inner).__name__}.forward does not: give policy=Policy(...)."
        )
    embed = _call(inner, "get_input_embeddings")
    more = {"use_cache": False} if hasattr(inner, "config") and "use_cache" in taken else {}
    whole = Policy(
        lambda x, **inputs: inner(inputs_embeds=x, **more, **inputs), embed, context=_context(inner)
    )
    policy = _streamed(model, inner, whole, more) or whole
    if unwrap is not None:
        policy = replace(policy, reference=without_adapters(model, policy))
    return policy if at == "embedding" else replace(policy, places=places_of(model, at))


def places_of(model: nn.Module, at: At) -> Any:
    """The ``places`` of a policy, see :func:`policy_of`."""
    unwrap = (
        getattr(model, "get_base_model", None) if getattr(model, "peft_config", None) is not None else None
    )
    return PLACES[-1](model if unwrap is None else unwrap(), at)


def _streamed(root: nn.Module, model: Any, whole: Policy, more: dict[str, Any]) -> Policy | None:
    """Body and head apart, if they make the whole."""
    body, head = getattr(model, "base_model", None), _call(model, "get_output_embeddings")
    if body is None or body is model or whole.embed is None:
        return None
    is_layer = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not is_layer or not (type(head) is nn.Linear or is_fully_sharded(head)):  # which makes a subclass
        return None
    config = getattr(model, "config", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    streamed = Policy(
        lambda x, **inputs: body(inputs_embeds=x, **more, **inputs).last_hidden_state,
        whole.embed,
        functools.partial(_described, head, scale, getattr(config, "final_logit_softcapping", None)),
        _context(body),
    )
    difference = _difference(root, model, streamed, whole)
    if difference > (1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 3e-2):
        warnings.warn(
            f"the logits of {type(model).__name__} are not those of its head (relative difference {difference:.1e}), "
            "so they are formed, not streamed: give policy=Policy(forward, embed, LMHead(weight, bias, scale, "
            "softcap)) to save their memory.",
            stacklevel=4,
        )
        return None
    return streamed


def _described(head: nn.Linear, scale: float, softcap: float | None) -> LMHead:
    return LMHead(head.weight, head.bias, scale, softcap)


def _context(model: Any) -> Callable[..., Any] | None:
    """How a decoder of transformers shares a context; None for any other module."""
    is_known = hasattr(getattr(model, "config", None), "get_text_config")
    return functools.partial(CONTEXTS[-1], model) if CONTEXTS and is_known else None


def _difference(root: nn.Module, model: Any, streamed: Policy, whole: Policy) -> float:
    """Largest relative difference of the logits of eight tokens."""
    assert whole.embed is not None
    weight, enter = model.get_output_embeddings().weight, entered(root)
    ids = torch.arange(8, device=weight.device).remainder(weight.shape[0]).unsqueeze(0)
    same: Any = contextlib.nullcontext()
    if hasattr(model, "_original_forward"):  # accelerate put its autocast into the forward of the whole
        same = torch.autocast(weight.device.type, torch.bfloat16)
    with torch.no_grad(), frozen_parameters((model,), True), same:
        x = enter(whole.embed)(ids)
        expected = enter(whole.forward)(x).logits.float()
        z = enter(streamed.logits)(x).float()
    if z.shape != expected.shape:
        return float("inf")
    return float((z - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _call(model: Any, name: str) -> Any:
    """Result of a method of a Hugging Face model, None if it has none."""
    method = getattr(model, name, None)
    if method is None:
        return None
    try:
        return method()
    except NotImplementedError:
        return None
