"""Attacks that put other tokens in: candidates by the first-order gain, the choice by the loss itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_integers, kind_of
from ..head import as_head
from .scene import Found, Scene

__all__ = [
    "TokenSubstitution",
    "best_replacements",
    "check_candidates",
    "checked_candidates",
    "replaced",
]

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
    scene: Scene, ids: Tensor, places: Tensor, candidates: Tensor, count: int, *, may: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Candidates with the largest first-order gain ⟨∇ᵢL, e_k − xᵢ⟩ at places of every row, largest first.

    Args:
        scene: what is attacked.
        ids: ``[B, N]``, the tokens of now; none is replaced by itself.
        places: ``[B, P]``.
        candidates: ``[K]``.
        count: candidates of every place, at most K.
        may: bool ``[B, P]``, places where one may be replaced; None for all.

    Returns:
        Gains ``[B, P, n]``, −∞ where there is no replacement, and ids.
    """
    x = scene.embed(ids)
    _, slope = scene.slope(x)
    slope = _at(slope, places)
    base = (slope * _at(x, places)).sum(-1, keepdim=True)
    here = ids.gather(1, places).unsqueeze(-1)
    best: tuple[Tensor, Tensor] | None = None
    for part in candidates.split(CHUNK):
        gain = slope @ scene.embed(part.unsqueeze(0)).squeeze(0).to(slope).T - base
        is_out = here == part
        if may is not None:
            is_out = is_out | ~may.unsqueeze(-1)
        gain, pick = gain.masked_fill(is_out, -torch.inf).topk(min(count, len(part)), -1)
        token = part[pick]
        if best is not None:
            gain, token = torch.cat([best[0], gain], -1), torch.cat([best[1], token], -1)
            gain, order = gain.topk(min(count, gain.shape[-1]), -1)
            token = token.gather(-1, order)
        best = gain, token
    assert best is not None
    return best


def replaced(ids: Tensor, place: Tensor, token: Tensor) -> Tensor:
    """``[n, B, N]``: the ids ``[B, N]`` with one of n tokens ``[B, n]`` at its place, each time."""
    count = place.shape[1]
    return ids.repeat(count, 1, 1).scatter(2, place.T.unsqueeze(-1), token.T.unsqueeze(-1))


def _at(values: Tensor, places: Tensor) -> Tensor:
    """``[B, P, C]`` of ``[B, N, C]``."""
    return values.gather(1, places.unsqueeze(-1).expand(*places.shape, values.shape[-1]))


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

    #: name of its results in an evaluation
    name = "substitution"

    def __post_init__(self) -> None:
        check_integers(1, budget=self.budget, tries=self.tries, at_once=self.at_once)
        check_candidates(self.candidates)

    def run(self, scene: Scene, generator: torch.Generator | None = None) -> Found:
        """The losses after the last replacement; nothing is drawn.

        Raises:
            ValueError: no token may be replaced; the batch holds no ids.
        """
        scene.check_start("TokenSubstitution")
        candidates = checked_candidates(self.candidates, scene)
        current, allowed = scene.ids.clone(), scene.replaceable
        if not bool(allowed.any()):
            raise ValueError(
                "no token of the batch may be replaced: all that are open to attack are labels. Mark the adversary's "
                "tokens in attack_mask and set their labels to -100."
            )
        places = allowed.any(0).nonzero().squeeze(-1).expand(len(current), -1)
        may, rows = allowed.gather(1, places), torch.arange(len(current), device=current.device)
        curve, trials = [scene.losses(scene.x)], 1
        for _ in range(self.budget):
            gain, token = best_replacements(scene, current, places, candidates, self.tries, may=may)
            gain, order = gain.flatten(1).topk(min(self.tries, gain[0].numel()), -1)
            column = order // token.shape[-1]
            tries = replaced(current, places.gather(1, column), token.flatten(1).gather(1, order))
            losses = scene.losses_of_ids(tries, self.at_once).masked_fill(gain.T.isinf(), -torch.inf)
            trials += len(tries)
            best, index = losses.max(0)
            rises = best > curve[-1]
            current = torch.where(rises.unsqueeze(1), tries[index, rows], current)
            may[rows, column[rows, index]] &= ~rises
            curve.append(torch.where(rises, best, curve[-1]))
        return Found(curve[-1], torch.stack(curve), (self.budget, trials), current)
