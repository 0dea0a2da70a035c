"""The losses of a training: that which the adversary maximises, as a function of what is attacked, and its checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..method.baselines import NEEDS_LOSS
from ..method.batch import Prepared
from ..method.checks import kind_of
from ..method.objectives import CrossEntropy, TokenLoss

if TYPE_CHECKING:
    from .config import Attack, ObjectiveConfig
    from .objective import Work

__all__ = [
    "adversary_of",
    "can_share",
    "check_attack",
    "check_objective",
    "is_cross_entropy",
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
        ValueError: it does, and the adversary has another loss.
    """
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


def can_share(config: ObjectiveConfig) -> bool:
    """Whether the values of all losses add up over a context and what follows it."""
    return isinstance(config.attack.loss, TokenLoss)


def reads_context(config: ObjectiveConfig, whole: Prepared, start: int) -> bool:
    """Whether a loss needs the output at tokens before `start`."""
    loss = config.attack.loss
    return isinstance(loss, TokenLoss) and loss.reads(whole, start)


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
