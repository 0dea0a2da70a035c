"""Batches: their entries, checked, and the learnt tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..torch_private import pytree
from .losses import IGNORED
from .policy import Policy

__all__ = ["Prepared", "prepared"]

#: entries of a batch that are not handed to the model
OWN = ("input_ids", "inputs_embeds", "labels", "attack_mask", "agents", "attack_labels")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A micro-batch on the device of the model.

    Attributes:
        input_ids: ``[B, N]``, or None with `inputs_embeds`.
        inputs_embeds: ``[B, N, C]``, embeddings in place of ids.
        inputs: further arguments of the model.
        labels: ``[B, N]``, the target of every position, −100 = none.
        attended: ``[B, N]`` bool, or None for all.
        attackable: the same.
        agents: ``[B, N]``, or None.
        attack_labels: ``[B, N]``, what the adversary wants at every position, −100 = nothing; or None.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    inputs: dict[str, Any]
    labels: Tensor
    attended: Tensor | None
    attackable: Tensor | None
    agents: Tensor | None
    attack_labels: Tensor | None = None

    @functools.cached_property
    def masks(self) -> Tensor:
        """``[3, B, N]`` bool on the CPU: learnt, attended, attackable; read from the device once, all together."""
        learnt, attackable = self.labels != IGNORED, self.attackable
        if self.agents is not None:
            has_agent = self.agents >= 0
            attackable = has_agent if attackable is None else attackable & has_agent
        every = torch.ones_like(learnt)
        return torch.stack(
            [learnt, *(every if mask is None else mask for mask in (self.attended, attackable))]
        ).cpu()

    @functools.cached_property
    def aimed(self) -> Tensor:
        """``[B, N]`` bool on the CPU: tokens with an attack label."""
        if self.attack_labels is None:
            return torch.zeros(self.labels.shape, dtype=torch.bool)
        return (self.attack_labels != IGNORED).cpu()

    def to(self, device: torch.device) -> Prepared:
        """The same on a device, with its masks on the CPU."""
        moved = Prepared(**{field.name: _moved(getattr(self, field.name), device) for field in fields(self)})
        moved.__dict__.update(masks=self.masks, aimed=self.aimed)
        return moved

    def suffix(self, start: int) -> Prepared:
        """The tokens from `start` on, without inputs of the model."""
        return self._of_tokens(slice(start, None))

    def prefix(self, end: int) -> Prepared:
        """The tokens before `end`, the same."""
        return self._of_tokens(slice(0, end))

    def _of_tokens(self, tokens: slice) -> Prepared:
        cut: dict[str, Any] = {
            field.name: None if (value := getattr(self, field.name)) is None else value[:, tokens]
            for field in fields(self)
            if field.name != "inputs"
        }
        part = Prepared(inputs={}, **cut)
        part.__dict__.update(masks=self.masks[..., tokens], aimed=self.aimed[:, tokens])
        return part

    def embedded(self, policy: Policy) -> Tensor:
        """``[B, N, C]``, attached to the embedding's weights."""
        if self.inputs_embeds is not None:
            return self.inputs_embeds
        if policy.embed is None:
            raise ValueError(
                "a batch must hold inputs_embeds, or the policy an embed: this one has input_ids."
            )
        return policy.embed(self.input_ids)  # type: ignore[arg-type]

    def of_rows(self, rows: Tensor) -> Prepared:
        """Some of the rows, by index.

        Raises:
            ValueError: a tensor among the model's arguments has another first axis, of more than one entry.
        """
        batch = self.labels.shape[0]

        def selected(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] == 1 != batch:
                return leaf
            if leaf.shape[0] != batch:
                raise ValueError(
                    f"tensors of a batch must have its {batch} rows as their first axis where the penalty draws some, "
                    f"got shape {tuple(leaf.shape)}: set Penalty(rows=1)."
                )
            return leaf[rows]

        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return Prepared(**pytree.tree_map(selected, entries))

    def norm_of(self, x: Tensor) -> Tensor:
        """Root mean square of the norms of `x` ``[B, N, C]`` at the tokens attended to, float64, attached."""
        return norm_at(x, None if self.attended is None else self.masks[1])

    def tokens(self, which: str) -> Tensor | None:
        """Bool ``[B, N]``: those with a label (``"loss"``), or all that are attended to; None for all."""
        return self.labels != IGNORED if which == "loss" else self.attended


def norm_at(x: Tensor, mask: Tensor | None) -> Tensor:
    """Root mean square of the norms of `x` ``[B, N, C]`` at the tokens of a mask ``[B, N]``, float64, attached."""
    squares = x.double().square().sum(-1)
    if mask is not None:
        squares = squares.flatten()[mask.flatten().nonzero().squeeze(-1).to(x.device)]
    return squares.mean().sqrt()


def prepared(batch: Any, device: torch.device, shift: bool) -> Prepared:
    """Check a batch, move it, and align its labels.

    Args:
        batch: a mapping with ``input_ids`` ``[B, N]`` or ``inputs_embeds`` ``[B, N, C]``, and if wanted ``labels``
            (the ids by default), ``attention_mask`` ``[B, N]``, ``attack_mask`` ``[B, N]`` (nonzero = may be
            attacked), ``agents`` ``[B, N]``, ``attack_labels`` ``[B, N]`` (what an adversary with
            :class:`~.objectives.Targeted` wants, like labels) and more for the model; or only the ids. Unattended
            tokens are neither attacked nor learnt, nor do they predict.
        device: of the model.
        shift: labels are the tokens themselves; position t learns that at t + 1.

    Raises:
        TypeError, ValueError: an entry is missing or has a wrong type or shape.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a mapping or a tensor of token ids, got {type(batch).__name__}.")
    entries = {name: value for name, value in batch.items() if value is not None}
    is_on_host = all(
        leaf.device.type == "cpu" for leaf in pytree.tree_leaves(entries) if isinstance(leaf, Tensor)
    )
    if not is_on_host:
        entries = {name: _moved(value, device) for name, value in entries.items()}
    ids, inputs_embeds = entries.get("input_ids"), entries.get("inputs_embeds")
    if (ids is None) == (inputs_embeds is None):
        raise ValueError(
            f"a batch must hold either input_ids or inputs_embeds, got {', '.join(map(str, entries)) or 'nothing'}."
        )
    if ids is not None and (ids.dim() != 2 or ids.is_floating_point()):
        raise ValueError(f"input_ids must be integers [B, N], got {ids.dtype} {tuple(ids.shape)}.")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or not inputs_embeds.is_floating_point()):
        raise ValueError(
            f"inputs_embeds must be numbers [B, N, C], got {inputs_embeds.dtype} {tuple(inputs_embeds.shape)}."
        )
    shape = tuple(ids.shape if ids is not None else inputs_embeds.shape[:2])  # type: ignore[union-attr]
    for name in ("labels", "attack_mask", "agents", "attack_labels"):
        if name in entries and tuple(entries[name].shape) != shape:
            raise ValueError(
                f"{name} must have the shape {shape} of the tokens, got {tuple(entries[name].shape)}."
            )
    mask = entries.get("attention_mask")
    # masks of other shapes are the model's affair: they do not say which tokens are there
    attended = mask != 0 if isinstance(mask, Tensor) and tuple(mask.shape) == shape else None
    labels = entries.get("labels", ids)
    if labels is None:
        raise ValueError("labels must be in a batch that holds inputs_embeds.")
    wanted = entries.get("attack_labels")
    for name, value in (("labels", labels), ("attack_labels", wanted)):
        if value is not None and value.is_floating_point():
            raise ValueError(f"{name} must be integers, got {value.dtype}.")
    attackable = attended
    if "attack_mask" in entries:
        masked = entries["attack_mask"] != 0
        attackable = masked if attended is None else masked & attended
    ready = Prepared(
        ids,
        inputs_embeds,
        {name: value for name, value in entries.items() if name not in OWN},
        _aligned(labels.long(), attended, "labels" in entries, shift),
        attended,
        attackable,
        entries.get("agents"),
        None if wanted is None else _aligned(wanted.long(), attended, True, shift),
    )
    # masks of a batch that is not on the device yet are read where nothing waits for it
    return ready.to(device) if is_on_host else ready


def _aligned(labels: Tensor, attended: Tensor | None, own: bool, shift: bool) -> Tensor:
    if attended is not None and not own:
        labels = labels.masked_fill(~attended, IGNORED)
    if shift:
        labels = torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORED)], 1)
    return labels if attended is None else labels.masked_fill(~attended, IGNORED)


def _moved(value: Any, device: torch.device) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, value
    )
