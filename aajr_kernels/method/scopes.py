"""Scopes: which entries of an input share one norm and one radius, and which of them may be attacked.

==============  ==============================================  =====
scope           a group is                                      G
==============  ==============================================  =====
``"sequence"``  everything after the batch axis                 1
``"token"``     one vector of the last axis                     N
``"agent"``     all tokens of one agent                         A
==============  ==============================================  =====

N is the number of tokens of a batch row, A the number of agents; their numbers are labels, of any size, and the groups
are in their ascending order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import capture
from .checks import as_mask, check_choices, kind_of

__all__ = [
    "SCOPES",
    "UNITS",
    "Groups",
    "agent_labels",
    "attackable",
    "checked_agents",
    "kept",
    "unit_of",
    "widened",
]

SCOPES = ("sequence", "token", "agent")
UNITS = ("token", "sequence")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Groups:
    """The groups of one input ``[B, ...]``; per-group numbers are ``[B, G]``, entries of no group belong to none.

    Args:
        scope: one of :data:`SCOPES`.
        shape: of the input.
        agents: ``[*shape[:-1]]``, agent of every token, negative = none; needed by ``"agent"``.
    """

    def __init__(self, scope: str, shape: torch.Size | tuple[int, ...], agents: Tensor | None = None) -> None:
        self.scope, self.shape = scope, tuple(shape)
        self.batch, self.tokens = self.shape[0], math.prod(self.shape[1:-1])
        self._member: Tensor | None = None
        self.count = 1 if scope == "sequence" else self.tokens
        if scope == "agent":
            assert agents is not None
            flat = agents.reshape(self.batch, self.tokens)
            labels = agent_labels(flat)
            self.count = labels.numel()
            # a dense table keeps sums deterministic, which scatter_add is not on a GPU
            self._member = flat.unsqueeze(-1) == labels

    def sum(self, values: Tensor) -> Tensor:
        """Sum over every group, ``[B, G]``."""
        if self.scope == "sequence":
            return values.reshape(self.batch, -1).sum(-1, keepdim=True)
        tokens = values.reshape(self.batch, self.tokens, -1).sum(-1)
        if self._member is None:
            return tokens
        return (tokens.unsqueeze(-1) * self._member).sum(1)  # a product of matrices would follow autocast

    def largest(self, values: Tensor) -> Tensor:
        """Largest of the nonnegative values of every group, ``[B, G]``; 0 for a group without entries."""
        if self.scope == "sequence":
            return values.reshape(self.batch, -1).amax(-1, keepdim=True)
        tokens = values.reshape(self.batch, self.tokens, -1).amax(-1)
        if self._member is None:
            return tokens
        return torch.where(self._member, tokens.unsqueeze(-1), 0.0).amax(1)

    def broadcast(self, numbers: Tensor) -> Tensor:
        """``[B, G]`` (or ``[B, 1]``) back to where the entries are, broadcastable to the input; 0 for no group."""
        axes = len(self.shape) - 1
        if numbers.shape[1] == 1 and self._member is None:
            return numbers.reshape(self.batch, *(1,) * axes)
        if self._member is not None:
            numbers = (numbers.unsqueeze(1) * self._member).sum(-1)
        return numbers.reshape(*self.shape[:-1], 1)

    def norm(self, values: Tensor) -> Tensor:
        """Euclidean norm of every group, ``[B, G]``, also where squares would underflow; float32 for lower dtypes."""
        _, square, largest = self._scaled(values)
        return largest * square.sqrt()

    def unit(self, values: Tensor) -> Tensor:
        """`values` with every group scaled to Euclidean norm 1; zero stays zero."""
        scaled, square, _ = self._scaled(values)
        return (scaled / self._divisor(square).sqrt()).to(values.dtype)

    def _scaled(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`values` over the largest magnitude of their group, the squared norm of that, and the largest magnitude."""
        wide = widened(values)
        largest = self.largest(wide.detach().abs())
        scaled = wide / self._divisor(largest)
        return scaled, self.sum(scaled.square()), largest

    def _divisor(self, numbers: Tensor) -> Tensor:
        """`numbers` where the entries are; 1 in place of 0, and for entries of no group."""
        wide = self.broadcast(numbers)
        return torch.where(wide == 0, 1.0, wide)


def widened(values: Tensor) -> Tensor:
    """`values` in float32 where their dtype is lower."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def kept(values: Tensor, keep: Tensor | None) -> Tensor:
    """`values`, zero where `keep` is False; None keeps all."""
    return values if keep is None else torch.where(keep, values, 0.0)


def unit_of(scope: str, unit: str | None = None, scope_is_default: bool = False, of: str = "ascend") -> str:
    """The unit of a penalty along directions of a scope: the scope's own, unless `unit` names another.

    A direction of norm 1 in every token goes with the mean of q over tokens, one of norm 1 over a sequence (or over the
    tokens of an agent) with its sum. Other pairs differ from these by the number of tokens.

    Args:
        scope: one of :data:`SCOPES`.
        unit: as the caller named it, None for the scope's.
        scope_is_default: the caller did not name the scope.
        of: the function that took the default.

    Raises:
        ValueError: `unit` does not go with a scope that the caller did not name.
    """
    if unit is not None:
        check_choices(UNITS, unit=unit)
    own = "token" if scope == "token" else "sequence"
    if unit is not None and unit != own and scope_is_default:
        raise ValueError(
            f"unit={unit!r} does not go with scope={scope!r}, the default of {of}: leave unit out, or name both, "
            f"{of}(scope={scope!r}) and unit={unit!r}, for quantities that differ by the number of tokens."
        )
    return own if unit is None else unit


def agent_labels(agents: Tensor) -> Tensor:
    """The different agents, ascending; ``[0]`` if there is none.

    Raises:
        UnsupportedOperation: a CUDA graph is being captured.
    """
    capture.refuse(
        agents.device, "scope='agent' and per_agent count the agents", "attack by sequence or token"
    )
    labels = agents.unique()
    labels = labels[labels >= 0]
    return labels if labels.numel() else labels.new_zeros(1)


def checked_agents(agents: object, x: Tensor) -> Tensor | None:
    """`agents` on the device of `x`, checked.

    Raises:
        TypeError: it is no integer tensor.
        ValueError: its shape is not that of `x` without the last axis.
    """
    if agents is None:
        return None
    if not isinstance(agents, Tensor) or agents.dtype not in _INTEGERS:
        raise TypeError(
            f"agents must be an integer tensor (the agent of every token, negative = none), got {kind_of(agents)}."
        )
    if agents.shape != x.shape[:-1]:
        raise ValueError(
            f"agents must have shape {tuple(x.shape[:-1])}, x without its last axis, got {tuple(agents.shape)}."
        )
    return agents.to(x.device)


def attackable(mask: object, agents: Tensor | None, x: Tensor) -> Tensor | None:
    """Which entries of `x` may be attacked, broadcastable to it, or None for all.

    Args:
        mask: ``[*x.shape[:-1]]`` or broadcastable to `x`; bool or integer, nonzero = may be attacked.
        agents: tokens of no agent (negative) are not changed.

    Raises:
        TypeError: the mask is no bool or integer tensor.
        ValueError: its shape does not fit, or it leaves nothing to attack.
    """
    keep = None if agents is None else (agents >= 0).unsqueeze(-1)
    if mask is not None:
        wide = as_mask(mask, "mask", "may be attacked").to(x.device)
        shape = tuple(wide.shape)
        if wide.shape == x.shape[:-1]:
            wide = wide.unsqueeze(-1)
        try:
            fits = torch.broadcast_shapes(wide.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"mask must have shape {tuple(x.shape[:-1])}, x without its last axis, or be broadcastable to x "
                f"{tuple(x.shape)}, got {shape}."
            )
        keep = wide if keep is None else keep & wide
    if keep is not None and not capture.reads_no_value(keep.device) and not bool(keep.any()):
        raise ValueError(
            "mask and agents leave nothing to attack: nonzero in mask means that a token may be attacked, a negative "
            "number in agents that it belongs to no agent."
        )
    return keep
