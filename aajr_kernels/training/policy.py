"""How a training calls a model: embed, forward, head."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..method import probes
from ..method.attack_state import frozen_parameters
from ..method.head import LMHead
from ..method.losses import IGNORED, lm_loss, token_losses
from ..sharding import is_fully_sharded
from .wrappers import entered, unwrapped

__all__ = ["Policy", "policy_of"]

#: :func:`~aajr_kernels.integrations.transformers.shared_context`, which lies above and enters itself
CONTEXTS: list[Callable[..., Any]] = []


@dataclass(frozen=True)
class Policy:
    """Parts of a model that :func:`fit` needs.

    Attributes:
        forward: called as ``forward(x, **inputs)`` with embeddings ``[B, N, C]``, a tensor or a Dual, and the entries
            of the batch that are left (``attention_mask``, ...). Returns hidden states ``[B, N, C]`` with `head`, else
            logits ``[B, N, V]`` or a model output with ``.logits``.
        embed: from token ids ``[B, N]`` to embeddings; None if batches bring ``inputs_embeds``.
        head: the language-model head, whose logits are then streamed over the vocabulary; or a function that describes
            it, called where the weights of a sharded model are gathered.
        context: from ``(x, start=, output=, **inputs)`` to a function of the tokens from `start` on, as
            :func:`~aajr_kernels.integrations.transformers.shared_context` with the body (without `head`: the model)
            returns it; None: a context cannot be shared.
    """

    forward: Callable[..., Any]
    embed: Callable[[Tensor], Tensor] | None = None
    head: LMHead | nn.Linear | Callable[[], LMHead] | None = None
    context: Callable[..., Any] | None = None

    def described_head(self) -> LMHead | nn.Linear | None:
        """The head with its weights of now."""
        if self.head is None or isinstance(self.head, (LMHead, nn.Linear)):
            return self.head
        return self.head()

    def logits(self, x: Any, **inputs: Any) -> Any:
        """Logits ``[B, N, V]`` of embeddings, a tensor or a Dual, formed with `head`, too."""
        return probes.logits_func(functools.partial(self.forward, **inputs), self.described_head())(x)

    def loss_fn(self, inputs: dict[str, Any], labels: Tensor, reduction: str) -> Callable[[Any], Any]:
        """The cross-entropy ``[B]`` of labels aligned with the output, as of :func:`~aajr_kernels.lm_loss`."""
        if self.head is not None:
            forward = functools.partial(self.forward, **inputs)

            def streamed(x: Any) -> Any:
                head = self.described_head()
                assert head is not None
                return lm_loss(forward, head=head, labels=labels, reduction=reduction)(x)

            return streamed
        count = (labels != IGNORED).sum(-1).clamp(min=1) if reduction == "mean" else 1

        def loss(x: Any) -> Any:
            return self.token_losses(self.forward(x, **inputs), labels).sum(-1) / count

        return loss

    def token_losses(self, output: Any, labels: Tensor) -> Any:
        """Cross-entropy ``[B, N]`` from logits, 0 where it is ignored.

        Raises:
            TypeError, ValueError: `output` has no logits, or of another shape.
        """
        logits = getattr(output, "logits", output)
        if not hasattr(logits, "shape"):
            raise TypeError(
                f"the model must return logits or an output with .logits, got {type(output).__name__}."
            )
        if tuple(logits.shape[:-1]) != tuple(labels.shape):
            raise ValueError(
                f"the model must return logits [B, N, V] for labels {tuple(labels.shape)}, got {tuple(logits.shape)}."
            )
        return token_losses(logits, labels)


def policy_of(model: nn.Module) -> Policy:
    """A policy for a Hugging Face causal language model, or for a module called with ``inputs_embeds``.

    Where the body and a linear head of a Hugging Face model can be called apart, and give the logits of the whole (this
    is tried on a few tokens), the head is streamed; otherwise logits are formed.

    Raises:
        TypeError: `model` is no module, takes no ``inputs_embeds``, is wrapped for several processes, or learns a
            prompt.
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
    return _streamed(model, inner, whole, more) or whole


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
