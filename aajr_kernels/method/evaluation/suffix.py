"""A search for tokens that, put in behind the adversary's own, raise the loss (greedy coordinate gradient)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...torch_private import pytree
from ..batch import Prepared
from ..checks import check_integers
from ..losses import IGNORED
from .scene import Found, Scene
from .tokens import best_replacements, check_candidates, checked_candidates, replaced

__all__ = ["SuffixSearch", "lengthened"]


@dataclass(frozen=True, eq=False)
class SuffixSearch:
    """Tokens put in behind the last token of every row that is open to attack, searched as by GCG (Zou et al., 2023).

    A step ranks the candidates of every place by their first-order gain, draws replacements of one token from the first
    of them, evaluates their losses, and goes on from the best, be it better than before or not. The result is the best
    suffix on the way; it may lie below the loss without one.

    Attributes:
        length: tokens of the suffix.
        steps: of the search.
        tries: replacements that are drawn and evaluated in a step.
        top: candidates of every place that they are drawn from.
        initial: the id that the suffix starts with, at all of its places, or `length` ids.
        candidates: ``[K]``, the ids that may be put in; None for all that the head of the policy has a row for.
        at_once: tries that go through the model together, as a batch of ``at_once · B`` rows.
    """

    length: int = 10
    steps: int = 20
    tries: int = 16
    top: int = 64
    initial: int | Sequence[int] = 0
    candidates: Tensor | Sequence[int] | None = None
    at_once: int = 1

    #: name of its results in an evaluation
    name = "suffix"

    def __post_init__(self) -> None:
        check_integers(
            1, length=self.length, steps=self.steps, tries=self.tries, top=self.top, at_once=self.at_once
        )
        if isinstance(self.initial, Sequence) and not isinstance(self.initial, str):
            if len(self.initial) != self.length:
                raise ValueError(
                    f"initial must be one id or length={self.length} of them, got {len(self.initial)}."
                )
        else:
            check_integers(0, initial=self.initial)
        check_candidates(self.candidates)

    def run(self, scene: Scene, generator: torch.Generator) -> Found:
        """The losses with the best suffix; `generator` draws the replacements.

        Raises:
            ValueError: a row has no token open to attack; the batch holds no ids, or entries that cannot be lengthened.
        """
        if getattr(scene.objective, "compares", False):
            raise ValueError(
                f"loss={scene.objective} compares with the output at the clean tokens, to which SuffixSearch adds "
                "some: use TokenSubstitution or another loss."
            )
        candidates = checked_candidates(self.candidates, scene)
        device, rows = scene.ids.device, torch.arange(scene.rows, device=scene.ids.device)
        initial = torch.as_tensor(self.initial, device=device).expand(scene.rows, self.length)
        scene, places = lengthened(scene, initial)
        current = best = scene.ids
        losses = scene.losses_of_ids(current.unsqueeze(0))[0]
        curve = [losses]
        for _ in range(self.steps):
            _, token = best_replacements(scene, current, places, candidates, self.top)
            draws = [
                torch.randint(most, (scene.rows, self.tries), generator=generator).to(device)
                for most in (self.length, token.shape[-1])
            ]
            tries = replaced(
                current, places.gather(1, draws[0]), token[rows.unsqueeze(1), draws[0], draws[1]]
            )
            losses, index = scene.losses_of_ids(tries, self.at_once).max(0)
            current = tries[index, rows]
            best = torch.where((losses > curve[-1]).unsqueeze(1), current, best)
            curve.append(torch.maximum(losses, curve[-1]))
        return Found(curve[-1], torch.stack(curve), (self.steps, 1 + self.steps * self.tries), best)


def lengthened(scene: Scene, suffix: Tensor) -> tuple[Scene, Tensor]:
    """The scene with ids ``[B, L]`` behind every row's last token that is open to attack, and their places ``[B, L]``.

    They are attended to, the only ones open to attack, and belong to the agent of the token before them. The token
    behind them is predicted from the last of them.

    Raises:
        ValueError: a row has no token open to attack; the model takes inputs by token other than the attention mask.
    """
    batch, length, device = scene.batch, suffix.shape[1], suffix.device
    if not bool(batch.masks[2].any(-1).all()):
        row = int(batch.masks[2].any(-1).logical_not().nonzero()[0])
        raise ValueError(
            f"attack_mask must leave a token open in every row for a suffix to follow it, got none in row {row}: drop "
            "the row."
        )
    rows, tokens = batch.labels.shape
    places = torch.arange(tokens, device=device)
    start = torch.where(scene.mask, places, -1).amax(1, keepdim=True) + 1  # [B, 1], where the suffix begins
    new = torch.arange(tokens + length, device=device)
    is_new = (new >= start) & (new < start + length)
    source = (new - length * (new >= start + length)).clamp(
        max=tokens - 1
    )  # of a new token the last one before it
    source = torch.where(is_new, start - 1, source)

    def spread(values: Tensor) -> Tensor:
        index = source.reshape(*source.shape, *(1,) * (values.dim() - 2))
        return values.gather(1, index.expand(*source.shape, *values.shape[2:]))

    def of_input(name: str, value: Any) -> Any:
        if name == "attention_mask" and isinstance(value, Tensor) and tuple(value.shape) == (rows, tokens):
            return spread(value)
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and tokens in leaf.shape[0 if leaf.shape[:1] != (rows,) else 1 :]:
                raise ValueError(
                    f"{name} cannot be lengthened by a suffix, got an entry of shape {tuple(leaf.shape)}: leave it "
                    "out, so that the model makes its own."
                )
        return value

    def of_labels(values: Tensor) -> Tensor:
        labels = spread(values).masked_fill(is_new, IGNORED)
        if not scene.is_shifted:
            return labels
        last = start + length - 1
        return labels.scatter(1, last, values.gather(1, start - 1)).scatter(1, start - 1, IGNORED)

    ids = spread(scene.ids)
    ids[is_new] = suffix.reshape(-1).to(ids)
    moved = {
        field.name: None if (value := getattr(batch, field.name)) is None else spread(value)
        for field in fields(batch)
        if field.name in ("attended", "agents")
    }
    inputs = {name: of_input(name, value) for name, value in batch.inputs.items()}
    longer = Prepared(
        input_ids=ids,
        inputs_embeds=None,
        inputs=inputs,
        labels=of_labels(batch.labels),
        attackable=is_new,
        attack_labels=None if batch.attack_labels is None else of_labels(batch.attack_labels),
        **moved,
    )
    return replace(scene, batch=longer), new.expand(rows, -1)[is_new].reshape(rows, length)
