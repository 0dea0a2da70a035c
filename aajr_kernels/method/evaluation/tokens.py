"""Attacks that put other tokens in: candidates by the first-order gain, the choice by the loss itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_integers, kind_of
from ..head import as_head
from .scene import Found, Scene

__all__ = ["TokenSubstitution", "best_replacements", "checked_candidates"]

#: candidates whose gains are in memory at once
CHUNK = 4096


def check_candidates(candidates: object) -> None:
    """Raise unless they are None, or ids in a sequence or in a tensor of one axis."""
    if candidates is None:
        return
    if isinstance(candidates, Tensor):
        is_right = candidates.dim() == 1 and not candidates.is_floating_point() and candidates.numel() > 0
        if candidates.dtype == torch.bool or not is_right:
            raise ValueError(
                f"candidates must be token ids [K], got {kind_of(candidates)} {tuple(candidates.shape)}."
            )
    elif isinstance(candidates, str) or not isinstance(candidates, Sequence) or not candidates:
        raise ValueError(
            f"candidates must be a tensor or a sequence of token ids, got {type(candidates).__name__}"
            + (" without an entry." if isinstance(candidates, Sequence) and not candidates else ".")
        )


def checked_candidates(candidates: Tensor | Sequence[int] | None, scene: Scene) -> Tensor:
    """Ids ``[K]`` on the device of the scene; by default all that the head has a row for.

    Raises:
        ValueError: None, and the policy does not describe its head.
    """
    device = scene.ids.device
    if candidates is not None:
        return torch.as_tensor(candidates, dtype=torch.long, device=device)
    head = scene.policy.described_head()
    if head is None:
        raise ValueError(
            "candidates must be given where the policy does not describe its head, which would say how many tokens "
            "there are: pass torch.arange(vocabulary), or the ids that occur in your texts."
        )
    return torch.arange(as_head(head).weight.shape[0], device=device)


def best_replacements(
    scene: Scene, ids: Tensor, allowed: Tensor, candidates: Tensor, count: int, *, per_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Replacements with the largest first-order gain ⟨∇ᵢL, e_k − xᵢ⟩, largest first.

    Args:
        scene: what is attacked.
        ids: ``[B, N]``, the tokens of now.
        allowed: bool ``[B, N]``, places where one may be replaced; no token is replaced by itself.
        candidates: ``[K]``.
        count: replacements of every row, or with `per_place` of every place.
        per_place: rank the candidates of every place by themselves.

    Returns:
        Gains (−∞ where there is no replacement), places and ids, each ``[B, n]``, or ``[B, P, n]`` over the P places
        that are allowed in any row.
    """
    x = scene.embed(ids)
    _, slope = scene.slope(x)
    places = allowed.any(0).nonzero().squeeze(-1)
    slope, here, open_here = slope[:, places], ids[:, places], allowed[:, places]
    base = (slope * x[:, places]).sum(-1, keepdim=True)
    best: tuple[Tensor, ...] | None = None
    for part in candidates.split(CHUNK):
        gain = slope @ scene.embed(part.unsqueeze(0)).squeeze(0).to(slope).T - base
        is_out = (here.unsqueeze(-1) == part) | ~open_here.unsqueeze(-1)
        gain = gain.masked_fill(is_out, -torch.inf)
        if not per_place:
            gain = gain.flatten(1)
        gain, pick = gain.topk(min(count, gain.shape[-1]), -1)
        place = places.reshape(-1, 1).expand(gain.shape) if per_place else places[pick // len(part)]
        new = (gain, place, part[pick % len(part)])
        if best is not None:
            joined = [torch.cat(pair, -1) for pair in zip(best, new)]
            gain, order = joined[0].topk(min(count, joined[0].shape[-1]), -1)
            new = (gain, joined[1].gather(-1, order), joined[2].gather(-1, order))
        best = new
    assert best is not None
    gain, place, token = best
    return gain, place, token


@dataclass(frozen=True, eq=False)
class TokenSubstitution:
    """Replace tokens one by one, greedily: candidates by the first-order gain, the choice by the loss itself.

    A token that is a label is not replaced, and a place not twice. A replacement that does not raise the loss is not
    made.

    Attributes:
        budget: most tokens that are replaced in a row.
        tries: replacements (place and token) with the largest first-order gain whose loss is evaluated, per token.
        candidates: ``[K]``, the ids that may be put in; None for all that the head of the policy has a row for.
        at_once: tries that go through the model together, as a batch of ``at_once · B`` rows.
    """

    budget: int = 4
    tries: int = 16
    candidates: Tensor | Sequence[int] | None = None
    at_once: int = 1

    #: what an evaluation calls it
    name = "substitution"

    def __post_init__(self) -> None:
        check_integers(1, budget=self.budget, tries=self.tries, at_once=self.at_once)
        check_candidates(self.candidates)

    def run(self, scene: Scene, generator: torch.Generator | None = None) -> Found:
        """The losses after the last replacement; nothing is drawn.

        Raises:
            ValueError: no token may be replaced; the batch holds no ids.
        """
        candidates = checked_candidates(self.candidates, scene)
        current, allowed = scene.ids.clone(), scene.replaceable.clone()
        if not bool(allowed.any()):
            raise ValueError(
                "no token of the batch may be replaced: all that are open to attack are labels. Mark the adversary's "
                "tokens in attack_mask and set their labels to -100."
            )
        places = torch.arange(current.shape[1], device=current.device)
        curve, trials = [scene.losses(scene.x)], 1
        for _ in range(self.budget):
            gains, place, token = best_replacements(scene, current, allowed, candidates, self.tries)
            tries = _replaced(current, place, token)
            losses = scene.losses_of_ids(tries, self.at_once).masked_fill(gains.T.isinf(), -torch.inf)
            trials += len(tries)
            best, index = losses.max(0)
            rises = best > curve[-1]
            rows = torch.arange(len(current), device=current.device)
            current = torch.where(rises.unsqueeze(1), tries[index, rows], current)
            allowed &= ~(rises.unsqueeze(1) & (places == place[rows, index].unsqueeze(1)))
            curve.append(torch.where(rises, best, curve[-1]))
        return Found(curve[-1], torch.stack(curve), (self.budget, trials), current)


def _replaced(ids: Tensor, place: Tensor, token: Tensor) -> Tensor:
    """``[n, B, N]``: the ids ``[B, N]`` with each of n tokens ``[B, n]`` at its place."""
    count = place.shape[1]
    return ids.repeat(count, 1, 1).scatter(2, place.T.unsqueeze(-1), token.T.unsqueeze(-1))
