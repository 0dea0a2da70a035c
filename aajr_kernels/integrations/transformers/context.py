"""One forward of a fixed context, shared by an attack on what comes after it and by the loss and penalty.

In a causal model nothing before the first attackable token depends on δ: it has the same keys and values at every step
of an ascent, and no tangent. :class:`SharedContext` computes them once, with their graph, and is a function of the
suffix. An attack sees them as constants, the loss and the penalty differentiate through them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...backends.errors import UnsupportedOperation
from ...coverage import Coverage, coverage, record_computed, recording
from ...dual import Dual, is_dual
from ...method.attack_state import parameters_are_frozen
from ...rules.registry import install_guards
from ...torch_private import version_of
from ...transforms import uncompiled
from .context_cache import ContextCache, ContextIsFilled
from .context_checks import (
    cache_argument,
    check_embeddings,
    check_inputs,
    check_rotary,
    check_split,
    plain_model,
    start_of,
)
from .context_hooks import agreed_start, is_sharded, watched
from .context_segments import segments

__all__ = ["SharedContext", "shared_context"]


class SharedContext:
    """A causal model as a function of the tokens from `start` on; made by :func:`shared_context`.

    Call it with embeddings ``[B, S - start, C]``, a tensor or a Dual, or with ``[n·B, S - start, C]``, n points of the
    batch one after the other. It returns the hidden states of these tokens (a model without head), or their logits.

    Attributes:
        x: ``x[:, start:]``, attached.
        start: tokens of the context.
        output: hidden states or logits ``[B, start, ·]`` of the context, attached, with ``output=True``; else None.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        start: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        output: bool,
    ) -> None:
        self._model: Any = plain_model(model)
        self._name = cache_argument(self._model)
        self._mask, self._positions = attention_mask, position_ids
        self._length, self._rows = x.shape[1], x.shape[0]
        self.x, self.start = x[:, start:], start
        self.output: Tensor | None = None
        self._is_sharded = is_sharded(self._model)
        self._versions = self._parameter_versions()
        self._has_graph, self._needs_graph = (
            torch.is_grad_enabled() and not parameters_are_frozen(),
            x.requires_grad,
        )
        self._cache: ContextCache | None = None
        self._attention = 0.0
        if start and _counts():
            with coverage() as ran:
                self._fill(x[:, :start], output)
            record_computed("positions", self._rows * start, 0, -ran.flops())
            # a forward that ended early has no attention of the last layer
            layers = ran.count("attention")
            self._attention = ran.flops("attention") * (1 if output else 1 + 1 / max(layers, 1))
        elif start:
            self._fill(x[:, :start], output)

    def suffix(self, values: Tensor) -> Tensor:
        """``values[:, start:]`` of anything ``[B, S, ...]`` that goes with the tokens: labels, masks, agents."""
        if values.shape[:2] != (self._rows, self._length):
            raise ValueError(
                f"values must be [B, S, ...] = [{self._rows}, {self._length}, ...] like the tokens, got "
                f"{tuple(values.shape)}."
            )
        return values[:, self.start :]

    @uncompiled  # contexts are other objects in every step
    def __call__(self, x: Any) -> Any:
        """Hidden states or logits of the suffix with embeddings `x`.

        Raises:
            ValueError: `x` has another shape.
            RuntimeError: the context was computed without a graph, or with other parameters than those of now.
        """
        if x.dim() != 3 or x.shape[1:] != self.x.shape[1:] or x.shape[0] % self._rows:
            raise ValueError(
                f"x must be the suffix {tuple(self.x.shape)}, or several times its rows, got {tuple(x.shape)}: take "
                "the .x of this context."
            )
        repeats = x.shape[0] // self._rows
        if self._cache is None:
            return _tensor_of(self._run(x, None, 0, self._length, repeats))
        attacked = parameters_are_frozen() or not torch.is_grad_enabled()
        self._check_graph(attacked)
        cache = self._cache.for_suffix(repeats, attacked)
        run = functools.partial(self._run, x, cache, self.start, self._length, repeats)
        if not _counts():
            return _tensor_of(run())
        with coverage() as ran:
            result = _tensor_of(run())
        computed, whole = (x.shape[0] * length for length in (x.shape[1], self._length))
        record_computed("positions", computed, whole, self._skipped(result, ran, repeats))
        return result

    def _fill(self, x: Tensor, output: bool) -> None:
        config = self._model.config
        self._cache = ContextCache(config, stops=not output and not self._has_late_hooks())
        install_guards()
        # a number without tangents: the operations that the suffix takes, not PyTorch's
        number = Dual(x.unsqueeze(0))
        try:
            with watched(self._model, self._cache.recorder):
                result = _tensor_of(self._run(number, self._cache.recorder, 0, self.start, 1))
            if output:
                self.output = result.primal if is_dual(result) else result
        except ContextIsFilled:
            pass
        self._cache.settle(config)

    def _run(self, x: Any, cache: Any, begin: int, end: int, repeats: int) -> Any:
        """The model on tokens `begin` to `end`."""
        inputs: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            inputs[self._name] = cache
        if self._mask is not None:
            inputs["attention_mask"] = self._mask[:, :end].repeat(repeats, 1)
        if self._positions is not None:
            positions = self._positions[:, begin:end]
            inputs["position_ids"] = positions if len(positions) == 1 else positions.repeat(repeats, 1)
        with segments(self._model, has_cache=cache is not None):
            return self._model(inputs_embeds=x, **inputs)

    def _skipped(self, result: Any, ran: Coverage, repeats: int) -> float:
        """Forward flops of the context that a forward of the suffix, which took those of `ran`, does without.

        By count: attention among the context's positions, four products for a tangent beside two; and all else as much
        for a position of the context as for one of the suffix. Plain tensors are not counted.
        """
        # tangents may start inside the model
        attention, tangents = ran.flops("attention"), result.num_tangents if is_dual(result) else 0
        others = (ran.flops() - attention) * self.start / (self._length - self.start)
        return others + (repeats * (1 + 2 * tangents) * self._attention if attention else 0.0)

    def _check_graph(self, attacked: bool) -> None:
        if self._versions != self._parameter_versions():
            raise RuntimeError(
                "the parameters of the model changed after shared_context() computed the context: make one for every "
                "training step."
            )
        if attacked or self._has_graph:
            return
        if self._needs_graph or any(p.requires_grad for p in self._model.parameters()):
            raise RuntimeError(
                "shared_context() computed the context without a graph, under torch.no_grad() or inside an attack, and "
                "x or the parameters need its gradients: call it where gradients are on."
            )

    def _has_late_hooks(self) -> bool:
        """Whether hooks wait for the end of a forward: of sharded parameters, of accelerate."""
        return self._is_sharded or any(hasattr(module, "_hf_hook") for module in self._model.modules())

    def _parameter_versions(self) -> int:
        if self._is_sharded:  # whole and sharded parameters take turns
            return 0
        return sum(version_of(p) for p in self._model.parameters() if not p.is_inference())


@uncompiled
def shared_context(
    model: nn.Module,
    x: Tensor,
    *,
    mask: Tensor | None = None,
    start: int | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    output: bool = False,
    **inputs: Any,
) -> SharedContext:
    """Run `model` once on the tokens that no attack can change, and return it as a function of the others.

    One training step::

        context = shared_context(model.model, x, mask=mask, attention_mask=attention_mask)
        labels, mask = context.suffix(labels), context.suffix(mask)
        loss_fn = lm_loss(context, head=model.lm_head, labels=labels)
        traj = ascend(loss_fn, context.x.detach(), radius=1.0, steps=3, mask=mask, module=model)
        penalty, aux = trajectory_penalty(context, context.x, traj, head=model.lm_head, labels=labels,
                                          return_primal=True)
        (aux.primal + weight * penalty).backward()

    Values and gradients are those of the whole sequence. Inside an attack (:func:`~aajr_kernels.ascend`, baselines,
    diagnostics) the keys and values of the context are constants. Elsewhere gradients reach the parameters and `x`
    through them; terms that share a context are added before one backward. The first call for a model compares the
    split with the whole on a few tokens: values and one directional derivative.

    With dropout the context has one mask for the whole step, in attacks in eval mode too. Where the model uses
    activation checkpointing, which takes the cache from its layers, they are checkpointed here instead, context and
    suffix apart.

    Args:
        model: a causal decoder of Hugging Face transformers, fused or not, with LoRA or without: the body for hidden
            states (``model.model``), the whole for logits. Caches with and without a window are understood.
        x: embeddings ``[B, S, C]``; may require grad.
        mask: ``[B, S]``, nonzero = may be attacked. The context ends before the first attackable token of any row;
            what is context in other rows only stays in the suffix, masked.
        start: the number of tokens in the context, 0 <= start < S, instead; with `mask` no larger than it allows.
            A loss on token t + 1 needs the output of token t in the suffix, or `output`.
        attention_mask: ``[B, S]``, nonzero = a token, 0 = padding on the left or the right.
        position_ids: ``[B, S]`` or ``[1, S]``; the model's own by default.
        output: also compute the context's own hidden states or logits, for losses on its tokens. Otherwise the last
            layer forms only keys and values.
        inputs: none; a cache or another input of the model is refused.

    Returns:
        SharedContext: for this step. Parameters must not change while it is in use.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; no token may be attacked; there is no
            context to be closed, as in packed sequences; the sequence, and not its context, is so long that the model
            takes other rotary frequencies.
        UnsupportedOperation: the model is not causal, has no cache, keeps more than keys and values, or gives other
            values for the suffix after its context than for the whole.
    """
    check_embeddings(x)

    def own_start() -> int:
        check_inputs(x, attention_mask, position_ids, inputs)
        return start_of(x, mask, start)

    def checked_start() -> int:
        check_rotary(model, x.shape[1], begin, position_ids)
        return begin

    begin = agreed_start(model, own_start, x.device)
    if begin:
        agreed_start(model, checked_start, x.device)
        check_split(SharedContext, model, x)
    return SharedContext(model, x, begin, attention_mask, position_ids, output)


def _tensor_of(result: Any) -> Any:
    """Hidden states or logits of a model output."""
    for name in ("last_hidden_state", "logits"):
        tensor = getattr(result, name, None)
        if tensor is not None:
            return tensor
    raise UnsupportedOperation(
        f"model must return hidden states or logits, got {type(result).__name__}: give a causal decoder."
    )


def _counts() -> bool:
    """Whether a :func:`aajr_kernels.coverage` block wants to know what is computed."""
    return recording() and not torch.compiler.is_compiling()
