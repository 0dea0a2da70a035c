"""The losses of a training: what the adversary maximises, what is minimised beside the cross-entropy, their checks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..method.attack_state import RandomState
from ..method.baselines import NEEDS_LOSS
from ..method.batch import Prepared
from ..method.checks import kind_of
from ..method.objectives import KL, CrossEntropy, TokenLoss, output_of, plain_of
from ..method.policy import Policy

if TYPE_CHECKING:
    from .config import Attack, ObjectiveConfig
    from .objective import Work

__all__ = [
    "adversary_of",
    "can_share",
    "check_attack",
    "check_objective",
    "check_policy",
    "clean_losses",
    "clean_output",
    "divergence",
    "is_cross_entropy",
    "keeps_clean",
    "loss_under_attack",
    "reads_context",
]


def is_cross_entropy(loss: Any) -> bool:
    """Whether it is that of the labels, which the penalty's own forward has."""
    return type(loss) is CrossEntropy


def check_attack(attack: Attack) -> None:
    """Raise where the adversary's loss is none, or cannot be climbed from the start.

    Raises:
        TypeError: it has no ``of``.
        ValueError: its gradient is zero where the ascent begins.
    """
    loss = attack.loss
    if isinstance(loss, type) or not callable(getattr(loss, "of", None)):
        shown = loss.__name__ if isinstance(loss, type) else kind_of(loss)
        raise TypeError(
            f"loss must be CrossEntropy(), Targeted(), KL(), Payoff(function) or an object with of(policy, batch, x), "
            f"got {shown}."
        )
    if getattr(loss, "is_flat", False) and attack.init != "uniform":
        raise ValueError(
            f"init must be 'uniform' with loss={loss}, whose gradient at the clean input is zero, got {attack.init!r}."
        )


def check_objective(config: ObjectiveConfig) -> None:
    """Raise where the rest of an objective goes only with the cross-entropy.

    Raises:
        TypeError: a loss that is minimised is of another kind.
        ValueError: it does, and the adversary has another loss; nothing keeps the output from being constant.
    """
    _check_minimised(config)
    loss = config.attack.loss
    if config.share_context is True and not isinstance(loss, TokenLoss):
        raise ValueError(
            f"share_context must be 'auto' or False with loss={loss}, whose value is that of the whole sequence, got "
            "True."
        )
    if is_cross_entropy(loss):
        return
    remedy = "leave one of them out"
    for is_wrong, what in (
        (config.penalty.method in NEEDS_LOSS, f"Penalty(method={config.penalty.method!r})"),
        (config.diagnostics is not None and config.diagnostics.smoothness, "Diagnostics(smoothness=True)"),
        (getattr(config.penalty, "step_size", None) is not None, "Constraint(step_size=)"),
    ):
        if is_wrong:
            raise ValueError(f"{what} is of the cross-entropy, got an attack with loss={loss}: {remedy}.")


def _check_minimised(config: ObjectiveConfig) -> None:
    loss, anchor = config.adversarial_loss, config.anchor
    for name, value, is_known, kinds in (
        (
            "adversarial_loss",
            loss,
            is_cross_entropy(loss) or isinstance(loss, KL),
            "CrossEntropy(), KL() or KL('reference')",
        ),
        ("anchor", anchor, isinstance(anchor, KL), "KL('reference')"),
    ):
        if not is_known:
            shown = value.__name__ if isinstance(value, type) else kind_of(value)
            raise TypeError(
                f"{name} must be {kinds}, got {shown}: other losses are of an adversary, Attack(loss=)."
            )
    if anchor.to != "reference":
        raise ValueError(f"anchor must be KL('reference'), got {anchor}, which is 0 at the clean input.")
    is_alone = config.clean_weight == 0 and config.anchor_weight == 0
    if config.adversarial_weight != 0 and loss.is_flat and is_alone:
        raise ValueError(
            f"clean_weight must be positive with adversarial_loss={loss}, got 0: a constant output would be "
            "the minimum. TRADES has clean_weight=1 and its factor as adversarial_weight."
        )


def check_policy(config: ObjectiveConfig, policy: Policy) -> None:
    """Raise where a loss needs more of a policy than it has.

    Raises:
        ValueError: there is no reference.
    """
    for loss in _divergences(config):
        loss.check_policy(policy)


def _divergences(config: ObjectiveConfig) -> list[KL]:
    """That are minimised."""
    weighted = (
        (config.adversarial_weight, config.adversarial_loss),
        (config.anchor_weight, config.anchor),
    )
    return [loss for weight, loss in weighted if weight != 0 and isinstance(loss, KL)]


def keeps_clean(config: ObjectiveConfig) -> bool:
    """Whether the output at the clean input is that of several losses."""
    return config.anchor_weight != 0 or any(loss.is_flat for loss in _divergences(config))


def clean_output(work: Work) -> Any:
    """Hidden states or logits at the clean input, attached."""
    return work.enter(lambda x: plain_of(output_of(work.policy, work.batch, x)))(work.x)


def clean_losses(work: Work) -> Tensor:
    """``[B]``, sums of the cross-entropy of the output that is kept."""
    sums = functools.partial(CrossEntropy().sums, work.policy, batch=work.batch)
    losses: Tensor = work.enter(sums)(work.clean)
    return losses


def loss_under_attack(work: Work, point: Tensor) -> Tensor:
    """Share of the rows in what the step minimises at the worst point; a divergence has no weights of rows."""
    loss = work.config.adversarial_loss
    return divergence(work, loss, point) if isinstance(loss, KL) else work.loss(point)


def divergence(work: Work, loss: KL, point: Tensor) -> Tensor:
    """Share of the rows in the step's mean of a KL at `point`; gradients reach x and a clean output."""
    clean, state = None, RandomState(work.x.device)
    if point is work.x:
        clean = work.clean
    else:
        point = point + (work.x - work.x.detach())
        if loss.is_flat:
            clean = work.clean
            state.restore()  # the same dropout masks for both sides
    losses = work.enter(loss.summed(work.policy, work.batch, work.x, work.shared, clean))
    return losses(point).sum() / work.counts.of_tokens(loss.tokens)


def can_share(config: ObjectiveConfig) -> bool:
    """Whether the values of all losses add up over a context and what follows it."""
    return isinstance(config.attack.loss, TokenLoss)


def reads_context(config: ObjectiveConfig, whole: Prepared, start: int) -> bool:
    """Whether a loss needs the output at tokens before `start`."""
    losses = [config.attack.loss, *_divergences(config)]
    return any(isinstance(loss, TokenLoss) and loss.reads(whole, start) for loss in losses)


def adversary_of(work: Work) -> Callable[[Any], Any]:
    """The losses ``[B]`` that are maximised, unless they are the cross-entropy.

    Raises:
        ValueError: rows have weights, which are those of a cross-entropy.
    """
    loss = work.config.attack.loss
    if work.row_weights is not None:
        raise ValueError(
            f"row_weights must be None with loss={loss}: they are advantages, factors of the cross-entropy. Return "
            "None for them (aajr_batch of a trainer), or leave loss out."
        )
    more = {} if work.shared is None else {"shared": work.shared}
    return work.enter(loss.of(work.policy, work.batch, work.x.detach(), **more))
