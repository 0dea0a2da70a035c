"""How the method calls a model: embed, forward, head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import probes
from .head import LMHead
from .losses import IGNORED, lm_loss, token_losses
from .places import Opened

__all__ = ["Policy"]


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
        places: where an adversary adds its perturbation, from ``(x, forward, tokens=, relative=, **inputs)`` with
            embeddings ``[B, N, C]`` and a `forward` such as that of the policy to an :class:`.places.Opened`; `tokens`
            ``[B, N]``, nonzero = counts for the unit of a place (None: all), and ``relative=False`` for a unit of 1.
            None: it adds to the embeddings.
        reference: a frozen policy over the same tokens and vocabulary, which losses may compare this one with; None:
            there is none. Its model is in eval mode, on this process, and not trained.
    """

    forward: Callable[..., Any]
    embed: Callable[[Tensor], Tensor] | None = None
    head: LMHead | nn.Linear | Callable[[], LMHead] | None = None
    context: Callable[..., Any] | None = None
    places: Callable[..., Opened] | None = None
    reference: Policy | None = None

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
