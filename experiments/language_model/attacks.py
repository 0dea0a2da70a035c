"""Two adversaries of the same tokens: one moves their embeddings, the other one puts other tokens in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels.method.attack_state import frozen_parameters
from aajr_kernels.training import Policy, prepared


@dataclass(frozen=True)
class Scene:
    """A model before windows of text.

    Attributes:
        model: in eval mode while it is attacked.
        policy: how to call it.
        ids: ``[B, N]``.
        labels: ``[B, N]``, the token that every place has to predict, −100 = not scored.
        mask: ``[B, N]`` bool, open to attack.
    """

    model: nn.Module
    policy: Policy
    ids: Tensor
    labels: Tensor
    mask: Tensor

    def loss(self) -> Any:
        """From embeddings ``[B, N, C]`` to the mean cross-entropy ``[B]`` of the scored tokens."""
        return self.policy.loss_fn({}, self.labels, "mean")

    def embedded(self, ids: Tensor) -> Tensor:
        """``[B, N, C]``, without a graph."""
        assert self.policy.embed is not None
        return self.policy.embed(ids).detach()


def scene_of(model: nn.Module, policy: Policy, batch: dict[str, Tensor]) -> Scene:
    """The scene of a batch of :func:`.text.in_turns`."""
    ready = prepared(batch, torch.device("cpu"), shift=True)
    assert ready.input_ids is not None and ready.attackable is not None
    return Scene(model, policy, ready.input_ids, ready.labels, ready.attackable)


def losses_of(scene: Scene, ids: Tensor | None = None) -> Tensor:
    """Mean cross-entropy ``[B]`` of the scored tokens, with other inputs `ids` if they are given."""
    with torch.no_grad(), frozen_parameters((scene.model,), True):
        losses: Tensor = scene.loss()(scene.embedded(scene.ids if ids is None else ids))
    return losses


def norm_of(x: Tensor) -> float:
    """Root mean square of the norms of tokens ``[B, N, C]``: the unit of radii, as in training."""
    return float(x.double().square().sum(-1).mean().sqrt())


def embedding_attack(
    scene: Scene,
    *,
    radius: float,
    steps: int,
    step_sizes: list[float],
    restarts: int,
    generator: torch.Generator,
    scope: str = "token",
) -> tuple[Tensor, list[aajr.Trajectory]]:
    """The largest loss ``[B]`` at any point of any ascent, one of normalised steps for every size; and the ascents.

    Args:
        scene: what is attacked.
        radius: of the ball of every token, or of the row, in norms of a token.
        steps: of an ascent.
        step_sizes: in radii.
        restarts: of every ascent: one from the tokens themselves, the others from uniform draws.
        generator: of the draws.
        scope: ``"token"`` or ``"sequence"``.
    """
    x = scene.embedded(scene.ids)
    size = radius * norm_of(x)
    ascents = [
        aajr.ascend(
            *(scene.loss(), x),
            radius=size,
            steps=steps,
            step_size=share * size,
            scope=scope,
            mask=scene.mask,
            restarts=restarts,
            generator=generator,
            module=scene.model,
            eval_mode=True,
        )
        for share in step_sizes
    ]
    return torch.stack([traj.worst_loss for traj in ascents]).amax(0), ascents


def substitution_attack(
    scene: Scene, *, budget: int, tries: int, candidates: Tensor
) -> tuple[Tensor, Tensor]:
    """Replace tokens one by one, greedily: candidates by the first-order gain, the choice by the loss itself.

    Args:
        scene: the attacked batch; only its open positions change.
        budget: most tokens that are replaced in a row.
        tries: replacements (place and token) with the largest first-order gain whose loss is evaluated, per token.
        candidates: ``[K]``, the ids that may be put in.

    Returns:
        Ids ``[B, N]`` after the last one, and losses ``[budget + 1, B]`` after 0, 1, ... replacements. A replacement
        that does not raise the loss is not made.
    """
    current, open_places = scene.ids.clone(), scene.mask.clone()
    vectors = scene.embedded(candidates)
    losses = [losses_of(scene)]
    for _ in range(budget):
        gain = _first_order_gain(scene, current, vectors)
        same = current.unsqueeze(-1) == candidates
        gain = gain.masked_fill(same | ~open_places.unsqueeze(-1), -torch.inf).flatten(1)
        values, picks = gain.topk(min(tries, gain.shape[1]), -1)
        best, best_ids, best_place = losses[-1], current, torch.full((len(current),), -1)
        for value, pick in zip(values.T, picks.T):
            place, token = pick.div(len(candidates), rounding_mode="floor"), pick % len(candidates)
            trial = current.scatter(1, place.unsqueeze(1), candidates[token].unsqueeze(1))
            loss = losses_of(scene, trial)
            better = (loss > best) & value.isfinite()
            best = torch.where(better, loss, best)
            best_ids = torch.where(better.unsqueeze(1), trial, best_ids)
            best_place = torch.where(better, place, best_place)
        current = best_ids
        open_places &= torch.arange(current.shape[1]) != best_place.unsqueeze(1)
        losses.append(best)
    return current, torch.stack(losses)


def _first_order_gain(scene: Scene, ids: Tensor, vectors: Tensor) -> Tensor:
    """⟨∇ᵢL, e_k − xᵢ⟩ of every token i and every candidate k: ``[B, N, K]``."""
    with frozen_parameters((scene.model,), True), torch.enable_grad():
        x = scene.embedded(ids).requires_grad_()
        (slope,) = torch.autograd.grad(scene.loss()(x).sum(), x)
    return slope @ vectors.T - (slope * x.detach()).sum(-1, keepdim=True)
