"""A batch as an attack meets it: the policy, its losses as a function of embeddings, and the tokens open to attack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...backends.errors import UnsupportedOperation
from ..ascent import NonFiniteLoss
from ..attack_state import frozen_parameters
from ..batch import Prepared
from ..checks import check_choices
from ..evaluator import checked_losses, input_gradient
from ..losses import IGNORED
from ..policy import Policy
from ..scopes import widened
from ..sharing import Shared, check_splittable, shared_of, start_of

__all__ = ["Found", "Scene"]


@dataclass(frozen=True, eq=False)
class Found:
    """Losses of one batch under an attack.

    Attributes:
        losses: ``[B]``, of every row where the attack left it.
        curve: ``[K + 1, B]``, after 0, 1, ... K steps or replacements; the last entry is `losses`.
        calls: forwards of the batch with a gradient, and without.
        tokens: ``[B, N']``, the ids that it put in; None for attacks on embeddings.
    """

    losses: Tensor
    curve: Tensor
    calls: tuple[int, int]
    tokens: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """A batch before a model that an attack finds as it is: its parameters need no gradient, it is in eval mode.

    Attributes:
        policy: how the model is called.
        batch: checked, on the device of the model.
        modules: the models inside `policy`.
        objective: what the adversary maximises, an :class:`~..objectives.AdversaryLoss`; None for the mean
            cross-entropy of every row's labels.
        is_shifted: labels are tokens of the batch, that of position t being token t + 1.
        share_context: of :func:`evaluate`. With a context that is shared `loss` reaches no parameter.
    """

    policy: Policy
    batch: Prepared
    modules: tuple[nn.Module, ...] = ()
    objective: Any = None
    is_shifted: bool = True
    share_context: bool | str = False

    def __post_init__(self) -> None:
        if not isinstance(self.share_context, bool):
            check_choices(("auto",), share_context=self.share_context)
        learnt, _, attackable = self.batch.masks
        if not bool(attackable.any()):
            raise ValueError(
                "attack_mask must leave a token of the batch open to attack, got none: mark those of the adversary "
                "with 1, or leave it out for all that are attended to."
            )
        if self.objective is None and not bool(learnt.any(-1).all()):
            row = int(learnt.any(-1).logical_not().nonzero()[0])
            raise ValueError(
                f"labels must hold a target in every row, got none in row {row}: mark tokens that the model has to "
                "predict, or drop the row."
            )

    @property
    def rows(self) -> int:
        """B."""
        return self.labels.shape[0]

    @property
    def labels(self) -> Tensor:
        """``[B, N]``, the target of every position, −100 = none."""
        return self.batch.labels

    @property
    def ids(self) -> Tensor:
        """``[B, N]``.

        Raises:
            ValueError: the batch holds embeddings.
        """
        if self.batch.input_ids is None:
            raise ValueError(
                "a batch must hold input_ids where an attack replaces tokens, got inputs_embeds: give the ids, or "
                "attack the embeddings."
            )
        return self.batch.input_ids

    @functools.cached_property
    def x(self) -> Tensor:
        """Embeddings ``[B, N, C]``, without a graph."""
        with torch.no_grad():
            return self.batch.embedded(self.policy).detach()

    @functools.cached_property
    def unit(self) -> float:
        """Root mean square of the norms of the tokens that are attended to: what a relative radius counts in."""
        return float(self.batch.norm_of(self.x))

    @functools.cached_property
    def mask(self) -> Tensor:
        """Bool ``[B, N]``, open to attack."""
        return self.batch.masks[2].to(self.batch.labels.device)

    @functools.cached_property
    def replaceable(self) -> Tensor:
        """Bool ``[B, N]``, open to attack and no label of either kind: a token that is scored stays what it is."""
        if not self.is_shifted:
            return self.mask
        scored = torch.zeros_like(self.mask)
        scored[:, 1:] = self.batch.labels[:, :-1] != IGNORED
        if self.batch.attack_labels is not None:
            scored[:, 1:] |= self.batch.attack_labels[:, :-1] != IGNORED
        return self.mask & ~scored

    @functools.cached_property
    def loss(self) -> Callable[[Any], Any]:
        """From embeddings ``[B, N, C]`` to what the adversary maximises, ``[B]``."""
        return self._loss_of(1)

    def _loss_of(self, count: int) -> Callable[[Any], Any]:
        """The losses of the batch `count` times."""
        losses, start = self.losses_through(lambda forward: forward, count=count), self.start
        return lambda x: losses(x[:, start:])

    def losses_through(
        self,
        around: Callable[[Callable[..., Any]], Callable[..., Any]],
        x: Tensor | None = None,
        count: int = 1,
    ) -> Callable[[Any], Any]:
        """From what ``around(forward)`` takes to what the adversary maximises in the whole of the batch, ``[B]``.

        Args:
            around: from the forward, whose embeddings ``[B, N - start, C]`` begin behind the shared context, to another
                one.
            x: the clean input of that; None for the embeddings.
            count: the batch so many times.
        """
        shared = self._shared
        policy, batch = (self.policy, self.batch) if shared is None else (shared.policy, shared.batch)
        policy = replace(policy, forward=around(policy.forward))
        if shared is None:
            x = self.x if x is None else x
            return self.loss_of(policy, x.repeat(count, 1, 1), self._times(batch, count))
        losses = policy.loss_fn({}, self._times(batch, count).labels, "sum")
        fixed, counts = shared.losses.repeat(count), shared.counts.repeat(count)
        return lambda x: (losses(x) + fixed) / counts

    @property
    def start(self) -> int:
        """Tokens of the shared context, which run once; 0 without one."""
        return 0 if self._shared is None else self.labels.shape[1] - self._shared.batch.labels.shape[1]

    def loss_of(self, policy: Policy, x: Tensor, batch: Prepared | None = None) -> Callable[[Any], Any]:
        """From an input like the clean `x` of the forward of `policy` to what the adversary maximises, ``[B]``."""
        batch = self.batch if batch is None else batch
        if self.objective is None:
            return policy.loss_fn(batch.inputs, batch.labels, "mean")
        loss: Callable[[Any], Any] = self.objective.of(policy, batch, x)
        return loss

    @property
    def is_flat(self) -> bool:
        """Whether the gradient of the loss is zero at the clean input."""
        return bool(getattr(self.objective, "is_flat", False))

    def check_start(self, name: str) -> None:
        """Raise where an attack of this name begins at tokens at which the loss has no gradient.

        Raises:
            ValueError: the loss has none at the clean input.
        """
        if self.is_flat:
            raise ValueError(
                f"loss={self.objective} has a gradient of zero at the clean input, where {name} begins: use "
                "EmbeddingAttack or HiddenAttack, which then start at drawn points, or another loss."
            )

    def _times(self, batch: Prepared, count: int) -> Prepared:
        if count == 1:
            return batch
        return batch.of_rows(torch.arange(self.rows, device=batch.labels.device).repeat(count))

    @functools.cached_property
    def _shared(self) -> Shared | None:
        """The batch behind the tokens before the first that is open to attack in any row, which run once."""
        mode = self.share_context
        start = start_of(self.batch, mode)
        if not start:
            return None
        if self.objective is not None:
            if mode is True:
                raise ValueError(
                    "share_context must be 'auto' or False with loss=, whose value is that of the whole sequence, got "
                    "True."
                )
            return None
        is_scored = bool(self.batch.masks[0, :, :start].any())
        try:
            check_splittable(self.policy, self.batch)
            with torch.no_grad(), frozen_parameters(self.modules, True):
                return shared_of(self.policy, self.batch, self.x, start, is_scored)
        except (UnsupportedOperation, TypeError, ValueError):
            if mode is True:
                raise
            return None

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of ids ``[B, N]``, without a graph.

        Raises:
            ValueError: the policy has no embed.
        """
        if self.policy.embed is None:
            raise ValueError("policy must have an embed where an attack replaces tokens, got one without.")
        with torch.no_grad():
            return self.policy.embed(ids).detach()

    def losses(self, x: Tensor) -> Tensor:
        """Losses ``[B]`` of embeddings ``[B, N, C]``, without a graph.

        Raises:
            NonFiniteLoss: one is NaN or infinite.
        """
        return self._losses(self.loss, x)

    def losses_of_ids(self, ids: Tensor, at_once: int = 1) -> Tensor:
        """Losses ``[R, B]`` of other tokens ``[R, B, N]`` in the place of those of the batch, `at_once` in a forward.

        Raises:
            NonFiniteLoss: one is NaN or infinite.
        """
        return torch.cat([self._trials(part) for part in ids.split(at_once)])

    def _trials(self, ids: Tensor) -> Tensor:
        count, rows = ids.shape[:2]
        if count not in self._repeats:
            self._repeats[count] = self.loss if count == 1 else self._loss_of(count)
        return self._losses(self._repeats[count], self.embed(ids.flatten(0, 1))).reshape(count, rows)

    @functools.cached_property
    def _repeats(self) -> dict[int, Callable[[Any], Any]]:
        return {}

    def _losses(self, loss: Callable[[Any], Any], x: Tensor) -> Tensor:
        with torch.no_grad(), frozen_parameters(self.modules, True):
            losses: Tensor = checked_losses(loss(x), x.shape[0], "loss").detach()
        if not bool(torch.isfinite(losses).all()):
            raise NonFiniteLoss("the loss is NaN or infinite: check the model and the batch.")
        return losses

    def slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``[B]`` of embeddings, and their gradient like `x`, float32 for lower dtypes.

        Raises:
            ValueError: the losses do not depend on the embeddings.
            NonFiniteLoss: a loss or its gradient is NaN or infinite.
        """
        with torch.inference_mode(False), torch.enable_grad(), frozen_parameters(self.modules, True):
            point = x.detach().clone().requires_grad_()
            losses = checked_losses(self.loss(point.clone()), x.shape[0], "loss")
            gradient = widened(input_gradient(losses, point))
        if not bool(torch.isfinite(losses).all() and torch.isfinite(gradient).all()):
            raise NonFiniteLoss("the loss or its gradient is NaN or infinite: check the model and the batch.")
        return losses.detach(), gradient
