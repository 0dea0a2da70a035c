"""One perturbation for all rows of a batch, or of several batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ascent import ascend
from ..checks import check_integers, kind_of
from ..scopes import widened
from ..trajectory import Trajectory
from .embedding import check_radius, check_step_size
from .run import scenes_of
from .scene import Found, Scene

__all__ = ["UniversalPerturbation"]


@dataclass(frozen=True, eq=False)
class UniversalPerturbation:
    """K vectors, the same for all rows: the k-th token of a row that is open to attack is moved by the (k mod K)-th.

    Gradient ascent on the mean loss over rows, every vector in a ball of its own. Without `delta` every batch gets one
    of its own; :meth:`fit` finds one on other batches.

    Attributes:
        radius: of the ball of every vector.
        relative: `radius` and `delta` count in norms of a token, as of :class:`EmbeddingAttack`.
        steps: of the ascent.
        step_size: in radii, or ``"auto"``.
        size: K; None for as many as the row with most tokens open to attack has, 1 for one vector for all tokens.
        delta: ``[K, C]``, what is applied.
    """

    radius: float = 0.1
    relative: bool = True
    steps: int = 20
    step_size: float | str = 0.25
    size: int | None = None
    delta: Tensor | None = None

    #: name of its results in an evaluation
    name = "universal"

    def __post_init__(self) -> None:
        check_radius(self.radius)
        check_integers(1, steps=self.steps)
        check_step_size("step_size", self.step_size)
        if self.size is not None:
            check_integers(1, size=self.size)
        delta = self.delta
        if delta is None:
            return
        if (
            not isinstance(delta, Tensor)
            or not delta.is_floating_point()
            or delta.dim() != 2
            or not len(delta)
        ):
            got = tuple(delta.shape) if isinstance(delta, Tensor) else ""
            raise ValueError(f"delta must be floating point [K, C], got {kind_of(delta)} {got}.")
        longest = float(widened(delta).norm(dim=-1).max())
        if not longest <= self.radius * (1 + 1e-5):
            raise ValueError(
                f"delta must lie within radius={self.radius}, got a vector of norm {longest:.4g}: give its own radius."
            )

    def fit(
        self,
        policy: Any,
        batches: Any,
        *,
        module: nn.Module | Iterable[nn.Module] | None,
        loss: Any = None,
        shift_labels: bool = True,
        share_context: bool | str = "auto",
    ) -> UniversalPerturbation:
        """The same attack with the `delta` of the largest mean loss over the rows of `batches`.

        Arguments are those of :func:`evaluate`. A step is a forward and a backward of every batch, one after the other.
        """
        scenes = list(scenes_of(policy, batches, module, loss, shift_labels, share_context))
        return replace(self, delta=self._ascent(scenes).worst.squeeze(0))

    def run(self, scene: Scene, generator: torch.Generator | None = None) -> Found:
        """The losses at `delta`, or at one that is found for this batch; nothing is drawn.

        Raises:
            ValueError: the width of `delta` is not that of the embeddings.
        """
        if self.delta is not None:
            if self.delta.shape[1] != scene.x.shape[-1]:
                raise ValueError(
                    f"delta must have the width {scene.x.shape[-1]} of the embeddings, got {self.delta.shape[1]}: fit "
                    "it on this model."
                )
            losses = self._losses(scene, self.delta)
            return Found(losses, torch.stack([scene.losses(scene.x), losses]), (0, 2))
        trajectory = self._ascent([scene])
        means = trajectory.losses.squeeze(1)
        curve = [self._losses(scene, point.squeeze(0)) for point in trajectory.points]
        best = [int(means[: step + 1].argmax()) for step in range(len(means))]
        gradients, forwards = trajectory.evaluations
        return Found(
            curve[best[-1]], torch.stack([curve[i] for i in best]), (gradients, forwards + len(curve))
        )

    def _losses(self, scene: Scene, delta: Tensor) -> Tensor:
        return scene.losses(self._moved(scene, delta))

    def _moved(self, scene: Scene, delta: Tensor) -> Tensor:
        """``[B, N, C]`` with vectors ``[K, C]`` added, attached to them."""
        index = (scene.mask.cumsum(1) - 1).clamp(min=0) % len(delta)
        wide = widened(scene.x)
        added = delta.to(wide)[index] * (scene.unit if self.relative else 1.0)
        return torch.where(scene.mask.unsqueeze(-1), wide + added, wide).to(scene.x.dtype)

    def _ascent(self, scenes: list[Scene]) -> Trajectory:
        """On the mean loss over the rows of all scenes, as one row of K tokens."""
        if not scenes:
            raise ValueError("batches must hold at least one batch, got none.")
        for scene in scenes:
            scene.check_start("UniversalPerturbation")
        size = self.size or max(int(scene.batch.masks[2].sum(-1).max()) for scene in scenes)
        rows = sum(scene.rows for scene in scenes)
        modules = tuple(dict.fromkeys(module for scene in scenes for module in scene.modules))

        def losses_of(scene: Scene, delta: Tensor) -> Tensor:
            losses: Tensor = scene.loss(self._moved(scene, delta.squeeze(0)))
            return losses.sum() / rows

        x = widened(scenes[0].x).new_zeros(1, size, scenes[0].x.shape[-1])
        return ascend(
            lambda delta: _Added.apply(delta, scenes, losses_of).reshape(1),
            x,
            radius=self.radius,
            steps=self.steps,
            step_size=self.step_size if isinstance(self.step_size, str) else self.step_size * self.radius,
            scope="token",
            module=modules,
            eval_mode=bool(modules),
        )


class _Added(torch.autograd.Function):
    """A sum over scenes whose gradient is formed scene by scene: one graph at a time is in memory."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, scenes: list[Scene], losses_of: Any) -> Tensor:
        total, gradient = delta.new_zeros(()), torch.zeros_like(delta)
        for scene in scenes:
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                leaf = delta.detach().requires_grad_(ctx.needs_input_grad[0])
                loss = losses_of(scene, leaf)
            if ctx.needs_input_grad[0]:
                gradient += torch.autograd.grad(loss, leaf)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * cotangent, None, None
