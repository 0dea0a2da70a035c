"""Agents: policies that share a model with an adapter each, or have models of their own, and what each wants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .policy import Policy

__all__ = ["Agent", "Agents"]


@dataclass(frozen=True, eq=False)
class Agent:
    """A policy that acts beside others.

    Attributes:
        name: of the agent.
        policy: how its model is called, while it is :meth:`acting`.
        module: the model, which agents may share.
        payoff: from a :class:`~.dialogue.Dialogue` (or what a training plays) to its payoff ``[B]``, detached: learnt
            by policy gradients on the tokens that the agent said. ``"experience"``: the one that what is played brings
            (an environment's rewards).
        loss: in the place of a payoff: ``"cross_entropy"`` of its own turns, or a function of the agent and a checked
            batch (:class:`~.batch.Prepared`) to a mean loss, attached.
        active: makes the model this agent's inside the block; None where it always is.
        own_parameters: its trained parameters; None: all of the module that require a gradient.
        speak: how it says a turn (:func:`~.dialogue.play`); None: samples of its policy.
    """

    name: str
    policy: Policy
    module: nn.Module
    payoff: str | Callable[[Any], Tensor] | None = None
    loss: str | Callable[[Agent, Any], Tensor] | None = None
    active: Callable[[], AbstractContextManager[None]] | None = None
    own_parameters: Callable[[], list[nn.Parameter]] | None = None
    speak: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy) or not isinstance(self.module, nn.Module):
            raise TypeError(
                f"policy must be a Policy and module an nn.Module, got {type(self.policy).__name__} and "
                f"{type(self.module).__name__}: take policy_of(model), or adapter_agent(model, adapter)."
            )
        if isinstance(self.loss, str) and self.loss != "cross_entropy":
            raise ValueError(f"loss must be 'cross_entropy' or a function, got {self.loss!r}.")
        if isinstance(self.payoff, str) and self.payoff != "experience":
            raise ValueError(f"payoff must be 'experience' or a function, got {self.payoff!r}.")
        if self.loss is not None and self.payoff is not None:
            raise ValueError(f"agent {self.name!r} must have a loss or a payoff, got both.")

    @contextlib.contextmanager
    def acting(self) -> Iterator[Agent]:
        """Inside, the model is this agent's: its adapter is on, and only its own parameters require a gradient.

        Backwards of what was computed inside belong inside, too: activation checkpoints compute it again there.
        """
        with contextlib.nullcontext() if self.active is None else self.active():
            own = {id(p) for p in self.parameters()}
            others = [p for p in self.module.parameters() if p.requires_grad and id(p) not in own]
            for p in others:
                p.requires_grad_(False)
            try:
                yield self
            finally:
                for p in others:
                    p.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        """That are trained."""
        if self.own_parameters is not None:
            return self.own_parameters()
        return [p for p in self.module.parameters() if p.requires_grad]

    def check_learns(self) -> None:
        """Raise where there is nothing to be learnt.

        Raises:
            ValueError: the agent has neither a loss nor a payoff, or no parameters of its own.
        """
        if self.loss is None and self.payoff is None:
            raise ValueError(
                f"agent {self.name!r} must have a loss or a payoff to learn, got neither: give payoff=, or "
                "loss='cross_entropy' of its own turns, or leave it out of the learners."
            )
        if not self.parameters():
            raise ValueError(f"agent {self.name!r} must have parameters that require a gradient, got none.")

    def paid(self, played: Any, rows: int) -> Tensor:
        """Payoff of what was played, ``[B]``.

        Raises:
            TypeError, ValueError: it is no floating point tensor ``[B]``, or not finite.
        """
        assert self.payoff is not None
        if isinstance(self.payoff, str):
            raise ValueError(
                f"payoff of agent {self.name!r} must be a function where a dialogue is played, got {self.payoff!r}, "
                "which is what an environment brings."
            )
        return self.checked(self.payoff(played), rows)

    def checked(self, payoff: Any, rows: int) -> Tensor:
        """A payoff ``[B]``, detached.

        Raises:
            TypeError, ValueError: as of :meth:`paid`.
        """
        if not isinstance(payoff, Tensor) or not payoff.is_floating_point():
            raise TypeError(
                f"payoff of agent {self.name!r} must be a floating point tensor, got {type(payoff).__name__}."
            )
        if tuple(payoff.shape) != (rows,):
            raise ValueError(
                f"payoff of agent {self.name!r} must be one number per row, shape ({rows},), got "
                f"{tuple(payoff.shape)}."
            )
        if not bool(payoff.isfinite().all()):
            raise ValueError(f"payoff of agent {self.name!r} must be finite, got {payoff.tolist()}.")
        return payoff.detach()


class Agents:
    """Agents by name.

    Args:
        agents: each with a name of its own.

    Raises:
        ValueError: two have the same name, or a trained parameter in common.
    """

    def __init__(self, agents: Sequence[Agent]) -> None:
        self._agents = {agent.name: agent for agent in agents}
        if len(self._agents) != len(agents) or not agents:
            raise ValueError(
                f"agents must be at least one, each with a name of its own, got {[a.name for a in agents]}."
            )
        owners: dict[int, str] = {}
        for agent in agents:
            for p in agent.parameters():
                if owners.setdefault(id(p), agent.name) != agent.name:
                    raise ValueError(
                        f"agents must have parameters of their own, got one that {owners[id(p)]!r} and "
                        f"{agent.name!r} share: give each an adapter, or a model."
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """In the order that they were given in, which is that of turns."""
        return tuple(self._agents)

    def __getitem__(self, name: str) -> Agent:
        if name not in self._agents:
            raise ValueError(f"name must be one of {', '.join(self._agents)}, got {name!r}.")
        return self._agents[name]

    def __iter__(self) -> Iterator[Agent]:
        return iter(self._agents.values())

    def __len__(self) -> int:
        return len(self._agents)
