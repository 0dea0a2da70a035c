"""Losses of an adversary: what its ascent makes large, one number per batch row.

=====================  ===============================================================================
:class:`CrossEntropy`  of the labels: the adversary wants the policy to be wrong
:class:`Targeted`      toward ``attack_labels``, or away from the labels, or both
:class:`KL`            from the output at the clean input (TRADES, SMART), or from that of a reference
:class:`Payoff`        any function of the output
=====================  ===============================================================================

Each is a mean over the tokens of a row that count, and streams the vocabulary where the policy has a head. What it is
compared with is a constant of the attack. Where a context is shared, values are those of whole rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..dual import Dual
from ..rules import registry
from .attack_state import RandomState
from .batch import Prepared
from .checks import check_choices, check_number, kind_of
from .divergence import kl_of_logits, lm_kl
from .evaluator import checked_losses
from .head import as_head
from .losses import IGNORED
from .policy import Policy
from .sharing import Shared

__all__ = ["KL", "AdversaryLoss", "CrossEntropy", "Payoff", "Targeted", "TokenLoss"]

DIRECTIONS = ("forward", "reverse", "symmetric")
Losses = Callable[[Any], Any]


class AdversaryLoss(Protocol):
    """The losses of this module, or one of your own."""

    def of(self, policy: Policy, batch: Prepared, x: Tensor) -> Losses:
        """The losses as a function of the adversary's input.

        Args:
            policy: whose ``forward(x, **batch.inputs)`` is attacked.
            batch: checked.
            x: the clean input of `forward`: embeddings ``[B, N, C]``, or zeros where the adversary adds to something
                inside the model.

        Returns:
            From a tensor like `x` to ``[B]``, each of which depends on its row only.
        """
        ...


class TokenLoss:
    """A loss whose values are sums over tokens, so that those of a shared context are constants."""

    #: it compares the output with one at the tokens as they are
    compares = False
    #: its gradient at the clean input is zero, so that an ascent has to start elsewhere
    is_flat = False

    def of(self, policy: Policy, batch: Prepared, x: Tensor, shared: Shared | None = None) -> Losses:
        """The losses ``[B]`` as a function of the adversary's input; see :class:`AdversaryLoss`.

        Args:
            policy: as there; with `shared` the one of the suffix.
            batch: the same.
            x: the same.
            shared: the suffix, where the context is shared; losses are those of whole rows.

        Raises:
            ValueError: the batch or the policy lacks what the loss compares with.
        """
        whole = batch if shared is None else shared.whole
        values = functools.partial(self.values, whole=whole)
        return self._losses(policy, batch, x.detach(), shared, values)

    def _losses(
        self,
        policy: Policy,
        batch: Prepared,
        x: Tensor,
        shared: Shared | None,
        values: Callable[..., Any],
        clean: Any = None,
        is_attached: bool = False,
    ) -> Losses:
        """With `values` of an output, its batch and what it is compared with, which is a constant unless attached.

        `clean` is the output at `x` where it is known; with dropout the random state is then that from before it.
        """
        whole = batch if shared is None else shared.whole
        self.check(policy, whole)

        @functools.cache
        def other() -> Any:
            is_known = clean is not None and self.is_flat
            output = clean if is_known else self.other(policy, batch, x, whole)
            return output if is_attached or output is None else output.detach()

        @functools.cache
        def of_context() -> Any:
            assert shared is not None
            if not self.reads(whole, shared.start):
                return 0.0
            with torch.set_grad_enabled(is_attached and torch.is_grad_enabled()):
                beside = self.part(other(), slice(0, shared.start))
                return values(policy, shared.output, whole.prefix(shared.start), beside)

        def losses(point: Any) -> Any:
            beside = other()  # before the forward: both draw the same dropout masks
            output = clean if clean is not None and point is x else output_of(policy, batch, point)
            if shared is None:
                return values(policy, output, batch, beside)
            beside = self.part(beside, slice(shared.start, None))
            return values(policy, output, batch, beside) + of_context()

        return losses

    def check(self, policy: Policy, whole: Prepared) -> None:
        """Raise where something is missing."""

    def other(self, policy: Policy, batch: Prepared, x: Tensor, whole: Prepared) -> Any:
        """The output that is compared with; None without one."""

    def part(self, other: Any, tokens: slice) -> Any:
        """Some tokens of it."""

    def reads(self, whole: Prepared, start: int) -> bool:
        """Whether tokens before `start` have values that are not 0 whatever the adversary does."""
        raise NotImplementedError

    def values(self, policy: Policy, output: Any, batch: Prepared, other: Any, whole: Prepared) -> Any:
        """``[B]``: what the tokens of `batch` add to the losses of rows whose tokens are those of `whole`."""
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(TokenLoss):
    """The mean cross-entropy of the labels of every row."""

    def reads(self, whole: Prepared, start: int) -> bool:
        """Labels in the context."""
        return bool(whole.masks[0, :, :start].any())

    def values(self, policy: Policy, output: Any, batch: Prepared, other: Any, whole: Prepared) -> Any:
        """See :class:`TokenLoss`."""
        return self.sums(policy, output, batch) / _count(whole.labels != IGNORED)

    def sums(self, policy: Policy, output: Any, batch: Prepared) -> Any:
        """``[B]``, over the tokens with a label."""
        return _cross_entropies(policy, output, batch.labels)


@dataclass(frozen=True)
class Targeted(TokenLoss):
    """Toward tokens that the adversary wants, away from those of the labels, or both.

    The loss is ``away`` times the mean cross-entropy of the labels minus ``toward`` times that of ``attack_labels``,
    each over its own tokens.

    Attributes:
        toward: weight of ``attack_labels`` ``[B, N]``, an entry of the batch: like labels, −100 = none. Position t is
            asked for its target after the tokens of the batch before it.
        away: weight of the labels.
    """

    toward: float = 1.0
    away: float = 0.0

    def __post_init__(self) -> None:
        for name in ("toward", "away"):
            check_number(name, getattr(self, name), 0)
        if not self.toward and not self.away:
            raise ValueError(
                "toward and away must not both be 0, got 0 and 0: Targeted(), or Targeted(0, away=1)."
            )

    def check(self, policy: Policy, whole: Prepared) -> None:
        """Raise where there is no target.

        Raises:
            ValueError: the batch has no ``attack_labels``, or marks no token with one.
        """
        if not self.toward:
            return
        if whole.attack_labels is None:
            raise ValueError(
                "attack_labels must be in the batch for Targeted(toward=), got none: give the tokens [B, N] that the "
                "adversary wants, -100 for none, or Targeted(0, away=1)."
            )
        if not self.away and not bool(whole.aimed.any()):
            raise ValueError(
                "attack_labels must name a token that is wanted in every batch, got -100 everywhere: leave such "
                "batches out, or give Targeted(away=1) the labels too."
            )

    def reads(self, whole: Prepared, start: int) -> bool:
        """Labels of either kind in the context."""
        wanted = bool(self.toward) and bool(whole.aimed[:, :start].any())
        return wanted or (bool(self.away) and bool(whole.masks[0, :, :start].any()))

    def values(self, policy: Policy, output: Any, batch: Prepared, other: Any, whole: Prepared) -> Any:
        """See :class:`TokenLoss`."""
        total: Any = 0.0
        for weight, name in ((-self.toward, "attack_labels"), (self.away, "labels")):
            if weight:
                losses = _cross_entropies(policy, output, getattr(batch, name))
                total = total + weight * losses / _count(getattr(whole, name) != IGNORED)
        return total


@dataclass(frozen=True)
class KL(TokenLoss):
    """The mean KL divergence from another output at the tokens as they are, without an attack.

    Attributes:
        to: ``"clean"``: the policy's own output at the clean input, with the same dropout masks (TRADES, SMART). The
            gradient at the clean input is zero: ``Attack(init="uniform")``. ``"reference"``: the output of
            :attr:`Policy.reference`, frozen; :func:`~aajr_kernels.training.policy_of` gives a model of PEFT the one
            without its adapters.
        direction: ``"forward"``: KL(other‖attacked), finite where the other output has its mass; ``"reverse"``:
            KL(attacked‖other); ``"symmetric"``: their sum.
        tokens: ``"loss"``: over the tokens with a label; ``"attention"``: over all that are attended to.
    """

    to: str = "clean"
    direction: str = "forward"
    tokens: str = "loss"

    compares = True

    def __post_init__(self) -> None:
        check_choices(("clean", "reference"), to=self.to)
        check_choices(DIRECTIONS, direction=self.direction)
        check_choices(("loss", "attention"), tokens=self.tokens)

    @property
    def is_flat(self) -> bool:  # type: ignore[override]
        """KL to one's own output is smallest there."""
        return self.to == "clean"

    def check(self, policy: Policy, whole: Prepared) -> None:
        """Raise where there is no reference.

        Raises:
            ValueError: the policy has none.
        """
        self.check_policy(policy)

    def check_policy(self, policy: Policy) -> None:
        """The same, before there is a batch."""
        if self.to == "reference" and policy.reference is None:
            raise ValueError(
                "policy must have a reference for KL(to='reference'), got none: a model of PEFT has one in its weights "
                "without adapters, for another give dataclasses.replace(policy_of(model), "
                "reference=policy_of(frozen_model))."
            )

    def other(self, policy: Policy, batch: Prepared, x: Tensor, whole: Prepared) -> Any:
        """Output of the policy at `x`, or of the reference at all tokens, from this random state, which is put back."""
        state = RandomState(x.device)
        try:
            if self.to == "clean":
                return plain_of(state.replay(functools.partial(output_of, policy, batch), x))
            reference = policy.reference
            assert reference is not None
            with torch.no_grad():
                return plain_of(output_of(reference, whole, whole.embedded(reference)))
        finally:
            state.restore()

    def part(self, other: Any, tokens: slice) -> Any:
        """Some tokens of the reference's output; a clean one is that of the suffix already."""
        return other if self.to == "clean" else other[:, tokens]

    def counted(self, batch: Prepared) -> Tensor:
        """Bool ``[B, N]``."""
        mask = batch.tokens(self.tokens)
        return torch.ones_like(batch.labels, dtype=torch.bool) if mask is None else mask

    def reads(self, whole: Prepared, start: int) -> bool:
        """Tokens that count in the context; its output is the clean one."""
        return self.to == "reference" and bool(
            whole.masks[0 if self.tokens == "loss" else 1, :, :start].any()
        )

    def values(self, policy: Policy, output: Any, batch: Prepared, other: Any, whole: Prepared) -> Any:
        """See :class:`TokenLoss`."""
        return self.sums(policy, output, batch, other) / _count(self.counted(whole))

    def sums(self, policy: Policy, output: Any, batch: Prepared, other: Any) -> Any:
        """``[B]``, over the tokens that count."""
        beside = policy if self.is_flat else policy.reference
        assert beside is not None
        mask = self.counted(batch)
        if policy.head is None or beside.head is None:
            keep = mask.unsqueeze(-1)
            sides: list[tuple[Any, Any]] = [
                (torch.where(keep, _with_logits(of, z), 0.0), None)
                for of, z in ((beside, other), (policy, output))
            ]
        else:
            own, of_other = policy.described_head(), beside.described_head()
            assert own is not None and of_other is not None
            # a reference is frozen, whether or not its parameters say so
            sides = [(other, own if self.is_flat else as_head(of_other).detached()), (output, own)]

        def divergence(p: int, q: int) -> Any:
            head, q_head = sides[p][1], sides[q][1]
            if head is None:
                return kl_of_logits(sides[p][0], sides[q][0]).sum(-1)
            return lm_kl(sides[p][0], sides[q][0], head=head, q_head=q_head, mask=mask).sum(-1)

        forward = divergence(0, 1) if self.direction != "reverse" else 0.0
        return forward if self.direction == "forward" else forward + divergence(1, 0)

    def summed(
        self, policy: Policy, batch: Prepared, x: Tensor, shared: Shared | None = None, clean: Any = None
    ) -> Losses:
        """Sums ``[B]`` in the place of means, attached to the clean output too: for a loss that is minimised.

        Args:
            policy: as for :meth:`of`.
            batch: the same.
            x: the same, attached.
            shared: the same.
            clean: the policy's output at `x`, hidden states or logits, where it is known. With dropout the random state
                must be that from before it.

        Raises:
            ValueError: see :meth:`of`.
        """
        return self._losses(policy, batch, x, shared, self.sums, clean, is_attached=True)


@dataclass(frozen=True)
class Payoff:
    """A function of the output, which the adversary makes large.

    Attributes:
        function: called as ``function(output, batch)`` with logits ``[B, N, V]`` and the checked
            :class:`~.batch.Prepared`; returns ``[B]``, each of its row only, by torch's operations. Diagnostics call it
            with a :class:`~aajr_kernels.Dual`.
        logits: False: where the policy has a head it is called with hidden states ``[B, N, C]`` in the place of
            logits, and no tensor of the vocabulary's size is formed.
    """

    function: Callable[[Any, Prepared], Any]
    logits: bool = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"function of Payoff must be callable as function(output, batch), got {kind_of(self.function)}."
            )

    def of(self, policy: Policy, batch: Prepared, x: Tensor) -> Losses:
        """See :class:`AdversaryLoss`.

        Raises:
            TypeError, ValueError: when called: payoffs are no floating point tensor ``[B]``, or do not depend on the
                output.
        """
        rows = len(batch.labels)

        def losses(point: Any) -> Any:
            output = output_of(policy, batch, point)
            if self.logits:
                output = _with_logits(policy, output)
            elif not isinstance(point, Dual):
                output = plain_of(output)
            is_attached = _is_attached(output)
            payoff = checked_losses(self.function(output, batch), rows, "function of Payoff")
            if is_attached and not _is_attached(payoff):
                raise ValueError(
                    "function of Payoff must return payoffs that depend on the output, got constants: a detach(), a "
                    "no-grad block, an argmax or a comparison breaks the path."
                )
            return payoff

        return losses


def output_of(policy: Policy, batch: Prepared, point: Any) -> Any:
    """What the policy's forward returns; with a head a Dual, by the kernels of the penalty."""
    if policy.head is not None and not isinstance(point, Dual):
        registry.install_guards()
        point = Dual(point.unsqueeze(0))
    return policy.forward(point, **batch.inputs)


def plain_of(output: Any) -> Any:
    """The tensor of an output: hidden states or logits; a Dual stays one where it has tangents."""
    output = output if isinstance(output, (Tensor, Dual)) else getattr(output, "logits", output)
    return output.primal if isinstance(output, Dual) and not output.num_tangents else output


def _with_logits(policy: Policy, output: Any) -> Any:
    output = plain_of(output)
    head = policy.described_head()
    return output if head is None or not isinstance(output, (Tensor, Dual)) else as_head(head).logits(output)


def _is_attached(output: Any) -> bool:
    if isinstance(output, Dual):
        return output.stacked.requires_grad or bool(output.num_tangents)
    return isinstance(output, Tensor) and output.requires_grad


def _count(mask: Tensor) -> Tensor:
    return mask.sum(-1).clamp(min=1)


def _cross_entropies(policy: Policy, output: Any, labels: Tensor) -> Any:
    """Sums ``[B]`` from what the forward returned."""
    if policy.head is not None and isinstance(output, Tensor):
        output = Dual(output.unsqueeze(0))
    return replace(policy, forward=lambda *_, **__: output).loss_fn({}, labels, "sum")(output)
