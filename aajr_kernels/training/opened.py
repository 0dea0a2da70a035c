"""A micro-batch that is attacked inside the model: the objective as a function of what is added there.

The clean input then is zero, in units of the places, and tokens are open to attack as embeddings would be, at every
place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..method.ascent import NonFiniteLoss
from ..method.batch import Prepared
from ..method.places import Opened
from ..method.policy import Policy
from .policy import places_of
from .wrappers import smallest

if TYPE_CHECKING:
    from .config import Attack, ObjectiveConfig

__all__ = ["groups_in", "opened_of", "with_places"]


def with_places(policy: Policy, module: nn.Module, attack: Attack) -> Policy:
    """The policy with the places of an attack; None: its own.

    Raises:
        TypeError, ValueError: ``attack.at`` names no places of `module`.
    """
    if attack.at is None:
        return policy
    return replace(policy, places=places_of(module, attack.at))


def opened_of(policy: Policy, batch: Prepared, x: Tensor, attack: Attack, group: Any = None) -> Opened | None:
    """The places of a policy, opened for a micro-batch whose units count the tokens open to attack.

    Attended tokens would tie the radius to what is shared, and decoders' first ones can be a hundred times larger.

    Args:
        policy: with places; without, nothing is opened.
        batch: what is attacked, without its context where that is shared.
        x: its embeddings.
        attack: its options.
        group: of processes that call the model equally often.

    Raises:
        ValueError: a place returns zeros; places have several widths, and an entry no one size.
        NonFiniteLoss: a place returns NaN or infinity.
    """
    if policy.places is None:
        return None
    open_to_attack = batch.masks[2]
    opened = policy.places(x, policy.forward, tokens=open_to_attack, relative=attack.relative, **batch.inputs)
    if attack.norm == "linf" and attack.relative and len(set(opened.widths)) > 1:
        raise ValueError(
            f"norm must be 'l2' at places of several widths ({', '.join(map(str, opened.widths))}) with relative=True, "
            "got 'linf': their entries have no one size; set relative=False, or attack places of one width."
        )
    units = opened.units.detach()
    lowest = float(torch.where(units.isfinite(), units, -1.0).min())
    lowest = lowest if bool(open_to_attack.any()) else 1.0  # the ascent says so
    (verdict,) = smallest([(lowest > 0) - (lowest < 0)], group, x.device)
    if verdict < 0:
        raise NonFiniteLoss(
            f"the norms of what the attacked places return are {units.tolist()}: check the embedding, the model and "
            "the batch."
        )
    if not verdict:
        raise ValueError(
            "at must name places that return something other than zeros at the tokens open to attack with "
            f"relative=True, got norms {units.tolist()}: set Attack(relative=False), or attack another place."
        )
    return opened


def groups_in(opened: Opened, batch: Prepared, config: ObjectiveConfig) -> dict[str, Any]:
    """Mask and agents of an ascent; where a batch has no agents, every place is one."""
    agents = batch.agents
    if agents is not None:
        agents = opened.spread(agents)
    elif config.scope == "agent" or config.penalty.per_agent:
        agents = opened.index
    return {"mask": opened.attackable(batch.attackable), "agents": agents}
